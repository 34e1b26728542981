"""One request as an inference server runs it on top of LightMem.

match the prompt's pages -> load what is stored -> compute the rest -> decode -> store the new

Everything here that touches the library is in `load` and `store`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from light_mem import State
from light_mem.demo.plan import Engine, Progress
from light_mem.demo.prefix import identity, page_hashes

PATIENCE = 60.0  # seconds; a server would sooner give up, abort the task and compute


class Task(Protocol):
    def wait(self, timeout: float | None = None) -> bool: ...
    def count(self, state: State) -> int: ...
    def finished_prefix(self) -> int: ...
    def get_page_already_list(self) -> Sequence[int]: ...


class Service(Protocol):
    """The two calls of `LocalCacheService` that a request needs."""

    def match_prefix(self, hashes: Sequence[str]) -> int: ...
    def create(
        self, *, mode: str, hash_values: Sequence[str], page_indices: Sequence[int]
    ) -> Task: ...


@dataclass
class Answer:
    """What a request gave, and where its time went (seconds)."""

    tokens: list[int]  # the next tokens, greedy
    logits: Tensor  # [steps, 256]: row 0 after the prompt, row i after i more tokens
    loaded: int  # tokens whose K and V came from the store
    computed: int  # tokens of the prompt that went through the model
    loaded_bytes: int
    match_seconds: float  # hashing the prompt and looking it up
    load_seconds: float  # from create() to ready
    first_token_seconds: float  # TTFT: from the request to the first token, all of it


class Loaded(NamedTuple):
    pages: int
    match_seconds: float
    load_seconds: float


class Stored(NamedTuple):
    pages: int
    already: int  # of them were in the store before
    bytes: int
    seconds: float


def answer(
    engine: Engine,
    service: Service | None,
    prompt: Sequence[int],
    block_table: Tensor,
    steps: int,
    progress: Progress,
) -> Answer:
    """Run one request in the pages of `block_table`; `service=None` computes everything."""
    config = engine.config
    logits = []
    with torch.inference_mode():
        started = perf_counter()
        loaded = Loaded(0, 0.0, 0.0)
        if service is not None:
            loaded = load(engine, service, prompt, block_table)
        reused = loaded.pages * config.tokens_per_page
        logits.append(prefill(engine, prompt, reused, block_table, progress))
        tokens = [int(logits[0].argmax())]
        first = perf_counter()
        while len(tokens) < steps:
            position = len(prompt) + len(tokens) - 1
            logits.append(engine.model.forward(tokens[-1:], position, engine.cache, block_table))
            tokens.append(int(logits[-1].argmax()))
            progress("decode", len(tokens), steps)
    return Answer(
        tokens=tokens,
        logits=torch.stack(logits),
        loaded=reused,
        computed=len(prompt) - reused,
        loaded_bytes=loaded.pages * config.page_bytes,
        match_seconds=loaded.match_seconds,
        load_seconds=loaded.load_seconds,
        first_token_seconds=first - started,
    )


def load(engine: Engine, service: Service, prompt: Sequence[int], block_table: Tensor) -> Loaded:
    """Bring the stored pages with which the prompt begins into `block_table`'s pages."""
    config = engine.config
    started = perf_counter()
    hashes = page_hashes(identity(config), prompt, config.tokens_per_page)
    # Pages hold K and V, not logits: at least the last token has to be computed, stored or not.
    usable = (len(prompt) - 1) // config.tokens_per_page
    found = whole_chunks(engine, service.match_prefix(hashes[:usable]))
    matched = perf_counter()
    if not found:
        return Loaded(0, matched - started, 0.0)
    task = service.create(
        mode="read", hash_values=hashes[:found], page_indices=block_table[:found].tolist()
    )
    if not task.wait(PATIENCE):
        raise TimeoutError(f"{found} pages were not read within {PATIENCE:.0f} s")
    # Between the look-up and the copy a page may have been evicted, or found damaged: its block
    # is Aborted. Only what comes before the first such block is a prefix.
    good = whole_chunks(engine, task.finished_prefix())
    return Loaded(good, matched - started, perf_counter() - matched)


def whole_chunks(engine: Engine, pages: int) -> int:
    """Round down to where a prefill chunk begins.

    A server would use every page. Here the chunks after the loaded part must be the very chunks
    of a run without a cache: the same tokens in a matrix of another height are other sums.
    """
    return pages - pages % engine.config.pages_per_chunk


def prefill(
    engine: Engine, prompt: Sequence[int], start: int, block_table: Tensor, progress: Progress
) -> Tensor:
    """Compute `prompt[start:]` chunk by chunk; `start` is where a chunk begins."""
    size = engine.config.tokens_per_chunk
    for begin in range(start, len(prompt), size):
        chunk = prompt[begin : begin + size]
        logits = engine.model.forward(chunk, begin, engine.cache, block_table)
        progress("prefill", begin + len(chunk), len(prompt))
    return logits


def store(engine: Engine, service: Service, prompt: Sequence[int], block_table: Tensor) -> Stored:
    """Give the prompt's pages to the store and wait until they can be found there.

    A server stores every full page, those of the decoded tokens too, and does not wait: it asks
    `task.data_safe()` before it gives the pages to another request. Here only pages of whole
    chunks are stored, because K and V of a shorter chunk are equal in value, not in every bit,
    to what a longer prompt would compute for the same tokens.
    """
    config = engine.config
    hashes = page_hashes(identity(config), prompt, config.tokens_per_page)
    pages = whole_chunks(engine, len(hashes))
    started = perf_counter()
    task = service.create(
        mode="write", hash_values=hashes[:pages], page_indices=block_table[:pages].tolist()
    )
    if not task.wait(PATIENCE):
        raise TimeoutError(f"{pages} pages were not written within {PATIENCE:.0f} s")
    seconds = perf_counter() - started
    kept = task.count(State.Finished)
    if kept < pages:
        raise RuntimeError(f"the store took {kept} of {pages} pages; is it large enough?")
    already = len(task.get_page_already_list())
    return Stored(pages, already, pages * config.page_bytes, seconds)
