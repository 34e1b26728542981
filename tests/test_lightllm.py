"""LightLLM's calling pattern on System V shared memory: counts, prefixes, 500 threads, restarts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.compat_service import cumulative, some_tokens
from tests.conftest import wait_until
from tests.lightllm_caller import MAX_WRITES, Caller
from tests.lightllm_child import PROMPT
from tests.lightllm_memory import CpuCache, remove_segment

ROOT = Path(__file__).parent.parent
CHECKOUT = os.environ.get("LIGHTLLM_CHECKOUT", "")
LARGE, SMALL = 256 << 10, 2 << 10  # bytes a page: 4 and 64 pages a block
STORAGE = 64 << 20

Start = Callable[..., Caller]


@pytest.fixture(autouse=True)
def _blocks_of_one_megabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTMEM_MAX_BLOCK_SIZE_MB", "1")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Makes servers on one directory, each with a segment of its own."""
    callers: list[Caller] = []

    def make(page_bytes: int = LARGE, pages: int = 48, workers: int = 2) -> Caller:
        cache = CpuCache(pages, page_bytes)
        try:
            callers.append(Caller(cache, tmp_path, STORAGE, workers))
        finally:
            if not callers or callers[-1].cache is not cache:
                cache.segment.remove()
        return callers[-1]

    yield make
    for caller in callers:
        caller.close()
        caller.cache.segment.remove()
        vars(caller).clear()  # pytest keeps the fixture's value


def prompt(length: int, seed: int = 0) -> list[int]:
    return cumulative(some_tokens(length, seed))


def stored(caller: Caller, hashs: list[int], pages: list[int]) -> None:
    """Fill, persist, and wait until all is written."""
    caller.cache.fill(hashs, pages)
    caller.cache.hold(hashs, pages)
    caller.persist(hashs, pages)
    wait_until(lambda: not caller.service.active_threads("w"))


@pytest.mark.parametrize(("page_bytes", "n"), [(LARGE, 4), (SMALL, 64)])
def test_pages_come_back_from_disk_and_each_is_let_go_once(
    start: Start, page_bytes: int, n: int
) -> None:
    caller = start(page_bytes, pages=2 * (2 * n + 3))
    assert caller.service._n == n
    hashs = prompt(2 * n + 3)
    there = list(range(len(hashs)))
    elsewhere = [page + len(hashs) for page in reversed(there)]
    stored(caller, hashs, there)
    assert caller.cache.users() == 0
    caller.cache.wipe()
    assert caller.loadable(hashs, 0) == len(hashs)
    assert caller.load(hashs, elsewhere)
    assert caller.cache.holds(hashs, elsewhere)
    assert caller.cache.wiped(there)


def test_a_stored_prefix_is_let_go_at_once_and_the_rest_when_it_is_copied(start: Start) -> None:
    caller = start()
    hashs, pages = prompt(10), list(range(20, 30))
    stored(caller, hashs[:8], pages[:8])
    caller.cache.fill(hashs, pages)
    caller.cache.hold(hashs, pages)
    workers = caller.service.service.worker_pids
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        try:
            writing = pool.submit(caller.persist, hashs, pages)
            wait_until(lambda: caller.cache.users() == 2)
            assert not writing.done()
            held = [p for p in pages if caller.cache.page_items.linked_items[p].ref_count]
            assert held == pages[8:]
        finally:
            for pid in workers:
                os.kill(pid, signal.SIGCONT)
        writing.result(30)
    assert caller.cache.users() == 0
    caller.cache.wipe()
    assert caller.load(hashs, pages)
    assert caller.cache.holds(hashs, pages)


def test_a_prompt_that_is_stored_is_let_go_without_a_task(start: Start) -> None:
    caller = start()
    hashs, pages = prompt(6), list(range(6))
    stored(caller, hashs, pages)
    tasks = caller.service.service.stats()["write_tasks"]
    stored(caller, hashs, pages)
    assert caller.cache.users() == 0
    assert caller.service.service.stats()["write_tasks"] == tasks


def test_loadable_pages_end_at_the_first_block_that_is_missing(start: Start) -> None:
    caller = start()
    hashs = prompt(18)
    stored(caller, hashs, list(range(18)))
    assert [caller.loadable(hashs, at) for at in (0, 3, 4, 17)] == [18, 15, 14, 1]
    caller.service.service.delete(hashs[11])  # the block of pages 8 to 11
    assert [caller.loadable(hashs, at) for at in (0, 5, 8, 12)] == [8, 3, 0, 6]
    longer = hashs + prompt(4, seed=1)
    assert caller.loadable(longer, 12) == 4  # the short block's place holds another, full one


def test_a_load_from_a_position_fills_from_its_block_on(start: Start) -> None:
    caller = start()
    hashs, pages = prompt(11), list(range(30, 41))
    stored(caller, hashs, pages)
    caller.cache.wipe()
    assert caller.load(hashs, pages, start=6)
    assert caller.cache.wiped(pages[:4])
    assert caller.cache.holds(hashs[4:], pages[4:])


def test_a_load_that_ends_inside_a_block_fails_and_leaves_those_pages(start: Start) -> None:
    """Fewer pages could be had than were asked for: the last block's hash is not stored then."""
    caller = start()
    hashs, pages = prompt(8), list(range(8))
    stored(caller, hashs, pages)
    caller.cache.wipe()
    assert not caller.load(hashs[:6], pages[:6])
    assert caller.cache.holds(hashs[:4], pages[:4])
    assert caller.cache.wiped(pages[4:])


def test_writes_wait_while_reads_and_eight_writes_are_under_way(start: Start) -> None:
    caller = start(SMALL, pages=64)
    stored(caller, prompt(1), [0])
    workers = caller.service.service.worker_pids
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(MAX_WRITES + 3) as pool:
        try:
            reading = pool.submit(caller.load, prompt(1), [63])
            wait_until(lambda: caller.service.active_threads("r") == 1)
            writing = []
            for at in range(1, MAX_WRITES + 3):
                caller.cache.fill(prompt(1, at), [at])
                caller.cache.hold(prompt(1, at), [at])
                writing.append(pool.submit(caller.persist, prompt(1, at), [at]))
                active = min(at, MAX_WRITES)
                wait_until(lambda active=active: caller.service.active_threads("w") == active)
            wait_until(lambda: caller.throttled > 20)
            assert caller.service.active_threads("w") == MAX_WRITES
        finally:
            for pid in workers:
                os.kill(pid, signal.SIGCONT)
        assert reading.result(30)
        for future in writing:
            future.result(30)
    assert caller.cache.users() == 0


def test_five_hundred_threads_poll_and_load_their_own_prompts(start: Start) -> None:
    threads, length = 500, 3
    caller = start(SMALL, pages=threads * length, workers=24)
    prompts = [prompt(length, seed) for seed in range(threads)]
    rows = [list(range(at * length, (at + 1) * length)) for at in range(threads)]
    for pair in zip(prompts, rows, strict=True):
        caller.cache.fill(*pair)
        caller.cache.hold(*pair)
    workers = caller.service.service.worker_pids
    assert len(workers) == 24
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(caller.persist, prompts, rows))
        wait_until(lambda: not caller.service.active_threads("w"), 60)
        assert caller.cache.users() == 0
        caller.cache.wipe()
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        try:
            loads = [pool.submit(caller.load, *pair) for pair in zip(prompts, rows, strict=True)]
            wait_until(lambda: caller.service.active_threads("r") == threads, 60)
        finally:
            for pid in workers:
                os.kill(pid, signal.SIGCONT)
        assert all(load.result(60) for load in loads)
    assert all(caller.cache.holds(*pair) for pair in zip(prompts, rows, strict=True))
    assert caller.service.active_threads("r") == 0


def test_a_restart_finds_the_blocks_in_another_segment(start: Start) -> None:
    first = start()
    hashs = prompt(9)
    stored(first, hashs, list(range(9)))
    first.close()
    second = start()
    pages = list(range(39, 48))
    assert second.loadable(hashs, 0) == 9
    assert second.load(hashs, pages)
    assert second.cache.holds(hashs, pages)


def test_what_a_killed_server_had_stored_is_loaded_by_the_next(
    start: Start, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.lightllm_child", str(tmp_path), str(LARGE)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        shmid = int(child.stdout.readline())
        child.kill()
    remove_segment(shmid)
    caller = start()
    pages = list(range(5, 5 + len(PROMPT)))
    assert caller.loadable(PROMPT, 0) == len(PROMPT)
    assert caller.load(PROMPT, pages)
    assert caller.cache.holds(PROMPT, pages)


def test_another_page_size_is_refused_and_loses_nothing(start: Start) -> None:
    first = start()
    hashs = prompt(9)
    stored(first, hashs, list(range(9)))
    first.close()
    with pytest.raises(ValueError, match="page_bytes"):
        start(SMALL)
    assert start().load(hashs, list(range(9)))


@pytest.mark.skipif(not CHECKOUT, reason="LIGHTLLM_CHECKOUT names no checkout of LightLLM")
def test_the_real_disk_cache_worker_persists_and_loads() -> None:
    command = [sys.executable, str(ROOT / "tools" / "run_lightllm_worker.py"), CHECKOUT]
    result = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAIL" not in result.stdout
    assert result.stdout.count("PASS") >= 10
