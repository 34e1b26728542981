"""Blocks whose slots are not theirs any more when they are to be published: the shard was put in
order meanwhile, and what did not make sense was freed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from light_mem.engine.base import Outcome, never
from light_mem.engine.local import LocalStorageEngine
from light_mem.index import format as fmt
from light_mem.index.recovery import states_of
from tests.engine_helpers import Block, Rig, assert_consistent, let_go, open_local

SLOTS = 8
KEPT = Block(1, 2)
NEW = [Block(10, 2), Block(11, 2)]


class Two:
    """Two processes' engines on a store that holds KEPT."""

    def __init__(self, directory: Path) -> None:
        self.writer, self.other = (open_local(directory, SLOTS, block_pages=2) for _ in range(2))
        assert Rig(self.other).write(KEPT)[0][-1] is Outcome.STORED

    def being_written(self) -> list[int]:
        """First slots of the blocks in hand."""
        states = states_of(self.other._index.entries)
        return [int(slot) for slot in np.flatnonzero(states == fmt.WRITING)]

    def damage(self, *slots: int) -> None:
        self.other._index.entries["run"][list(slots)] = 0

    def put_in_order(self) -> None:
        with self.other.change(0) as (index, _):
            index.put_in_order()

    def write_new(
        self, meanwhile: Callable[[], object], stop: Callable[[int], bool] = never
    ) -> list[Outcome]:
        """Write NEW; `meanwhile` happens once, when the first of it is copied and nothing of it is
        published. The last outcome of each."""
        told: dict[int, list[Outcome]] = {at: [] for at in range(len(NEW))}
        calls: Iterator[Callable[[], object]] = iter([meanwhile])

        def report(positions: Sequence[int], outcome: Outcome) -> None:
            for at in positions:
                told[at].append(outcome)
            if outcome is Outcome.COPIED:
                for call in calls:
                    call()

        self.writer.write(Rig(self.writer)._batch(NEW, fill=True), report, stop)
        assert next(calls, None) is None
        return [outcomes[-1] for outcomes in told.values()]

    def check(self, *stored: Block) -> None:
        """These are stored, whole, and nothing else takes room, for either of the two."""
        assert_consistent(self.other._index)
        assert not self.being_written()
        assert not self.writer._owners.records["intents"].any()
        assert self.other.stats()["used_slots"] == sum(block.pages for block in stored)
        for engine in (self.writer, self.other):
            rig = Rig(engine)
            every = [KEPT, *NEW, Block(20, 2), Block(21, 2)]
            assert [b for b, found in zip(every, rig.find(*every), strict=True) if found] == [
                *stored
            ]
            assert rig.read(*stored) == [Outcome.LOADED] * len(stored)


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    two = Two(tmp_path / "store")
    yield two
    engines: list[LocalStorageEngine] = [two.writer, two.other]
    for engine in engines:
        engine.close()
    let_go(*engines, two)


def test_a_block_whose_slots_were_freed_before_it_was_published_has_failed(two: Two) -> None:
    def free_the_first() -> None:
        two.damage(two.being_written()[0])
        two.put_in_order()

    assert two.write_new(free_the_first) == [Outcome.FAILED, Outcome.STORED]
    two.check(KEPT, NEW[1])
    assert two.write_new(lambda: None) == [Outcome.STORED, Outcome.PRESENT]
    two.check(KEPT, *NEW)


def test_slots_that_were_freed_and_are_anothers_by_now_are_not_listed_twice(two: Two) -> None:
    others = [Block(20, 2), Block(21, 2)]

    def take_them() -> None:
        freed = two.being_written()
        two.damage(*freed)
        two.put_in_order()
        assert Rig(two.other).write(*others) == [(Outcome.COPIED, Outcome.STORED)] * 2
        states = states_of(two.other._index.entries)
        assert all(states[slot] == fmt.LIVE for slot in freed)

    assert two.write_new(take_them) == [Outcome.FAILED] * 2
    two.check(KEPT, *others)


def test_clearing_a_store_leaves_what_is_being_written_to_be_published(two: Two) -> None:
    assert two.write_new(two.other.clear) == [Outcome.STORED] * 2
    two.check(*NEW)


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_freed_as_another_block_of_the_batch_is_given_back_is_not_published(
    two: Two, whole: bool
) -> None:
    """The second block is stopped, and its entry makes no sense: to give it back puts the shard in
    order, which frees the first one too unless that is whole."""

    def damage() -> None:
        first, second = two.being_written()
        two.damage(*([second] if whole else [first, second]))

    outcomes = two.write_new(damage, stop=lambda at: at == 1)
    assert outcomes == [Outcome.STORED if whole else Outcome.FAILED, Outcome.STOPPED]
    two.check(KEPT, *NEW[:whole])
