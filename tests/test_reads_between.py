"""Reads that come while a worker is in the middle of a batch of writes."""

from __future__ import annotations

from typing import Any

import pytest

from light_mem import CacheTask, State
from light_mem.engine.base import BlockIO
from light_mem.engine.batch_report import BatchReport
from light_mem.engine.claiming import BATCH_BYTES, LEAST_BYTES
from light_mem.engine.queue import WRITE_TURN
from light_mem.engine.table_layout import READ, WORKER, WORKING, words_of
from light_mem.errors import LockTimeoutError
from tests.between_rig import (
    MIB,
    NEW,
    OLD,
    Between,
    at_each_look,
    between,
)
from tests.queue_rig import Queued, queued

__all__ = ["between", "queued"]  # fixtures


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


def test_they_do_not_keep_the_writes_from_going_on(
    between: Between, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BATCH_BYTES, READ, len(OLD) * MIB)
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


def test_all_that_wait_are_done_at_one_look(
    between: Between, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker claims its share of what waits, and then of the rest."""
    between.rig.service._session.table.header["workers"] = 2
    monkeypatch.setitem(LEAST_BYTES, READ, 1)
    look, take = between.worker._read_between, between.engine.begin_read
    reads: list[CacheTask] = []
    batches: list[int] = []

    def looked(writes: BatchReport, by_calls: bool) -> None:
        reads.append(between.read_old())
        look(writes, by_calls)
        assert reads[-1].ready()

    def begun(batch: list[BlockIO], *arguments: Any) -> None:
        batches.append(len(batch))
        take(batch, *arguments)

    monkeypatch.setattr(between.worker, "_read_between", looked)
    monkeypatch.setattr(between.engine, "begin_read", begun)
    writes = between.write_new()
    between.do_next()
    assert reads
    assert batches == [1] * 2 * len(reads)
    while not writes.ready():
        between.do_next()
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
