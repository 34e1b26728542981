"""Readers and writers against another process's changes, tried at every opcode.

One thread plays both: `interleave` lets the other process act after the n-th opcode, for each n. So
no race is left to luck.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from light_mem.engine.base import Outcome
from light_mem.engine.local import LocalStorageEngine
from light_mem.errors import LockTimeoutError
from light_mem.index.locks import PathLock, lock_path
from tests.deaths import interleave
from tests.engine_helpers import Block, Rig, assert_consistent, let_go, open_local

LOADED, MISSING, LOST = Outcome.LOADED, Outcome.MISSING, Outcome.LOST
PAGES = 6
KEPT, OLD = Block(1, 2), Block(2, 3)


class Race:
    """Two engines on one store: one that is watched, one that gets in between."""

    def __init__(self, directory: Path, verify: bool) -> None:
        self.watched = Rig(open_local(directory, PAGES, block_pages=PAGES, verify=verify))
        self.other = Rig(open_local(directory, PAGES, block_pages=PAGES))

    def reset(self) -> None:
        """OLD is stored and was used last long ago; KEPT is stored."""
        self.other.engine.clear()
        self.other.write(OLD)
        self.other.write(KEPT)

    def at_each_opcode(
        self, call: Callable[[], list[Outcome]], change: Callable[[], object], step: int = 1
    ) -> Iterator[tuple[list[Outcome], bool]]:
        at, reached = 1, True
        while reached:
            self.reset()
            result, reached = interleave(call, change, at)
            yield result, reached
            at += step

    def check(self) -> None:
        assert isinstance(self.other.engine, LocalStorageEngine)
        assert_consistent(self.other.engine._index)


@pytest.fixture(params=[True, False], ids=["verified", "not verified"])
def race(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Race]:
    race = Race(tmp_path / "store", verify=request.param)
    yield race
    race.watched.engine.close()
    race.other.engine.close()
    let_go(race.watched.engine, race.other.engine)


def test_a_read_never_gets_the_bytes_of_the_block_that_took_its_slots(race: Race) -> None:
    seen: Counter[Outcome] = Counter()

    def take_its_slots() -> None:
        race.other.delete(OLD)
        assert race.other.write(Block(3, 3))[0][-1] is Outcome.STORED
        assert race.other.find(OLD, KEPT) == [False, True]

    # `Rig.read` fails for a wrong byte of a block that is LOADED.
    for outcomes, reached in race.at_each_opcode(lambda: race.watched.read(OLD), take_its_slots):
        assert outcomes[0] in (LOADED, MISSING, LOST)
        if not reached:
            assert outcomes == [LOADED]
        seen[outcomes[0]] += 1
    assert set(seen) == {LOADED, MISSING, LOST}
    race.check()


def test_a_read_never_gets_half_of_a_block_that_is_written_again(race: Race) -> None:
    def write_it_again() -> None:
        race.other.delete(OLD)
        race.other.write(Block(3, 1))  # the first of its slots: the rest moves
        race.other.write(OLD)

    seen: Counter[Outcome] = Counter()
    for outcomes, _ in race.at_each_opcode(lambda: race.watched.read(OLD), write_it_again):
        assert outcomes[0] in (LOADED, MISSING, LOST)
        seen[outcomes[0]] += 1
    assert set(seen) >= {LOADED, LOST}
    race.check()


@pytest.mark.parametrize("race", [True], indirect=True)
def test_a_block_written_by_two_at_once_is_stored_once(race: Race) -> None:
    block = Block(3, 1)
    seen: Counter[tuple[Outcome, ...]] = Counter()

    def write() -> list[Outcome]:
        outcomes = race.watched.write(block)
        seen[outcomes[0]] += 1
        return [outcomes[0][-1]]

    as_well = _unless_locked(race, lambda: race.other.write(block))
    for outcomes, _ in race.at_each_opcode(write, as_well, step=7):
        assert outcomes[0] in (Outcome.STORED, Outcome.PRESENT)
        assert race.other.read(block, KEPT) == [LOADED, LOADED]
        race.check()
    assert {o[-1] for o in seen} == {Outcome.STORED, Outcome.PRESENT}
    assert (Outcome.COPIED, Outcome.PRESENT) in seen


@pytest.mark.parametrize("race", [True], indirect=True)
def test_a_store_cleared_while_a_block_is_written_gets_the_block(race: Race) -> None:
    block = Block(3, 1)

    def write() -> list[Outcome]:
        return [race.watched.write(block)[0][-1]]

    clear = _unless_locked(race, race.other.engine.clear)
    for outcomes, reached in race.at_each_opcode(write, clear, step=5):
        assert outcomes == [Outcome.STORED]
        assert race.other.engine.stats()["used_slots"] in ((0, 1, 3, 4, 6) if reached else (6,))
        race.check()


def _unless_locked(race: Race, change: Callable[[], object]) -> Callable[[], None]:
    """Another process would wait for the shard's lock; here it is the same thread that holds it."""
    assert isinstance(race.other.engine, LocalStorageEngine)
    lock = PathLock(lock_path(race.other.engine.directory, "shard-000"))

    def act() -> None:
        try:
            with lock.hold(timeout=0):
                pass
        except LockTimeoutError:
            return
        change()

    return act
