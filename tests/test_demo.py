"""The demo: its model keeps every bit through pages, hashes name prefixes, the CLI proves it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from light_mem import State, cli
from light_mem.demo import run
from light_mem.demo.model import ModelConfig
from light_mem.demo.plan import Engine, Plan, prompt_text
from light_mem.demo.prefix import identity, page_hashes
from light_mem.demo.proof import difference, read_logits, write_logits
from light_mem.demo.report import Report
from light_mem.demo.request import answer, prefill, store
from tests.strange_files import StrangeFiles

TINY = ModelConfig(
    layers=2, heads=4, kv_heads=2, head_dim=16, hidden=64, tokens_per_page=8, tokens_per_chunk=16
)
PROMPT = list(prompt_text()[:96])  # six chunks to the last token: the awkward length
STEPS = 5


class Twin:
    """The service's two calls in memory, without workers; `lost` pages are found but not read."""

    def __init__(self, kvcache: Tensor) -> None:
        self.kvcache = kvcache
        self.blocks: dict[str, Tensor] = {}
        self.lost: set[str] = set()

    def match_prefix(self, hashes: Sequence[str]) -> int:
        known = (i for i, name in enumerate(hashes) if name not in self.blocks)
        return next(known, len(hashes))

    def create(
        self, *, mode: str, hash_values: Sequence[str], page_indices: Sequence[int]
    ) -> TwinTask:
        states, already = [], []
        for name, page in zip(hash_values, page_indices, strict=True):
            found = name in self.blocks and name not in self.lost
            if mode == "write" and not found:
                self.blocks[name] = self.kvcache[page].clone()
            elif mode == "write":
                already.append(page)
            elif found:
                self.kvcache[page] = self.blocks[name]
            states.append(State.Finished if found or mode == "write" else State.Aborted)
        return TwinTask(states, already)


class TwinTask:
    def __init__(self, states: list[State], already: list[int]) -> None:
        self.states = states
        self.already = already

    def wait(self, timeout: float | None = None) -> bool:
        return True

    def count(self, state: State) -> int:
        return self.states.count(state)

    def finished_prefix(self) -> int:
        return next((i for i, s in enumerate(self.states) if s != State.Finished), len(self.states))

    def get_page_already_list(self) -> list[int]:
        return self.already


def silent(stage: str, done: int, total: int) -> None:
    pass


def make_engine(config: ModelConfig = TINY) -> Engine:
    kvcache = torch.zeros(40, config.page_bytes, dtype=torch.uint8)
    return Engine(config, kvcache, threads=1)


def logits_of(engine: Engine, prompt: Sequence[int], start: int, table: Tensor) -> Tensor:
    with torch.inference_mode():
        return prefill(engine, prompt, start, table, silent)[None]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The demo fixes torch's threads for its process; here that process has other tests too.

    One thread, because OpenMP's threads wait by spinning and crawl when the machine is busy.
    """
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


# The model.


def test_continuing_from_copied_pages_in_another_order_gives_the_same_bits(engine: Engine) -> None:
    table = engine.allot(12, seed=1)
    whole = logits_of(engine, PROMPT, 0, table)
    saved = engine.kvcache[table[:8]]
    other = make_engine()  # its own weights from the same seed, its own empty pages
    elsewhere = other.allot(12, seed=2)
    assert elsewhere.tolist() != table.tolist()
    other.kvcache[elsewhere[:8]] = saved
    continued = logits_of(other, PROMPT, 64, elsewhere)
    assert difference(whole, continued) is None
    assert torch.equal(engine.kvcache[table], other.kvcache[elsewhere])


@pytest.mark.parametrize("damage", ["one bit", "two pages swapped", "an empty page"])
def test_the_comparison_notices(engine: Engine, damage: str) -> None:
    table = engine.allot(12, seed=1)
    whole = logits_of(engine, PROMPT, 0, table)
    if damage == "one bit":
        engine.kvcache[table[3], 5 * 4 + 2] ^= 0x40  # of the exponent of one number
    elif damage == "two pages swapped":
        table[[0, 5]] = table[[5, 0]]
    else:
        engine.kvcache[table[0]] = 0
    assert difference(whole, logits_of(engine, PROMPT, 80, table)) is not None


def test_pages_depend_on_nothing_that_comes_later(engine: Engine) -> None:
    table = engine.allot(24, seed=3)
    first, second = table[:12], table[12:]
    logits_of(engine, PROMPT, 0, first)
    logits_of(engine, [*PROMPT[:32], *reversed(PROMPT[32:])], 0, second)
    same = (engine.kvcache[first] == engine.kvcache[second]).all(dim=1)
    assert same.tolist() == [True] * 4 + [False] * 8


def test_gathered_keys_are_copies(engine: Engine) -> None:
    table = engine.allot(4, seed=4)
    keys, values = engine.cache.gather(0, 32, table)
    keys.fill_(1.0)
    values.fill_(1.0)
    assert keys.is_contiguous()
    assert values.is_contiguous()
    again, _ = engine.cache.gather(0, 32, table)
    assert not torch.equal(keys, again)


# The names of pages.


def test_an_early_token_changes_every_later_name() -> None:
    before = page_hashes("model", PROMPT, 8)
    changed = list(PROMPT)
    changed[17] ^= 1
    after = page_hashes("model", changed, 8)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True] * 2 + [False] * 10
    assert len(set(before)) == len(before)


def test_only_full_pages_have_names() -> None:
    assert len(page_hashes("model", PROMPT[:23], 8)) == 2
    assert page_hashes("model", PROMPT[:23], 8) == page_hashes("model", PROMPT, 8)[:2]
    assert page_hashes("model", PROMPT[:7], 8) == []


@pytest.mark.parametrize(
    "other", [replace(TINY, seed=1), replace(TINY, hidden=128), replace(TINY, tokens_per_chunk=32)]
)
def test_another_model_gives_other_names(other: ModelConfig) -> None:
    mine = page_hashes(identity(TINY), PROMPT, 8)
    assert not set(mine) & set(page_hashes(identity(other), PROMPT, 8))


# Requests, with the twin.


def test_a_stored_prompt_is_loaded_but_for_its_last_chunk() -> None:
    engine = make_engine()
    twin = Twin(engine.kvcache)
    table = engine.allot(13, seed=1)
    cold = answer(engine, twin, PROMPT, table, STEPS, silent)
    assert (cold.loaded, cold.computed) == (0, 96)
    assert store(engine, twin, PROMPT, table)[:2] == (12, 0)
    assert store(engine, twin, PROMPT, table)[:2] == (12, 12)
    engine.wipe()
    warm = answer(engine, twin, PROMPT, engine.allot(13, seed=2), STEPS, silent)
    assert (warm.loaded, warm.computed) == (80, 16)  # all 96 are stored; logits are not
    assert warm.loaded_bytes == 10 * TINY.page_bytes
    assert difference(cold.logits, warm.logits) is None
    assert warm.tokens == cold.tokens == cold.logits.argmax(dim=1).tolist()


def test_a_page_lost_between_look_up_and_copy_is_computed() -> None:
    engine = make_engine()
    twin = Twin(engine.kvcache)
    table = engine.allot(13, seed=1)
    cold = answer(engine, twin, PROMPT, table, STEPS, silent)
    store(engine, twin, PROMPT, table)
    twin.lost = {page_hashes(identity(TINY), PROMPT, 8)[5]}
    engine.wipe()
    warm = answer(engine, twin, PROMPT, engine.allot(13, seed=2), STEPS, silent)
    assert (warm.loaded, warm.computed) == (32, 64)
    assert difference(cold.logits, warm.logits) is None


# The proof.


def test_logits_are_compared_as_bits() -> None:
    zeros = torch.zeros(2, 256)
    assert difference(zeros, zeros.clone()) is None
    assert (
        difference(torch.full((1, 256), float("nan")), torch.full((1, 256), float("nan"))) is None
    )
    negative = zeros.clone()
    negative[1, 7] = -0.0
    assert difference(zeros, negative) == "1 of 256 logits 1 tokens after the prompt, by up to 0"
    assert difference(zeros, zeros[:1]) is not None


def test_a_changed_logits_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "logits"
    logits = torch.randn(3, 256)
    digest = write_logits(path, logits)
    assert torch.equal(read_logits(path, digest, 3), logits)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ValueError, match="not the file"):
        read_logits(path, digest, 3)


def test_the_plan_travels_as_json() -> None:
    plan = Plan(store="/x", tokens=300, steps=2, workers=1, seed=3, threads=2)
    assert Plan.from_json(plan.to_json()) == plan
    assert bytes(plan.prompt()) == prompt_text()[:300]


# The command.


def test_the_text_is_long_and_plain() -> None:
    text = prompt_text()
    assert len(text) > 12_000
    assert text.isascii()


def test_a_prompt_without_a_whole_chunk_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--tokens", "128", "--store", str(tmp_path)]) == 2
    assert "--tokens" in capsys.readouterr().err


@pytest.mark.parametrize("keep", [False, True])
def test_where_the_store_was_is_told_with_what_became_of_it(
    keep: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(run, "run_demo", lambda plan, *_, **__: Report(1, 1, 1, plan.store))
    assert cli.main(["demo", *["--keep"][: int(keep)]]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert ("(removed; --keep keeps it)" in shown) is not keep
    assert bool(list(tmp_path.iterdir())) is keep


def test_the_demo_runs_and_notices_a_wrong_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = StrangeFiles(tmp_path)  # what happens to lie in the current directory is not run
    monkeypatch.chdir(strange.directory)
    command = ["demo", "--tokens", "300", "--next", "3", "--threads", "1"]
    command += ["--store", str(tmp_path / "store")]
    assert cli.main([*command, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["equal"]
    assert first["problems"] == {}
    assert first["pages_compared"] == 8
    assert [row["request"] for row in first["rows"]][:3] == ["cold", "warm memory", "after restart"]
    assert [row["tokens_loaded"] for row in first["rows"]] == [0, 256, 256, 0]
    assert [row["tokens_computed"] for row in first["rows"]] == [300, 44, 44, 300]
    assert first["stored"]["pages"] == 8
    assert first["stored"]["already"] == 0
    assert first["files"]
    assert not first["removed"]
    assert strange.that_ran == []

    # The store was kept: the next run loads in its first request. Its second process is told
    # logits with one wrong bit, and must say so.
    def write_wrong_logits(path: Path, logits: Tensor) -> str:
        wrong = logits.clone()
        wrong.view(torch.int32)[2, 100] ^= 1
        return write_logits(path, wrong)

    monkeypatch.setattr(run, "write_logits", write_wrong_logits)
    assert cli.main(command) == 1
    shown = capsys.readouterr().out
    assert "first (kept store)" in shown
    assert "8 of them stored before" in shown
    assert "NOT EQUAL" in shown
    assert "1 of 256 logits 2 tokens after the prompt" in " ".join(shown.split())
