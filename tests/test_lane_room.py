"""Room of a lane of the task table: given once, within the lane, and all of it comes back."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sortedcontainers

from light_mem.engine.table_layout import FINISHED, INITIAL, LANE, WORKING
from light_mem.engine.table_memory import Sizes
from light_mem.lane_room import LaneRoom, Room
from tests.deaths import interleave
from tests.opcodes import LIBRARY

LANES, THE_LANE = 3, 1
# Python code, where signals are looked for as in the library's own.
CONTAINERS = str(Path(sortedcontainers.__file__).parent)


class Interrupted(BaseException):
    """What a signal's handler raises."""


class Table(SimpleNamespace):
    """What LaneRoom asks of a task table."""

    def __init__(self, rows: int, cells: int, pages: int) -> None:
        self.sizes = Sizes(LANES, rows, cells, pages)
        self.lanes = np.zeros(LANES, LANE)
        self.states = np.full(LANES * cells, INITIAL, np.uint8)
        self.active = np.zeros(LANES * rows, np.uint8)
        self.generations = np.zeros(LANES * rows, np.uint32)

    def snapshot(self, start: int, end: int) -> bytes:
        return self.states[start:end].tobytes()

    def finish(self, row: int, worker: int) -> None:
        self.active[row] = 0

    def set(self, room: Room, state: int) -> None:
        self.states[room.start : room.start + room.blocks] = state


def room_of(*sizes: int) -> tuple[LaneRoom, Table]:
    table: Any = Table(*sizes)
    return LaneRoom(table, THE_LANE), table


def spans(room: Room) -> list[tuple[int, int]]:
    """Cells, page indices and the row: from, to."""
    return [
        (room.start, room.start + room.blocks),
        (room.pages, room.pages + room.page_count),
        (room.row, room.row + 1),
    ]


def assert_apart(rooms: list[Room]) -> None:
    for runs in zip(*map(spans, rooms), strict=True):
        ordered = sorted(runs)
        assert all(a[1] <= b[0] for a, b in pairwise(ordered))


@pytest.mark.parametrize("seed", range(10))
def test_no_room_is_given_twice_and_none_is_lost(seed: int) -> None:
    rng = random.Random(seed)
    lane_room, table = room_of(20, 60, 200)
    lane = [(60, 120), (200, 400), (20, 40)]
    taken: list[Room] = []
    refused = 0
    for _ in range(3000):
        if rng.random() < 0.55:
            room = lane_room.take(rng.randint(1, 12), rng.randint(1, 60), [])
            if room is None:
                refused += 1
                continue
            for mine, bounds in zip(spans(room), lane, strict=True):
                assert bounds[0] <= mine[0] < mine[1] <= bounds[1]
            for other in taken:
                for mine, theirs in zip(spans(room), spans(other), strict=True):
                    assert mine[1] <= theirs[0] or theirs[1] <= mine[0]
            table.set(room, WORKING)
            table.active[room.row] = 1
            taken.append(room)
        elif taken:
            room = taken.pop(rng.randrange(len(taken)))
            lane_room.release(room)
            table.set(room, FINISHED)
    assert refused
    for room in taken:
        lane_room.release(room)
        table.set(room, FINISHED)
    assert lane_room.take(60, 200, []) is not None
    assert not table.active.any()


def test_cells_come_back_where_page_indices_have_run_out() -> None:
    lane_room, _ = room_of(8, 8, 10)
    assert lane_room.take(1, 9, [])
    for _ in range(20):
        assert lane_room.take(2, 2, []) is None
    assert lane_room.take(7, 1, [])


def test_room_of_other_sizes_that_lies_ready_is_taken_apart_at_once() -> None:
    lane_room, _ = room_of(8, 8, 8)
    rooms = [lane_room.take(2, 2, []) for _ in range(4)]
    for room in rooms:
        assert room is not None
        lane_room.release(room)
    assert lane_room.take(8, 8, [])


def test_room_is_not_given_again_before_its_blocks_are_final() -> None:
    lane_room, table = room_of(8, 8, 8)
    room = lane_room.take(8, 8, [])
    assert room is not None
    table.set(room, WORKING)
    lane_room.release(room)
    assert lane_room.take(1, 1, []) is None
    table.set(room, FINISHED)
    assert lane_room.take(1, 1, [])


def test_room_that_is_released_twice_is_given_once() -> None:
    lane_room, _ = room_of(2, 4, 4)
    first = lane_room.take(2, 2, [])
    assert first
    lane_room.release(first)
    lane_room.release(first)
    rooms = [lane_room.take(2, 2, []) for _ in range(2)]
    lane_room.release(first)  # a late finaliser, when its row and cells are another's
    assert all(rooms)
    assert_apart([room for room in rooms if room])
    assert lane_room.take(1, 1, []) is None


CELLS, PAGES = 12, 24
# What a lane as `used` makes it has for a task of this size.
SIZES = {"spare": (1, 2), "a run": (2, 2), "spare of other sizes": (7, 14), "nothing": (9, 2)}


def used() -> tuple[LaneRoom, Table, Room, Room]:
    """A lane with a run of 3 free cells, spare room of 3, room of 2 that is released and not told
    as ready, and two rooms under way, one of them released."""
    lane_room, table = room_of(CELLS, CELLS, PAGES)
    rooms = [lane_room.take(*size, []) for size in ((1, 2), (2, 4), (2, 2), (1, 2), (1, 2), (2, 4))]
    spare, kept, running, other, third, untold = [room for room in rooms if room]
    for room in (spare, other, third):
        lane_room.release(room)
    found = lane_room.take(1, 2, [])
    assert found
    lane_room.release(found)
    for room in (kept, running):
        table.set(room, WORKING)
        table.active[room.row] = 1
    table.set(untold, FINISHED)
    table.active[untold.row] = 1
    lane_room.release(running)
    lane_room.release(untold)
    return lane_room, table, kept, running


def raise_interrupted() -> None:
    raise Interrupted


def check_whole(lane_room: LaneRoom, table: Table, taken: list[Room]) -> None:
    """All that is not taken can be taken, apart from that; and all, once it is back."""
    free = CELLS - sum(room.blocks for room in taken)
    ones = [lane_room.take(1, 1, []) for _ in range(free)]
    assert all(ones)
    rooms = [*taken, *(room for room in ones if room)]
    assert_apart(rooms)
    assert lane_room.take(1, 1, []) is None
    for room in rooms:
        table.set(room, FINISHED)
        lane_room.release(room)
    assert lane_room.take(CELLS, PAGES, [])


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_an_exception_at_any_instruction_of_a_take_costs_no_room(size: tuple[int, int]) -> None:
    """... and gives none twice: its caller has it, or nobody."""
    # What has no room in the end does all that the one before it does, which takes long enough.
    where = (LIBRARY,) if size == SIZES["nothing"] else (LIBRARY, CONTAINERS)
    for at in count(1):
        lane_room, table, kept, running = used()
        held: list[Room] = []
        take: Callable[[], Any] = lambda: lane_room.take(*size, held)  # noqa: B023, E731
        try:
            room, happened = interleave(take, raise_interrupted, at, where)
        except Interrupted:
            for room in held:
                lane_room.release(room)
            check_whole(lane_room, table, [kept, running])
            continue
        assert not happened
        assert held == ([room] if room else [])
        check_whole(lane_room, table, [kept, running, *held])
        break
    assert at > 100  # it did look


def test_an_exception_while_a_lane_is_made_anew_costs_no_room() -> None:
    for at in count(1):
        lane_room, table, kept, running = used()
        with pytest.raises(Interrupted):
            interleave(lambda: lane_room.take(7, 14, []), raise_interrupted, 300)  # noqa: B023
        assert not lane_room._whole
        try:
            interleave(lane_room._make_anew, raise_interrupted, at, (LIBRARY, CONTAINERS))
        except Interrupted:
            check_whole(lane_room, table, [kept, running])
            continue
        break
    assert at > 100


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_finaliser_releases_room_at_any_instruction_of_a_take(size: tuple[int, int]) -> None:
    for at in count(1):
        lane_room, table, kept, running = used()

        def finalise() -> None:
            table.set(kept, FINISHED)  # noqa: B023
            lane_room.release(kept)  # noqa: B023

        held: list[Room] = []
        take: Callable[[], Any] = lambda: lane_room.take(*size, held)  # noqa: B023, E731
        _, happened = interleave(take, finalise, at)
        if not happened:
            break
        check_whole(lane_room, table, [running, *held])
    assert at > 100
