"""The example server's cache, without a model: names of pages, rows, load and store."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.server.cache import PrefixCache
from examples.server.pages import Layers, PageLayout, PagePool
from examples.server.prefix import identity, page_hashes
from light_mem import (
    LocalCacheService,
    LockTimeoutError,
    State,
    TaskTableFullError,
    allocate_kvcache,
)
from tests.conftest import wait_until

LAYOUT = PageLayout(layers=3, kv_heads=2, head_dim=8, dtype=torch.float32, tokens_per_page=4)
MODEL = identity({"model": "stand-in"})
PROMPT = [7 * i % 251 for i in range(42)]  # ten full pages and two tokens


def kv_of(tokens: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """K and V as a model makes them: each number from all tokens up to its own."""
    sums = torch.tensor([(token + 1) * (i + 1) for i, token in enumerate(tokens)]).cumsum(0)
    place = torch.arange(LAYOUT.kv_heads * LAYOUT.head_dim).view(LAYOUT.kv_heads, 1, -1)
    return [
        (
            (sums[None, :, None] + place + 1000 * layer).to(LAYOUT.dtype),
            (sums[None, :, None] - place - 1000 * layer).to(LAYOUT.dtype),
        )
        for layer in range(LAYOUT.layers)
    ]


def assert_is_prefix(layers: Layers, tokens: Sequence[int], count: int) -> None:
    assert len(layers) == LAYOUT.layers
    for (keys, values), (true_keys, true_values) in zip(layers, kv_of(tokens), strict=True):
        assert torch.equal(keys, true_keys[:, :count])
        assert torch.equal(values, true_values[:, :count])


@contextmanager
def opened(
    store: Path, rows: int = 40, run: bool = True, **options: Any
) -> Iterator[tuple[LocalCacheService, PrefixCache]]:
    """A service and the cache on it, as one process of the server has them."""
    kvcache = allocate_kvcache(rows, LAYOUT.page_bytes)
    with LocalCacheService(store, 1 << 20, 2, kvcache, 1) as service:
        if run:
            service.run()
        cache = PrefixCache(service, LAYOUT, kvcache, MODEL, **options)
        try:
            yield service, cache
        finally:
            cache.close()


# Names.


def test_a_name_covers_its_page_and_all_before_it() -> None:
    names = page_hashes(MODEL, PROMPT, 4)
    assert len(set(names)) == len(names) == 10  # the last two tokens fill no page
    changed = list(PROMPT)
    changed[21] += 1  # in page 5
    others = page_hashes(MODEL, changed, 4)
    assert [a == b for a, b in zip(names, others, strict=True)] == [True] * 5 + [False] * 5


def test_names_are_the_chain_that_the_description_says() -> None:
    first = hashlib.blake2b(MODEL + b"\x01\0\0\0\x02\0\0\0", digest_size=16)
    second = hashlib.blake2b(first.digest() + b"\xff\xff\0\0\x03\0\0\0", digest_size=16)
    assert page_hashes(MODEL, [1, 2, 65535, 3], 2) == [first.hexdigest(), second.hexdigest()]


def test_no_two_identities_share_a_name() -> None:
    parts = [{"a": "bc"}, {"ab": "c"}, {"a": "b", "c": ""}, {"a": "bc", "b": ""}, {}]
    assert len({page_hashes(identity(p), PROMPT, 4)[0] for p in parts}) == len(parts)
    assert identity({"x": 1, "y": 2}) == identity({"y": 2, "x": 1})


# Rows.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_come_back_from_any_rows(dtype: torch.dtype) -> None:
    layout = PageLayout(layers=3, kv_heads=2, head_dim=8, dtype=dtype, tokens_per_page=4)
    kvcache = torch.zeros(6, layout.page_bytes, dtype=torch.uint8)
    numbers = layout.view(kvcache)
    layers = [(k.to(dtype), v.to(dtype)) for k, v in kv_of(PROMPT[:12])]
    for page, row in enumerate([4, 1, 3]):
        layout.scatter(numbers, row, layers, page)
    out = layout.empty(3)
    layout.gather(numbers, [4, 1], out, 0)
    layout.gather(numbers, [3], out, 2)
    for layer, (keys, values) in enumerate(layers):
        assert torch.equal(out[layer, 0], keys)
        assert torch.equal(out[layer, 1], values)
    assert not kvcache[[0, 2, 5]].any()


class FakeTask:
    """A task that is ready when the test says so."""

    def __init__(self) -> None:
        self.done = threading.Event()

    def data_safe(self) -> bool:
        return self.done.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        return self.done.wait(timeout)

    def state(self) -> list[State]:
        return [State.Finished if self.done.is_set() else State.Working] * 100


def test_rows_of_a_task_are_not_given_out_before_they_are_safe() -> None:
    pool, task = PagePool(range(3)), FakeTask()
    rows = pool.take(2)
    pool.lend(task, rows)
    assert pool.lent() == 2
    assert pool.take(3) == [2]
    assert pool.take(1) == pool.take(1, timeout=0.01) == []
    task.done.set()
    assert sorted(pool.take(3)) == sorted(rows)
    assert pool.lent() == 0


def test_who_needs_rows_waits_for_the_oldest_task() -> None:
    pool, task = PagePool([5]), FakeTask()
    pool.lend(task, pool.take(1))
    threading.Timer(0.02, task.done.set).start()
    assert pool.take(1, timeout=30) == [5]


# Load and store, on the library.


def test_a_prefix_comes_back_after_a_restart(tmp_path: Path) -> None:
    with opened(tmp_path / "store") as (_, cache):
        assert cache.load(PROMPT).tokens == 0
        assert cache.store(PROMPT, kv_of(PROMPT))
    with opened(tmp_path / "store") as (_, cache):
        prefix = cache.load(PROMPT)
        assert prefix.tokens == 40
        assert_is_prefix(prefix.layers, PROMPT, 40)
        # Another prompt with the same beginning; one token of page 6 differs.
        prefix = cache.load([*PROMPT[:26], 0, *PROMPT[27:]])
        assert prefix.tokens == 24
        assert_is_prefix(prefix.layers, PROMPT, 24)
        # The last token is always computed, so the page that it completes is of no use.
        assert cache.load(PROMPT[:40]).tokens == 36
        assert cache.load([]).tokens == cache.load(PROMPT[:3]).tokens == 0


def test_two_processes_of_a_server_see_each_others_prefixes(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as (_, mine), opened(tmp_path / "s") as (_, theirs):
        mine.store(PROMPT, kv_of(PROMPT))
        wait_until(lambda: not mine.pending())
        prefix = theirs.load(PROMPT)
        assert prefix.tokens == 40
        assert_is_prefix(prefix.layers, PROMPT, 40)


def test_another_model_finds_nothing(tmp_path: Path) -> None:
    with opened(tmp_path / "store") as (service, cache):
        cache.store(PROMPT, kv_of(PROMPT))
        wait_until(lambda: not cache.pending())
        kvcache = allocate_kvcache(4, LAYOUT.page_bytes)
        other = PrefixCache(service, LAYOUT, kvcache, identity({"model": "other"}))
        assert other.load(PROMPT).tokens == 0
        other.close()


def test_only_what_is_new_is_stored(tmp_path: Path) -> None:
    with opened(tmp_path / "store") as (service, cache):
        for count in (20, 42, 42):
            cache.store(PROMPT[:count], kv_of(PROMPT))
            wait_until(lambda: not cache.pending())
        assert cache.counters.stored == service.stats()["blocks"] == 10


def test_a_prefix_may_have_more_pages_than_there_are_rows(tmp_path: Path) -> None:
    with opened(tmp_path / "store", rows=6) as (_, cache):
        cache.store(PROMPT, kv_of(PROMPT))
        wait_until(lambda: not cache.pending())
        prefix = cache.load(PROMPT)
        assert prefix.tokens == 40
        assert_is_prefix(prefix.layers, PROMPT, 40)


def test_a_prefix_ends_at_the_first_block_that_is_gone(tmp_path: Path) -> None:
    names = page_hashes(MODEL, PROMPT, 4)
    with opened(tmp_path / "store") as (service, cache):
        cache.store(PROMPT, kv_of(PROMPT))
        wait_until(lambda: not cache.pending())
        service.delete(names[6])
        assert cache.load(PROMPT).tokens == 24
        # Evicted between the look-up and the read: found, then Aborted.
        found = len(names)
        cache._service = Wrapper(service, match_prefix=lambda hashes: found)
        prefix = cache.load(PROMPT)
        assert prefix.tokens == 24
        assert_is_prefix(prefix.layers, PROMPT, 24)
        assert cache.counters.lost == 4


# A request goes on without the cache.


class Wrapper:
    """A service with some of its methods replaced."""

    def __init__(self, service: object, **methods: Any) -> None:
        self._service = service
        self.__dict__.update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._service, name)


def failing(*_: object) -> Any:
    raise TaskTableFullError("full", blocks=1, capacity=1, timeout=0)


@pytest.mark.parametrize("call", ["match_prefix", "query", "create"])
def test_a_call_that_fails_is_a_miss(tmp_path: Path, call: str) -> None:
    with opened(tmp_path / "store") as (service, cache):
        cache.store(PROMPT[:20], kv_of(PROMPT))
        wait_until(lambda: not cache.pending())
        cache._service = Wrapper(service, **{call: failing})
        for _ in range(20):  # more often than there are rows: none of them may be lost
            assert cache.load(PROMPT).tokens == (20 if call == "query" else 0)
            cache.store(PROMPT, kv_of(PROMPT))
            wait_until(lambda: not cache.pending())
        assert cache.counters.errors >= 20
        cache._service = service
        cache.store(PROMPT, kv_of(PROMPT))
        wait_until(lambda: not cache.pending())
        assert_is_prefix(cache.load(PROMPT).layers, PROMPT, 40)


def test_a_load_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    with opened(tmp_path / "store") as (_, cache):
        cache.store(PROMPT, kv_of(PROMPT))
    with opened(tmp_path / "store", rows=20, run=False, patience=0.01) as (service, cache):
        assert cache.load(PROMPT).tokens == 0  # nobody reads: the workers are not started
        service.run()
        cache._patience = 30.0
        assert_is_prefix(cache.load(PROMPT).layers, PROMPT, 40)  # all rows are back


def test_rows_that_a_stopped_worker_may_write_to_are_kept_back() -> None:
    def no_answer(task: object) -> None:
        raise LockTimeoutError("stopped", what="task", timeout=10)

    tasks: list[FakeTask] = []

    def create(mode: str, hashes: Sequence[str], rows: Sequence[int]) -> FakeTask:
        given.append(list(rows))
        tasks.append(FakeTask())
        return tasks[-1]

    given: list[list[int]] = []
    service = Wrapper(None, match_prefix=len, create=create, abort=no_answer)
    kvcache = torch.zeros(16, LAYOUT.page_bytes, dtype=torch.uint8)
    cache = PrefixCache(service, LAYOUT, kvcache, MODEL, patience=0.01)  # type: ignore[arg-type]
    assert cache.load(PROMPT[:21]).tokens == 0  # five of eight rows
    assert cache.load(PROMPT[:21]).tokens == 0  # the other three
    assert cache.load(PROMPT[:21]).tokens == 0  # none is left: no task
    assert len(given) == 2
    assert not set(given[0]) & set(given[1])
    tasks[0].done.set()
    cache.load(PROMPT[:21])
    assert sorted(given[2]) == sorted(given[0])
    cache.close()


def test_a_full_queue_drops_and_does_not_wait() -> None:
    asked, go_on = threading.Event(), threading.Event()

    def slow(hashes: Sequence[str]) -> list[bool]:
        asked.set()
        go_on.wait(30)
        return [True] * len(hashes)

    kvcache = torch.zeros(4, LAYOUT.page_bytes, dtype=torch.uint8)
    service = Wrapper(None, query=slow)
    cache = PrefixCache(service, LAYOUT, kvcache, MODEL, backlog=1)  # type: ignore[arg-type]
    assert cache.store(PROMPT, kv_of(PROMPT))
    assert asked.wait(30)  # the first is in hand, so the queue has room for one
    assert cache.store(PROMPT, kv_of(PROMPT))
    assert not cache.store(PROMPT, kv_of(PROMPT))
    assert cache.counters.dropped == 10
    go_on.set()
    cache.close()
