"""A batch for several shards whose locks are taken, or that have no room: who waits, for how long,
and with what in hand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from light_mem.engine import publishing, writing
from light_mem.engine.base import Outcome
from light_mem.engine.local import LocalStorageEngine
from light_mem.errors import LockTimeoutError
from light_mem.index.locks import LOCK_TIMEOUT_SECONDS
from tests.engine_helpers import COPIED_AND_STORED, Block, Rig, lent, let_go
from tests.parts_rig import SHARDS, SLOTS, around_changes, engine, is_clean, of_shard, opened

__all__ = ["engine"]  # fixtures


class Clock:
    """Time as the writer sees it: it passes when somebody waits. `pause` is called then."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.pauses = 0
        self.pause: Callable[[int], None] = lambda _: None
        patch.setattr(writing, "time", self)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, _: float) -> None:
        self.pauses += 1
        self.now += 0.5
        self.pause(self.pauses)


@pytest.fixture
def other(engine: LocalStorageEngine) -> Iterator[LocalStorageEngine]:
    """Another process."""
    yield from lent(opened(engine.directory))


class Filling:
    """Slots that a process is writing to, all of one shard."""

    def __init__(self, engine: LocalStorageEngine, shard: int) -> None:
        self._engine, self._shard = engine, shard
        with engine.change(shard) as (index, _):
            given = index.allocate_many([1] * SLOTS, [])
            assert len(given) == SLOTS
            self.slots = [where.slot for where in given]
            engine._writer._intents.announce(shard, self.slots)
            index.mark_many(given, engine._owner.number)

    def give_back(self, count: int = SLOTS) -> None:
        with self._engine.change(self._shard) as (index, _):
            for _ in range(count):
                index.give_back(self.slots.pop())
        self._engine._writer._intents.announce(self._shard, self.slots)


def batch(*shards: int, each: int = 2) -> list[Block]:
    return [block for shard in shards for block in of_shard(shard, each)]


# --- room -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("full_first", [True, False])
def test_a_wait_for_a_lock_is_none_for_room(
    engine: LocalStorageEngine,
    other: LocalStorageEngine,
    monkeypatch: pytest.MonkeyPatch,
    full_first: bool,
) -> None:
    """One shard is full for a second from when it is looked at; another's lock stays taken."""
    clock, filling = Clock(monkeypatch), Filling(other, 0)
    clock.pause = lambda pauses: filling.give_back() if pauses == 2 else None
    rig = Rig(engine)

    def refuse(shard: int, timeout: float) -> None:
        if shard == 1:
            # Who may find room soon does not wait for the lock, and is stored before that is waited
            # for.
            if full_first and timeout >= LOCK_TIMEOUT_SECONDS:
                assert rig.find(*batch(0)) == [True] * 2
            clock.now += timeout
            raise LockTimeoutError("held", path="1", timeout=timeout)

    with monkeypatch.context() as patch:
        around_changes(engine, patch, refuse)
        blocks = batch(0, 1) if full_first else batch(1, 0)
        told = rig.write(*blocks)
    full, held = (told[:2], told[2:]) if full_first else (told[2:], told[:2])
    assert full == [COPIED_AND_STORED] * 2
    assert held == [(Outcome.FAILED,)] * 2
    assert clock.now > 100 + LOCK_TIMEOUT_SECONDS
    assert is_clean(engine)


def test_the_time_to_wait_for_room_begins_anew_with_all_that_is_written(
    engine: LocalStorageEngine, other: LocalStorageEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot every 1.5 s: more than ROOM_SECONDS in all, but never at a time."""
    monkeypatch.setattr(engine, "evicts", False)
    clock, filling = Clock(monkeypatch), Filling(other, 0)
    clock.pause = lambda pauses: filling.give_back(1) if pauses % 3 == 0 else None
    assert Rig(engine).write(*batch(0, each=4)) == [COPIED_AND_STORED] * 4
    assert clock.now - 100 > 2 * writing.ROOM_SECONDS
    filling.give_back(2)


def test_what_finds_no_room_in_time_is_told_so_and_others_are_stored(
    engine: LocalStorageEngine, other: LocalStorageEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, filling = Clock(monkeypatch), Filling(other, 1)
    told = Rig(engine).write(*batch(0, 1, 2))
    assert told[:2] + told[4:] == [COPIED_AND_STORED] * 4
    assert told[2:4] == [(Outcome.NO_ROOM,)] * 2
    assert writing.ROOM_SECONDS <= clock.now - 100 <= writing.ROOM_SECONDS + 1
    filling.give_back()


def test_who_waits_for_room_takes_back_what_the_dead_were_filling(
    engine: LocalStorageEngine, other: LocalStorageEngine
) -> None:
    Filling(other, 0)
    other._owners.locks.unlock(other._owner.number)  # as when its process dies
    assert Rig(engine).write(*batch(0, 1)) == [COPIED_AND_STORED] * 4
    assert is_clean(engine)


def test_who_waits_takes_back_from_the_dead_in_its_own_shards_and_waits_for_no_lock(
    engine: LocalStorageEngine, other: LocalStorageEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped process may hold another shard's lock, or its files may not be to be had."""
    clock, filling = Clock(monkeypatch), Filling(other, 0)
    clock.pause = lambda pauses: filling.give_back() if pauses == 2 else None
    asked: list[tuple[float, set[int]]] = []

    def note(timeout: float, only: Collection[int]) -> int:
        asked.append((timeout, set(only)))
        return 0

    monkeypatch.setattr(engine, "reclaim", note)
    assert Rig(engine).write(*batch(0)) == [COPIED_AND_STORED] * 2
    assert asked == [(0, {0})] * 2
    assert clock.pauses == 2


def test_first_come_first_served_also_where_few_can_be_announced(
    engine: LocalStorageEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four at a time, of which two find no room before the others are published."""
    monkeypatch.setattr(writing, "MOST_BLOCKS", 4)
    monkeypatch.setattr(writing, "MAX_INTENTS", 8)
    rig, many = Rig(engine), of_shard(1, 2 * SLOTS + 1)
    assert rig.write(*of_shard(0, 1), *many) == [COPIED_AND_STORED] * (2 * SLOTS + 2)
    assert rig.find(*many) == [False] * (SLOTS + 1) + [True] * SLOTS


# --- locks, when blocks are published -------------------------------------------------------------


def test_a_lock_that_is_taken_when_blocks_are_published_holds_up_no_others(
    engine: LocalStorageEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first shard; the others' blocks are found and told of before it is waited for."""
    rig, blocks = Rig(engine), batch(*range(SHARDS))
    timeouts: list[float] = []
    publish = publishing.Publisher._publish

    def held(self: Any, part: Any, written: Any, timeout: float) -> None:
        if part.shard == 0:
            timeouts.append(timeout)
            if timeout < LOCK_TIMEOUT_SECONDS:
                raise LockTimeoutError("held", path="0", timeout=timeout)
            assert rig.find(*blocks) == [False] * 2 + [True] * 4
        publish(self, part, written, timeout)

    monkeypatch.setattr(publishing.Publisher, "_publish", held)
    assert rig.write(*blocks) == [COPIED_AND_STORED] * 6
    assert timeouts == [writing.SHORT_SECONDS, LOCK_TIMEOUT_SECONDS]
    assert is_clean(engine)


def test_locks_that_stay_taken_fail_what_was_copied_and_give_it_back_later(
    engine: LocalStorageEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, blocks = Rig(engine), batch(*range(SHARDS))
    copied = False
    change = engine._open.change

    def refuse(shard: int, timeout: float) -> AbstractContextManager[Any]:
        if copied and shard:
            raise LockTimeoutError("held", path=str(shard), timeout=timeout)
        return change(shard, timeout)

    def report(positions: Any, outcome: Outcome) -> None:
        nonlocal copied
        copied = copied or outcome is Outcome.COPIED
        for at in positions:
            told[at].append(outcome)

    told: list[list[Outcome]] = [[] for _ in blocks]
    with monkeypatch.context() as patch:
        patch.setattr(engine._open, "change", refuse)
        engine.write(rig._batch(blocks, fill=True), report)
    stored = [at for at, each in enumerate(told) if each == [*COPIED_AND_STORED]]
    assert stored == [0, 1]
    assert [each[-1] for each in told[2:]] == [Outcome.FAILED] * 4
    assert rig.write(*batch(1, 2)) == [COPIED_AND_STORED] * 4
    assert is_clean(engine)


def test_blocks_that_are_there_already_do_not_keep_those_before_from_being_told(
    tmp_path: Path,
) -> None:
    """Past the page cache the ones before may be on their way when a batch has nothing to copy."""
    engine = opened(tmp_path / "store", "drop")
    rig = Rig(engine)
    rig.write(*batch(0))
    told: list[Outcome] = []
    fresh = rig._batch(batch(1), fill=True)
    engine.begin_write(fresh, lambda at, outcome: told.extend([outcome] * len(at)))
    engine.begin_write(rig._batch(batch(0), fill=True), lambda *_: None)
    assert told == [Outcome.COPIED] * 2 + [Outcome.STORED] * 2
    engine.close()
    let_go(engine, rig)
