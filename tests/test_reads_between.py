"""Reads that come while a worker is in the middle of a batch of writes."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from light_mem import CacheTask, State
from light_mem.engine import mapped_writes, page_cache
from light_mem.engine.batch_report import BatchReport
from light_mem.engine.dirty_pages import DirtyPages
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.mapped_writes import CALLS_BEFORE, MappedWrites
from light_mem.engine.queue import WRITE_TURN
from light_mem.engine.read_ahead import ReadAhead
from light_mem.engine.table_layout import READ, WORKER, WORKING, words_of
from light_mem.engine.worker import Worker
from light_mem.errors import LockTimeoutError
from light_mem.index.keys import as_key
from light_mem.index.locks import LOCK_TIMEOUT_SECONDS, SHORT_SECONDS
from tests.engine_helpers import let_go
from tests.parts_rig import around_changes
from tests.queue_rig import Queued, queued
from tests.service_rig import Rig, rig

__all__ = ["queued"]  # a fixture

MIB = 1 << 20
OLD = ["old 0", "old 1"]
OLD_PAGES = [30, 31]
NEW = [f"new {n}" for n in range(16)]  # four looks, one each 4 MiB
NEW_PAGES = list(range(16))
NEW_BYTES = len(NEW) * MIB


@dataclass
class Between:
    """A service whose only worker is this very thread."""

    rig: Rig
    engine: LocalStorageEngine
    worker: Worker

    def do_next(self) -> None:
        self.worker.do(self.worker._queue.claim(1))

    def read_old(self) -> CacheTask:
        self.rig.blank(OLD_PAGES)
        return self.rig.service.create("read", OLD, OLD_PAGES)

    def write_new(self) -> CacheTask:
        for key, page in zip(NEW, NEW_PAGES, strict=True):
            self.rig.fill(key, [page])
        return self.rig.service.create("write", NEW, NEW_PAGES)

    def has_old(self) -> bool:
        return all(self.rig.holds(*one) for one in zip(OLD, ([p] for p in OLD_PAGES), strict=True))

    def is_stored(self, task: CacheTask) -> bool:
        """Whether all of NEW is Finished, and there."""
        if task.state() != [State.Finished] * len(NEW):
            return False
        self.rig.blank(NEW_PAGES)
        back = self.rig.service.create("read", NEW, NEW_PAGES)
        while not back.ready():
            self.do_next()
        return all(self.rig.holds(key, [page]) for key, page in zip(NEW, NEW_PAGES, strict=True))


@pytest.fixture(params=[1])
def between(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Between]:
    """Parameter: how many shards the store has."""
    shards: int = request.param
    with rig(tmp_path, pages=32, page_bytes=MIB, slots=64 * shards, shards=shards, run=False) as r:
        engine = LocalStorageEngine(tmp_path / "store", kind="worker")
        session = r.service._session
        one = Between(r, engine, Worker(1, session.table, session.queue, r.kv.numpy(), engine))
        for key, page in zip(OLD, OLD_PAGES, strict=True):
            r.fill(key, [page])
        task = r.service.create("write", OLD, OLD_PAGES)
        one.do_next()
        assert task.ready()
        yield one
        engine.close()
        let_go(engine)
        vars(one).clear()


def at_each_look(
    between: Between, monkeypatch: pytest.MonkeyPatch, before: Callable[[], object]
) -> None:
    """Call `before` whenever the worker looks for reads in the middle of a batch of writes."""
    queue = between.worker._queue
    look = queue.claim_between

    def claim_between(worker: int, timeout: float | None = None) -> list[int]:
        before()
        return look(worker, timeout)

    monkeypatch.setattr(queue, "claim_between", claim_between)


def wait_for_the_device(patch: pytest.MonkeyPatch, has_landed: Callable[[], bool]) -> None:
    """All blocks that are read wait for a device, which has given them when `has_landed` says."""
    patch.setattr(page_cache, "hold_each", lambda addresses: [False] * len(addresses))
    patch.setattr(ReadAhead, "has_landed", property(lambda _: has_landed()))


def test_they_are_done_before_the_writes_have_ended(
    between: Between, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[CacheTask] = []
    seen: list[tuple[bool, bool]] = []

    def before() -> None:
        if not reads:
            reads.append(between.read_old())
        else:
            seen.append((reads[0].ready(), writes.data_safe()))

    at_each_look(between, monkeypatch, before)
    writes = between.write_new()
    between.do_next()
    assert len(seen) >= 2
    assert seen == [(True, False)] * len(seen)
    assert reads[0].state() == [State.Finished] * 2
    assert between.has_old()
    assert between.is_stored(writes)


def test_what_waits_for_a_device_is_begun_and_nobody_waits_for_it_with_slots_in_hand(
    between: Between, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for_the_device(monkeypatch, lambda: False)
    reads: list[CacheTask] = []
    begun: list[bool] = []

    def before() -> None:
        begun.append(between.engine.has_begun_reads)
        reads.append(between.read_old())  # another one at each look, if there were more

    at_each_look(between, monkeypatch, before)
    writes = between.write_new()
    between.do_next()
    assert begun == [False]  # it is not asked again while one is begun
    assert writes.ready()
    assert not reads[0].ready()
    assert between.engine.has_begun_reads
    assert between.engine.finish_reads()
    assert reads[0].state() == [State.Finished] * 2
    assert between.has_old()
    monkeypatch.undo()
    assert between.is_stored(writes)


def test_what_was_begun_is_read_once_the_device_has_given_it(
    between: Between, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[CacheTask] = []
    seen: list[tuple[bool, bool]] = []
    looks = 0

    def has_landed() -> bool:
        nonlocal looks
        looks += 1
        seen.append((reads[0].ready(), writes.data_safe()))
        return looks == 2

    def before() -> None:
        if not reads:
            reads.append(between.read_old())
        else:
            seen.append((reads[0].ready(), writes.data_safe()))

    wait_for_the_device(monkeypatch, has_landed)
    at_each_look(between, monkeypatch, before)
    writes = between.write_new()
    between.do_next()
    # Twice it is asked for, then it is read, and others may be.
    assert seen[:3] == [(False, False), (False, False), (True, False)]
    assert looks == 2
    assert reads[0].state() == [State.Finished] * 2
    assert between.has_old()
    monkeypatch.undo()
    assert between.is_stored(writes)


@pytest.mark.parametrize("between", [2], indirect=True)
def test_what_was_begun_waits_for_no_lock_that_the_writes_wait_for(
    between: Between, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder of one shard's lock is stopped when a batch for both shards is written."""
    wait_for_the_device(monkeypatch, lambda: False)
    reads: list[CacheTask] = []
    waited: list[tuple[int, bool]] = []  # at each long wait: how many reads, whether all are ready
    given: set[int] = set()

    def begin() -> None:
        if not reads:
            reads.append(between.read_old())

    def refuse(shard: int, timeout: float) -> None:
        if given - {shard}:  # the shard that comes second
            if timeout >= LOCK_TIMEOUT_SECONDS:
                waited.append((len(reads), all(read.ready() for read in reads)))
            raise LockTimeoutError("held", path=str(shard), timeout=timeout)
        given.add(shard)

    at_each_look(between, monkeypatch, begin)
    around_changes(between.engine, monkeypatch, refuse)
    writes = between.write_new()
    between.do_next()
    assert writes.ready()
    assert waited == [(1, True)]
    assert between.has_old()


def test_they_do_not_keep_the_writes_from_going_on(
    between: Between, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[CacheTask] = []

    def before() -> None:
        reads.append(between.read_old())

    at_each_look(between, monkeypatch, before)
    writes = between.write_new()
    between.do_next()
    assert len(reads) > WRITE_TURN - 1
    assert writes.ready()
    assert [read.ready() for read in reads] == [n < WRITE_TURN - 1 for n in range(len(reads))]
    monkeypatch.undo()
    assert between.is_stored(writes)
    assert all(read.count(State.Finished) == 2 for read in reads)


def test_damage_is_not_waited_with_for_a_lock(
    between: Between, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock's holder is stopped: the block stays listed, and the writes go on."""
    reads: list[CacheTask] = []
    timeouts: list[float] = []
    ends: list[bool] = []

    def before() -> None:
        ends.append(bool(reads))
        if not reads:
            reads.append(between.read_old())

    def refuse(shard: int, timeout: float) -> None:
        if ends == [False]:  # from the first look to the second
            timeouts.append(timeout)
            raise LockTimeoutError("held", path=str(shard), timeout=timeout)

    for entry in between.engine.lookup.find_each([as_key(key) for key in OLD]):
        between.engine.file(0).bytes(entry, 1)[7] ^= 1
    at_each_look(between, monkeypatch, before)
    around_changes(between.engine, monkeypatch, refuse)
    writes = between.write_new()
    between.do_next()
    assert timeouts == [SHORT_SECONDS] * 2
    assert reads[0].state() == [State.Aborted] * 2
    monkeypatch.undo()
    assert between.is_stored(writes)


def test_writes_that_are_aborted_meanwhile_end_and_the_reads_do_not(
    between: Between, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[CacheTask] = []

    def before() -> None:
        if not reads:
            reads.append(between.read_old())
            # What `abort` does, but for waiting until this very worker has let go.
            session = between.rig.service._session
            session.table.rows["abort"][writes._row] = 1

    at_each_look(between, monkeypatch, before)
    writes = between.write_new()
    between.do_next()
    assert writes.state() == [State.Aborted] * len(NEW)
    assert reads[0].state() == [State.Finished] * 2
    assert between.has_old()
    assert between.rig.service.query(NEW) == [False] * len(NEW)
    again = between.write_new()
    between.do_next()
    assert between.is_stored(again)


def test_a_queue_that_is_not_free_is_asked_again(
    between: Between, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[CacheTask] = []

    def before() -> None:
        if not reads:
            reads.append(between.read_old())
            raise LockTimeoutError("not free", path="table", byte=0, timeout=0.01)
        assert reads[0].state() != [State.Finished] * 2 or len(reads) > 1
        reads.append(reads[0])

    at_each_look(between, monkeypatch, before)
    writes = between.write_new()
    between.do_next()
    assert reads[0].ready()
    assert between.is_stored(writes)


def test_their_time_is_not_that_of_the_writes(
    between: Between, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[CacheTask] = []
    laps: list[str] = []  # whose time ends
    count, begin_read = BatchReport.count, between.engine.begin_read

    def counted(self: BatchReport) -> None:
        laps.append("read" if self._time_word == words_of(WORKER)["read_ns"] else "write")
        count(self)

    def begun(*arguments: Any) -> None:
        laps.append("begin")
        begin_read(*arguments)

    def before() -> None:
        if not reads:
            reads.append(between.read_old())

    monkeypatch.setattr(BatchReport, "count", counted)
    monkeypatch.setattr(between.engine, "begin_read", begun)
    at_each_look(between, monkeypatch, before)
    between.write_new()
    between.do_next()
    assert laps == ["write", "begin", "read", "write"]


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux's page faults")
def test_their_page_faults_are_not_those_of_the_writes(
    between: Between, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker learns by those whether it pays to store to the mapping."""
    reads: list[CacheTask] = []
    faults = 0
    taken_out: list[int] = []

    def before() -> None:
        nonlocal faults
        if writes._taken_out:
            taken_out.append(writes._taken_out)
            reads.append(between.read_old())
            faults += NEW_BYTES // mmap.PAGESIZE

    at_each_look(between, monkeypatch, before)
    monkeypatch.setattr(mapped_writes, "_faults", lambda: faults)
    monkeypatch.setattr(DirtyPages, "_are_dirty", lambda *_: True)
    writes: MappedWrites = between.engine.file(0)._writes
    for _ in range(CALLS_BEFORE + 1):
        task = between.write_new()
        between.do_next()
        assert task.ready()
        between.rig.service.delete(NEW)
    assert reads[0].ready()
    assert taken_out[0] == NEW_BYTES
    assert writes.calls_before == CALLS_BEFORE


# --- the queue ------------------------------------------------------------------------------------


def test_only_reads_are_claimed_between_and_a_few_times_a_batch_of_writes(queued: Queued) -> None:
    writes = queued.push([0] * 100)
    assert queued.queue.claim_between(1) == []
    reads = queued.push([0] * 1000, READ, first=1000)
    for _ in range(2):
        claimed = 0
        while cells := queued.queue.claim_between(1):
            assert set(cells) <= set(reads)
            assert (queued.table.states[cells] == WORKING).all()
            claimed += 1
        assert claimed == WRITE_TURN - 1
        while not set(queued.queue.claim(1)) <= set(writes):
            pass


def test_what_was_claimed_between_counts_where_reads_and_writes_take_turns(queued: Queued) -> None:
    writes = queued.push([0] * 400)
    queued.push([0] * 2000, READ, first=1000)
    kinds = ""
    while len(kinds) < 15:
        if set(queued.queue.claim(1)) <= set(writes):
            kinds += "w"
            while queued.queue.claim_between(1):
                kinds += "r"
        else:
            kinds += "r"
    assert kinds[2:14] == "wrr" * 4
