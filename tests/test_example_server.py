"""The example server with a model: the same tokens with and without the cache, in one process and
through HTTP, before and after a kill."""

from __future__ import annotations

import json
import os
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from light_mem import LocalCacheService, allocate_kvcache
from tests.conftest import wait_until

transformers = pytest.importorskip("transformers", minversion="5.0")

from examples.server.cache import PrefixCache  # noqa: E402
from examples.server.client import RunningServer, generate, get, wait_stored  # noqa: E402
from examples.server.generate import Generation  # noqa: E402
from examples.server.model import (  # noqa: E402
    ByteTokenizer,
    Model,
    identity_of,
    layout_of,
    load_model,
)
from examples.server.web import with_text  # noqa: E402

PAGE = 8
PROMPT = [31 * i % 256 for i in range(100)]
STEPS = 12


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    """One thread, because OpenMP's threads wait by spinning and crawl when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_model("tiny", PAGE)
    torch.set_num_threads(before)


def run(model: Model, cache: PrefixCache | None, prompt: list[int]) -> Generation:
    generation = Generation(model, cache, prompt, STEPS)
    assert list(generation) == generation.tokens
    if cache is not None:
        wait_until(lambda: not cache.pending())
    return generation


# One process.


def test_tokens_are_the_same_with_and_without_the_cache(model: Model, tmp_path: Path) -> None:
    kvcache = allocate_kvcache(40, model.layout.page_bytes)
    with LocalCacheService(tmp_path / "store", 4 << 20, 2, kvcache, 1) as service:
        service.run()
        cache = PrefixCache(service, model.layout, kvcache, model.identity)
        cold = run(model, cache, PROMPT)
        assert cold.cached_tokens == 0
        prompts = {
            96: PROMPT,  # 12 pages and 4 tokens
            88: PROMPT[:96],  # the last page is complete, and not used: its last token is computed
            8: [*PROMPT[:8], *PROMPT[50:]],
            0: PROMPT[1:],
            104: PROMPT + cold.tokens[:8],  # the next turn: the answer was stored as well
        }
        for cached, prompt in prompts.items():
            warm = run(model, cache, prompt)
            assert warm.cached_tokens == cached
            assert warm.tokens == run(model, None, prompt).tokens
        cache.close()


def test_the_comparison_notices_wrong_pages(model: Model, tmp_path: Path) -> None:
    kvcache = allocate_kvcache(40, model.layout.page_bytes)
    with LocalCacheService(tmp_path / "store", 4 << 20, 2, kvcache, 1) as service:
        service.run()
        cache = PrefixCache(service, model.layout, kvcache, model.identity)
        cold = run(model, cache, PROMPT)
        # A cache that believes that another prompt has the same name.
        cache.load = (
            lambda tokens, load=cache.load: load(  # type: ignore[method-assign,misc]
                PROMPT[: len(tokens)]
            )
        )
        other = [(token + 1) % 256 for token in PROMPT[:96]] + PROMPT[96:]
        wrong = run(model, cache, other)
        assert wrong.cached_tokens == 96
        assert wrong.tokens == cold.tokens != run(model, None, other).tokens
        cache.close()


def test_a_client_that_leaves_has_its_prompt_stored(model: Model, tmp_path: Path) -> None:
    kvcache = allocate_kvcache(40, model.layout.page_bytes)
    with LocalCacheService(tmp_path / "store", 4 << 20, 2, kvcache, 1) as service:
        service.run()
        cache = PrefixCache(service, model.layout, kvcache, model.identity)
        answer = with_text(Generation(model, cache, PROMPT, STEPS), ByteTokenizer())
        next(answer)
        answer.close()
        wait_until(lambda: not cache.pending())
        assert run(model, cache, PROMPT).cached_tokens == 96
        cache.close()


def test_a_stream_shows_no_half_characters(model: Model) -> None:
    class Fixed:
        max_tokens = 7
        tokens: list[int] = []  # noqa: RUF012

        def __iter__(self) -> Iterator[int]:
            self.tokens = []
            for token in "aé€".encode() + b"\xc3":
                self.tokens.append(token)
                yield token

    pieces = [text for _, text in with_text(Fixed(), ByteTokenizer())]  # type: ignore[arg-type]
    assert pieces == ["a", "", "é", "", "", "€", "\ufffd"]


# What names depend on, and what has no names.


def test_the_identity_covers_weights_config_and_layout(model: Model) -> None:
    again = load_model("tiny", PAGE)
    assert again.identity == model.identity  # it makes itself the same way each time
    found = {model.identity, load_model("tiny", 2 * PAGE).identity}
    found.add(load_model("tiny", PAGE, torch.bfloat16).identity)
    found.add(identity_of(again.network, replace(again.layout, layers=1)))
    with torch.no_grad():
        again.network.lm_head.weight[0, 0] += 1
    found.add(identity_of(again.network, again.layout))
    again.network.config.rms_norm_eps *= 2
    found.add(identity_of(again.network, again.layout))
    assert len(found) == 6


def test_a_checkpoint_is_loaded_by_its_path(model: Model, tmp_path: Path) -> None:
    model.network.save_pretrained(tmp_path / "checkpoint")
    loaded = load_model(str(tmp_path / "checkpoint"), PAGE)
    assert loaded.tokenizer is None
    assert loaded.layout == model.layout
    assert run(loaded, None, PROMPT).tokens == run(model, None, PROMPT).tokens
    with pytest.raises(ValueError, match="no directory"):
        load_model(str(tmp_path / "missing"), PAGE)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sliding_window": 16}, "only full attention"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope"),
    ],
)
def test_a_model_whose_pages_would_lie_is_refused(change: dict[str, Any], says: str) -> None:
    config = transformers.MistralConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **{"sliding_window": None, **change},
    )
    network = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=says):
        layout_of(network, PAGE)


# Through HTTP.

ARGUMENTS = ("--model", "tiny", "--tokens-per-page", PAGE, "--threads", 1, "--copy-workers", 1)


def ask_until_all_answered(url: str, prompts: list[list[int]], processes: int) -> dict[int, Any]:
    """Ask for all prompts at once, again and again, until as many processes have answered."""
    results: dict[int, Any] = {}
    pids: set[int] = set()
    with ThreadPoolExecutor(4) as pool:
        while len(pids) < processes or not results:
            answers = pool.map(lambda p: generate(url, tokens=p, max_tokens=STEPS).result, prompts)
            for number, result in enumerate(answers):
                results.setdefault(number, result)
                assert result["tokens"] == results[number]["tokens"]
                pids.add(result["pid"])
    return results


def test_two_processes_behind_a_port_that_are_killed(model: Model, tmp_path: Path) -> None:
    prompts = [[(token + shift) % 256 for token in PROMPT] for shift in range(6)]
    expected = [run(model, None, prompt).tokens for prompt in prompts]
    arguments = (*ARGUMENTS, "--store", tmp_path / "store", "--storage-gb", 0.05, "--rows", 64)
    with RunningServer(*arguments, processes=2) as server:
        first = ask_until_all_answered(server.url, prompts, processes=2)
        assert [first[i]["tokens"] for i in range(6)] == expected
        assert all(result["cached_tokens"] == 0 for result in first.values())
        wait_stored(server.url, server.pids)
        # What one process computed, the others find; one that is killed is replaced.
        os.kill(server.pids[0], signal.SIGKILL)
        assert generate(server.url, tokens=prompts[0]).result["cached_tokens"] == 96
        server.pids[0] = server.next_ready()
        again = ask_until_all_answered(server.url, prompts, processes=2)
        assert [again[i]["tokens"] for i in range(6)] == expected
        server.kill()
    with RunningServer(*arguments, processes=2) as server:
        after = ask_until_all_answered(server.url, prompts, processes=2)
        assert [after[i]["tokens"] for i in range(6)] == expected
        assert all(result["cached_tokens"] == 96 for result in after.values())
        stats = [get(server.url, "/stats") for _ in range(2)]
        assert sum(s["prefixes"]["loaded"] for s in stats) > 0
        assert all(s["light_mem"]["damaged"] == 0 for s in stats)


def test_requests_and_their_errors(model: Model, tmp_path: Path) -> None:
    with RunningServer(*ARGUMENTS, "--no-cache") as server:
        url = server.url
        text = "".join(chr(65 + i % 26) for i in range(50))
        streamed = generate(url, prompt=text, max_tokens=STEPS).result
        assert streamed["tokens"] == run(model, None, list(text.encode())).tokens
        body = json.dumps({"prompt": text, "max_tokens": STEPS, "stream": False}).encode()
        with urllib.request.urlopen(f"{url}/generate", body, timeout=60) as response:
            assert json.load(response)["tokens"] == streamed["tokens"]
        for wrong in (
            {},
            {"prompt": 5},
            {"tokens": []},
            {"tokens": [256]},
            {"tokens": ["a"]},
            {"prompt": "a", "max_tokens": 0},
            {"prompt": "a", "max_tokens": 10**6},
        ):
            with pytest.raises(urllib.error.HTTPError) as refused:
                generate(url, **wrong)
            assert refused.value.code == 400
            refused.value.close()
        # One that goes after the first event, and one that says nothing useful.
        host, port = url.removeprefix("http://").split(":")
        for data in (b"POST /generate HTTP/1.0\r\nContent-Length: 999999999999\r\n\r\n", b"\0\r\n"):
            with socket.create_connection((host, int(port)), timeout=60) as client:
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
                client.recv(100)
        with urllib.request.urlopen(
            f"{url}/generate", json.dumps({"prompt": text, "max_tokens": 9000}).encode(), timeout=60
        ) as response:
            response.readline()
        assert get(url, "/health")["pid"] == server.pids[0]  # it did not go on for 9,000 tokens
