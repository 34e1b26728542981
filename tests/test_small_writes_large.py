"""Writes that `create` makes itself in shards that are too large to be scanned meanwhile."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path

import pytest

import light_mem
from light_mem import State
from light_mem.engine import scans_ahead, small_writes
from light_mem.engine.local import LocalStorageEngine
from light_mem.index.order import EvictionOrder
from tests.conftest import threads, wait_until
from tests.engine_helpers import let_go
from tests.service_child import Child
from tests.service_rig import WAIT, Rig, rig
from tests.small_rig import at_any_speed, go_on, prepared

__all__ = ["at_any_speed"]  # a fixture

PAGE = 64
SLOTS = small_writes.MAX_SCANNED_SLOTS + 100
SCANNING = "lightmem-scan"


class Scans:
    """Notes the shards that are scanned ahead, and by which threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[int, str]] = []
        self._made = threading.Semaphore(0)
        scan = LocalStorageEngine.prepare_shard

        def noting(engine: LocalStorageEngine, shard: int) -> bool:
            found = scan(engine, shard)
            self.made.append((shard, threading.current_thread().name))
            self._made.release()
            return found

        monkeypatch.setattr(LocalStorageEngine, "prepare_shard", noting)

    def await_one(self) -> None:
        assert self._made.acquire(timeout=WAIT)


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> Scans:
    return Scans(monkeypatch)


@contextmanager
def large(tmp_path: Path, slots: int = SLOTS, shards: int = 1) -> Iterator[Rig]:
    options = {"small_write_bytes": 4 * PAGE, "small_read_bytes": 0, "pages": SLOTS}
    with rig(tmp_path, page_bytes=PAGE, slots=slots, shards=shards, **options) as r:
        prepared(r)
        yield r
        if not r.service._closed:
            assert r.service.check().clean
    let_go(r)


def create(r: Rig, key: int) -> light_mem.CacheTask:
    r.fill(key, [0])
    return r.service.create("write", [key], [0])


def finished(task: light_mem.CacheTask) -> bool:
    return task.wait(WAIT) and task.state() == [State.Finished]


def test_a_full_store_of_many_slots_gives_the_place_of_its_oldest_block(
    tmp_path: Path, scans: Scans
) -> None:
    with large(tmp_path) as r:
        r.write(range(SLOTS), range(SLOTS))
        assert r.service.query(0)  # used now
        assert scans.made == []
        assert finished(create(r, SLOTS))  # by the worker
        assert not r.service.query(1)
        scans.await_one()
        os.kill(r.service.worker_pids[0], signal.SIGSTOP)
        for key in range(SLOTS + 1, SLOTS + 50):
            assert create(r, key).ready()
        assert r.service.query([0, *range(2, 52)]) == [True] + [False] * 49 + [True]
        go_on(r)
        keys = range(SLOTS, SLOTS + 50)
        assert r.read(keys, range(50)).state() == [State.Finished] * 50
        assert all(r.holds(key, [at]) for at, key in enumerate(keys))
        assert scans.made == [(0, SCANNING)]


def test_writes_go_on_where_the_blocks_to_evict_run_low(
    tmp_path: Path, scans: Scans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are sorted out again before they are used up, and without the shard's lock."""
    monkeypatch.setattr(scans_ahead, "PART", 0)  # a loaded machine is no reason to pause
    sorted_out = threading.Semaphore(0)
    sort_out = EvictionOrder.sort_out

    def noting(order: EvictionOrder, leased: Set[int], before: int) -> bool:
        found = sort_out(order, leased, before)
        sorted_out.release()
        return found

    monkeypatch.setattr(EvictionOrder, "sort_out", noting)
    with large(tmp_path) as r:
        r.write(range(SLOTS), range(SLOTS))
        assert finished(create(r, SLOTS))
        scans.await_one()
        assert sorted_out.acquire(timeout=WAIT)
        os.kill(r.service.worker_pids[0], signal.SIGSTOP)
        key = SLOTS
        for _ in range(3):
            while not sorted_out.acquire(blocking=False):
                key += 1
                assert create(r, key).ready()
        assert SLOTS + 3000 < key < SLOTS + 8000
        assert len(scans.made) == 1
        go_on(r)


def test_what_only_workers_write_to_is_never_scanned(tmp_path: Path, scans: Scans) -> None:
    with large(tmp_path) as r:
        for first in range(0, 3 * SLOTS, SLOTS):
            r.write(range(first, first + SLOTS), range(SLOTS))
        assert r.service.query(2 * SLOTS)
        assert scans.made == []
        assert threads(SCANNING) == 1


def test_small_shards_have_no_thread_for_it(tmp_path: Path, scans: Scans) -> None:
    with large(tmp_path, slots=64) as r:
        assert finished(create(r, 1))
        assert threads(SCANNING) == 0
        assert scans.made == []


@pytest.mark.parametrize("how", ["close", "end_workers"])
def test_its_thread_ends_with_the_service(tmp_path: Path, scans: Scans, how: str) -> None:
    with large(tmp_path) as r:
        wait_until(lambda: threads(SCANNING) == 1)
        assert finished(create(r, 1))
        scans.await_one()
        getattr(r.service, how)()
        assert threads(SCANNING) == 0


def test_a_closing_service_waits_for_a_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on_then = threading.Event(), threading.Event()
    scan = LocalStorageEngine.prepare_shard

    def slow(engine: LocalStorageEngine, shard: int) -> bool:
        begun.set()
        assert go_on_then.wait(WAIT)
        return scan(engine, shard)

    monkeypatch.setattr(LocalStorageEngine, "prepare_shard", slow)
    with large(tmp_path) as r:
        assert finished(create(r, 1))
        assert begun.wait(WAIT)
        assert finished(create(r, 2))  # nobody waits for it
        closing = threading.Thread(target=r.service.close)
        closing.start()
        wait_until(lambda: r.service._small_writes._closed)
        go_on_then.set()
        closing.join(WAIT)
        assert not closing.is_alive()
        assert threads(SCANNING) == 0


FORKING = f"""
import light_mem, os, threading
from light_mem.engine.local import LocalStorageEngine
from light_mem.index.order import EvictionOrder
scanned = threading.Event()
scan = LocalStorageEngine.prepare_shard
def noting(engine, shard):
    found = scan(engine, shard)
    scanned.set()
    return found
LocalStorageEngine.prepare_shard = noting
kv = light_mem.allocate_kvcache(16, {PAGE})
size, small = {SLOTS} * {PAGE}, {PAGE}
service = light_mem.LocalCacheService(sys.argv[1], size, 1, kv, 1, small_write_bytes=small)
service.run()
key = 0
while not scanned.is_set():  # until the shard is open, the workers get them
    key += 1
    assert service.create("w", [key], [0]).wait(20)
pid = os.fork()
if not pid:
    names = [thread.name for thread in threading.enumerate()]
    service.close()
    os._exit(len(names) != 1)
_, status = os.waitpid(pid, 0)
for key in range(key + 1, key + 20):
    assert service.create("w", [key], [0]).wait(20)
say(status, "{SCANNING}" in [thread.name for thread in threading.enumerate()])
service.close()
"""


def test_a_forked_child_has_no_such_thread_and_ends_none(tmp_path: Path) -> None:
    with Child(FORKING, tmp_path / "store") as server:
        assert server.hear() == [0, True]
        assert server.end() == 0
