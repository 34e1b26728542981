"""Reads in the middle of a batch of writes that wait for a device, meet damage, or fault."""

from __future__ import annotations

import mmap
import sys

import pytest

from light_mem import CacheTask, State
from light_mem.engine import mapped_writes
from light_mem.engine.dirty_pages import DirtyPages
from light_mem.engine.mapped_writes import CALLS_BEFORE, MappedWrites
from light_mem.errors import LockTimeoutError
from light_mem.index.keys import as_key
from light_mem.index.locks import LOCK_TIMEOUT_SECONDS, SHORT_SECONDS
from tests.between_rig import (
    NEW,
    NEW_BYTES,
    OLD,
    Between,
    at_each_look,
    between,
    wait_for_the_device,
)
from tests.parts_rig import around_changes

__all__ = ["between"]  # a fixture


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
