"""Short reads of what lies in the page cache: `create` makes them itself."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import light_mem
from light_mem import InvalidArgumentError, LocalCacheService, ServiceClosedError, State
from light_mem.engine import small_reads
from tests.cached import can_forget, forget, forget_all
from tests.engine_helpers import let_go
from tests.service_rig import WAIT, Rig, rig

PAGE = 4096
LIMIT = 4 * PAGE

pytestmark = pytest.mark.skipif(not small_reads.SUPPORTED, reason="no preadv with RWF_NOWAIT here")


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[Rig]:
    """A service with blocks 0 to 15 stored, whose only worker is then stopped: it reads nothing."""
    with rig(tmp_path, page_bytes=PAGE, small_read_bytes=LIMIT) as r:
        r.write(range(16), range(16))
        (worker,) = r.service.worker_pids
        os.kill(worker, signal.SIGSTOP)
        yield r
        with suppress(ProcessLookupError):  # the test has ended it
            os.kill(worker, signal.SIGCONT)
    let_go(r)


def go_on(r: Rig) -> None:
    os.kill(r.service.worker_pids[0], signal.SIGCONT)


def data_file(r: Rig) -> Path:
    return Path(r.service._engine.directory) / "shard-000.data"


@pytest.mark.parametrize("pages", [[20], [20, 21], [23, 20, 31, 16]])
def test_a_short_read_is_ready_when_create_returns(stored: Rig, pages: list[int]) -> None:
    stored.blank(pages)
    before = stored.service.stats()
    task = stored.service.create("read", list(range(len(pages))), pages)
    assert task.ready()
    assert task.data_safe()
    assert task.state() == [State.Finished] * len(pages)
    assert [block.pages for block in task.blocks] == [(page,) for page in pages]
    assert pickle.loads(pickle.dumps(task)).state() == task.state()
    for key, page in enumerate(pages):
        assert stored.holds(key, [page])
    numbers = stored.service.stats()
    assert numbers["blocks_read"] - before["blocks_read"] == len(pages)
    assert numbers["bytes_read"] - before["bytes_read"] == len(pages) * PAGE
    assert numbers["read_tasks"] - before["read_tasks"] == 1
    assert numbers["read_latency"]["count"] - before["read_latency"]["count"] == 1
    assert numbers["read_ns"] > before["read_ns"]
    assert numbers["active_read_tasks"] == 0


def test_what_is_longer_than_the_limit_is_left_to_the_workers(stored: Rig) -> None:
    task = stored.service.create("read", list(range(5)), list(range(20, 25)))
    assert not task.ready()
    go_on(stored)
    assert task.wait(WAIT)
    assert all(stored.holds(n, [20 + n]) for n in range(5))


def test_more_than_a_few_blocks_are_left_to_the_workers(stored: Rig) -> None:
    regions = [(20 * PAGE + 200 * n, 100) for n in range(5)]
    go_on(stored)
    names = [f"short {n}" for n in range(5)]
    assert stored.service.create_regions("write", names, regions).wait(WAIT)
    os.kill(stored.service.worker_pids[0], signal.SIGSTOP)
    assert stored.service.create_regions("read", names[:4], regions[:4]).ready()
    task = stored.service.create_regions("read", names, regions)
    assert not task.ready()
    go_on(stored)
    assert task.wait(WAIT)
    assert task.state() == [State.Finished] * 5


def test_what_is_not_in_the_page_cache_is_left_to_the_workers(stored: Rig, tmp_path: Path) -> None:
    if not can_forget(tmp_path):
        pytest.skip("this file system drops no pages")
    forget_all(data_file(stored))
    task = stored.service.create("read", [3], [20])
    assert not task.ready()
    go_on(stored)
    assert task.wait(WAIT)
    assert stored.holds(3, [20])


def test_what_is_not_in_the_page_cache_is_not_even_begun_to_be_read(
    stored: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_forget(tmp_path):
        pytest.skip("this file system drops no pages")
    asked: list[int] = []
    preadv = os.preadv

    def recorded(descriptor: int, buffers: list[memoryview], at: int, flags: int) -> int:
        asked.append(at)
        return preadv(descriptor, buffers, at, flags)

    monkeypatch.setattr(os, "preadv", recorded)
    assert stored.service.create("read", [3], [20]).ready()
    assert len(asked) == 1
    forget(data_file(stored))
    # The kernel would begin to read it ahead, and wait in there where the device's queue is full.
    task = stored.service.create("read", [3], [21])
    assert not task.ready()
    assert len(asked) == 1
    go_on(stored)
    assert task.wait(WAIT)
    assert stored.holds(3, [21])


def test_one_missing_block_leaves_the_others_to_the_workers(stored: Rig) -> None:
    stored.blank([20, 21])
    task = stored.service.create("read", [3, 99], [20, 21])
    assert task.state()[1] is State.Aborted
    assert stored.is_blank([21])
    go_on(stored)
    assert task.wait(WAIT)
    assert task.state() == [State.Finished, State.Aborted]
    assert stored.holds(3, [20])


def test_a_damaged_block_is_found_damaged_by_a_worker(stored: Rig) -> None:
    with data_file(stored).open("r+b") as file:
        whole = file.read()
        wanted = stored.kv[5].numpy().tobytes()
        file.seek(whole.index(wanted) + 100)
        file.write(bytes([wanted[100] ^ 1]))
    task = stored.service.create("read", [5], [20])
    assert not task.ready()
    go_on(stored)
    assert task.wait(WAIT)
    assert task.state() == [State.Aborted]
    assert stored.service.stats()["damaged"] == 1
    assert not stored.service.query(5)


def test_without_verification_damage_is_not_looked_for(tmp_path: Path) -> None:
    with rig(tmp_path, page_bytes=PAGE, small_read_bytes=LIMIT, verify=False) as r:
        r.write([5], [0])
        with data_file(r).open("r+b") as file:
            at = file.read().index(r.kv[0].numpy().tobytes())
            file.seek(at)
            file.write(bytes(8))
        task = r.service.create("read", [5], [1])
        assert task.state() == [State.Finished]
        assert not r.kv[1, :8].any()
        assert bool((r.kv[1, 8:] == r.kv[0, 8:]).all())
    let_go(r)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("page_bytes", [4096, 3840, 520])
def test_a_block_of_small_pages_is_believed_before_its_pages_are_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page_bytes: int, verify: bool
) -> None:
    pages = [20, 3, 31, 0, 17, 9, 26]
    options = {"page_bytes": page_bytes, "small_read_bytes": 1 << 20, "verify": verify}
    with rig(tmp_path, **options) as r:
        for key in (5, 6):
            r.fill(key, pages)
            assert r.service.create("write", [key], pages).wait(WAIT)
        (worker,) = r.service.worker_pids
        os.kill(worker, signal.SIGSTOP)
        elsewhere = [1, 30, 2, 28, 4, 22, 6]
        others = sorted(set(range(32)) - set(elsewhere))
        r.blank(range(32))
        assert r.service.create("read", [5], elsewhere).state() == [State.Finished]
        assert r.holds(5, elsewhere)
        assert r.is_blank(others)
        # A byte of the last page is not what was written.
        with data_file(r).open("r+b") as file:
            r.fill(6, pages)
            last = r.kv[pages[-1]].numpy().tobytes()
            at = file.read().index(last) + page_bytes - 1
            file.seek(at)
            file.write(bytes([last[-1] ^ 1]))
        r.blank(range(32))
        damaged = r.service.create("read", [6], elsewhere)
        assert damaged.ready() == (not verify)
        assert r.is_blank(range(32)) == verify
        # Evicted while it was read.
        with monkeypatch.context() as patch:
            patch.setattr(r.service._engine.lookup, "is_unchanged", lambda _: False)
            r.blank(range(32))
            gone = r.service.create("read", [5], elsewhere)
        assert not gone.ready()
        assert r.is_blank(range(32))
        os.kill(worker, signal.SIGCONT)
        assert gone.wait(WAIT)
        assert damaged.wait(WAIT)
        assert damaged.state() == [State.Aborted if verify else State.Finished]
        assert r.service.stats()["damaged"] == verify
        scatterer = r.service._small_reads._scatterer
        assert scatterer._views is not None
    assert scatterer._views is None  # a closed service lets go of the KV memory
    let_go(r)


def test_a_block_of_another_length_is_missing(stored: Rig) -> None:
    task = stored.service.create_regions("read", [3], [(20 * PAGE, 100)])
    go_on(stored)
    assert task.wait(WAIT)
    assert task.state() == [State.Aborted]


def test_regions_and_blocks_in_several_runs_come_back_byte_by_byte(tmp_path: Path) -> None:
    with rig(tmp_path, pages=64, page_bytes=PAGE, slots=64, small_read_bytes=1 << 20) as r:
        # Of 64 one-page blocks every second goes: what is longer then lies in several runs.
        r.write(range(64), range(64))
        assert r.service.delete(list(range(0, 64, 2))) == 32
        long = [(5, 3 * PAGE + 17), (5 * PAGE, 2 * PAGE)]
        rng = np.random.default_rng(1)
        memory = r.kv.reshape(-1).numpy()
        memory[:] = rng.integers(0, 256, len(memory), np.uint8)
        expected = np.concatenate([memory[a : a + n].copy() for a, n in long])
        task = r.service.create_regions("write", ["long"], [long])
        assert task.wait(WAIT)
        assert task.state() == [State.Finished]
        entry = r.service._engine.lookup.find_one(*light_mem.index.keys.as_key("long"))
        assert entry >= 0
        where = r.service._engine.lookup.locate(entry, *light_mem.index.keys.as_key("long"))
        assert where is not None
        assert len(where.runs) > 1
        (worker,) = r.service.worker_pids
        os.kill(worker, signal.SIGSTOP)
        try:
            elsewhere = [(40 * PAGE + 1, 3 * PAGE + 17 + 100), (50 * PAGE, 2 * PAGE - 100)]
            task = r.service.create_regions("read", ["long"], [elsewhere])
            assert task.ready()
        finally:
            os.kill(worker, signal.SIGCONT)
        found = np.concatenate([memory[a : a + n] for a, n in elsewhere])
        assert np.array_equal(found, expected)
        del memory
    let_go(r)


def test_a_read_counts_as_use_for_eviction(tmp_path: Path) -> None:
    with rig(tmp_path, page_bytes=PAGE, slots=64, small_read_bytes=LIMIT, pages=64) as r:
        r.write(range(64), range(64))
        (worker,) = r.service.worker_pids
        os.kill(worker, signal.SIGSTOP)
        assert r.service.create("read", [0], [1]).ready()
        os.kill(worker, signal.SIGCONT)
        r.write(["one more"], [2])
        assert r.service.query(0)
        assert not r.service.query(1)
    let_go(r)


@pytest.mark.parametrize("options", [{"small_read_bytes": 0}, {"page_cache": "drop"}])
def test_it_can_be_turned_off(tmp_path: Path, options: dict[str, object]) -> None:
    with rig(tmp_path, page_bytes=PAGE, **{"small_read_bytes": LIMIT, **options}) as r:
        r.write([1], [0])
        (worker,) = r.service.worker_pids
        os.kill(worker, signal.SIGSTOP)
        task = r.service.create("read", [1], [20])
        assert not task.ready()
        os.kill(worker, signal.SIGCONT)
        assert task.wait(WAIT)
        assert r.holds(1, [20])
    let_go(r)


def test_before_run_and_through_a_client_the_workers_read(tmp_path: Path) -> None:
    with rig(tmp_path, page_bytes=PAGE, small_read_bytes=LIMIT) as r:
        r.write([1], [0])
        client = r.service.client()
        (worker,) = r.service.worker_pids
        os.kill(worker, signal.SIGSTOP)
        task = client.create("read", [1], [20])  # it has no KV tensor
        assert not task.ready()
        os.kill(worker, signal.SIGCONT)
        assert task.wait(WAIT)
        client.close()
    with rig(tmp_path, page_bytes=PAGE, small_read_bytes=LIMIT, run=False) as r:
        task = r.service.create("read", [1], [20])
        assert not task.ready()
        r.service.run()
        assert task.wait(WAIT)
        assert r.holds(1, [20])
    let_go(r)


def test_the_environment_gives_the_limit_that_no_argument_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = light_mem.allocate_kvcache(8, PAGE)
    for text in ("-1", "much", "1.5"):
        monkeypatch.setenv("LIGHTMEM_SMALL_READ_BYTES", text)
        with pytest.raises(InvalidArgumentError, match="LIGHTMEM_SMALL_READ_BYTES.*" + text):
            LocalCacheService(tmp_path / "s", 1 << 20, 1, kv, 1)
    for wrong in (-1, 1.5, "much"):
        with pytest.raises(InvalidArgumentError, match="small_read_bytes"):
            LocalCacheService(tmp_path / "s", 1 << 20, 1, kv, 1, small_read_bytes=wrong)  # type: ignore[arg-type]
    monkeypatch.setenv("LIGHTMEM_SMALL_READ_BYTES", str(PAGE))
    with rig(tmp_path, page_bytes=PAGE) as r:
        r.write([1, 2], [0, 1])
        (worker,) = r.service.worker_pids
        os.kill(worker, signal.SIGSTOP)
        assert r.service.create("read", [1], [20]).ready()
        assert not (two := r.service.create("read", [1, 2], [21, 22])).ready()
        os.kill(worker, signal.SIGCONT)
        assert two.wait(WAIT)
    let_go(r)


def test_a_file_cut_short_is_no_bus_error(stored: Rig) -> None:
    os.truncate(data_file(stored), 1 << 14)
    try:
        entries = stored.service.query(list(range(16)))
        assert all(entries)
        task = stored.service.create("read", [15], [20])
        assert not task.ready()
        stored.service.abort(task)
        assert task.state() == [State.Aborted]
    finally:
        os.truncate(data_file(stored), 2 << 20)


def test_nothing_is_read_once_the_workers_are_ended(stored: Rig) -> None:
    go_on(stored)
    stored.service.end_workers()
    with pytest.raises(ServiceClosedError):
        stored.service.create("read", [1], [20])
    assert not stored.service._small_reads.read([])


def test_a_read_in_whose_middle_its_thread_closes_the_service_ends_and_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome: list[object] = []
    with rig(tmp_path, page_bytes=PAGE, small_read_bytes=LIMIT, verify=False) as r:
        r.write([1], [0])
        preadv = os.preadv

        def closing(*arguments: int) -> int:  # as the handler of a signal would
            done = preadv(*arguments)  # type: ignore[call-arg, arg-type]
            r.service.close()
            return done

        def read() -> None:
            try:
                outcome.append(r.service.create("read", [1], [20]))
            except ServiceClosedError as error:
                outcome.append(error)

        monkeypatch.setattr(os, "preadv", closing)
        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        thread.join(WAIT)
        assert not thread.is_alive()
        assert isinstance(outcome[0], ServiceClosedError)
    let_go(r)


def test_a_read_of_nothing_counts_as_a_task_that_took_no_time(stored: Rig) -> None:
    before = stored.service.stats(ages=False)
    assert stored.service.create("read", [], []).ready()
    numbers = stored.service.stats(ages=False)
    assert numbers["read_tasks"] - before["read_tasks"] == 1
    assert numbers["read_latency"] == before["read_latency"]
    assert numbers["read_ns"] == before["read_ns"]


def test_threads_that_read_against_eviction_never_believe_wrong_bytes(tmp_path: Path) -> None:
    readers, enough, keys = 4, 200, 96
    with rig(tmp_path, pages=64, page_bytes=PAGE, slots=64, small_read_bytes=LIMIT) as r:
        wrong: list[str] = []
        finished = [0] * readers
        churned = threading.Event()
        stop = threading.Event()

        def read(mine: int) -> None:
            page = 32 + mine
            rng = np.random.default_rng(mine)
            deadline = time.monotonic() + WAIT
            while not (finished[mine] >= enough and churned.is_set()) and not wrong:
                assert time.monotonic() < deadline
                key = int(rng.integers(keys))
                task = r.service.create("read", [key], [page])
                if not task.wait(WAIT):
                    wrong.append(f"{key} hangs")
                elif task.state() == [State.Finished]:
                    finished[mine] += 1
                    if not r.holds(key, [page]):
                        wrong.append(f"{key} has other bytes")
                        return

        def write() -> None:
            rng = np.random.default_rng(99)
            while not stop.is_set():
                chosen = rng.choice(keys, 8, replace=False).tolist()
                for page, key in enumerate(chosen):
                    r.fill(key, [page])
                r.service.create("write", chosen, list(range(8))).wait(WAIT)
                if r.service.stats(ages=False)["evictions"] > 50:
                    churned.set()

        writer = threading.Thread(target=write)
        threads = [threading.Thread(target=read, args=(n,)) for n in range(readers)]
        writer.start()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stop.set()
        writer.join()
        assert not wrong
        assert min(finished) >= enough
        assert churned.is_set()
    let_go(r)
