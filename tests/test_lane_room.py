"""Room of a lane of the task table: given once, within the lane, and all of it comes back."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from light_mem.engine.table_layout import FINISHED, LANE, WORKING
from light_mem.engine.table_memory import Sizes
from light_mem.lane_room import LaneRoom, Room

LANES, THE_LANE = 3, 1


class Table(SimpleNamespace):
    """What LaneRoom asks of a task table."""

    def __init__(self, rows: int, cells: int, pages: int) -> None:
        self.sizes = Sizes(LANES, rows, cells, pages)
        self.lanes = np.zeros(LANES, LANE)
        self.states = np.full(LANES * cells, FINISHED, np.uint8)
        self.active = np.zeros(LANES * rows, np.uint8)

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


@pytest.mark.parametrize("seed", range(10))
def test_no_room_is_given_twice_and_none_is_lost(seed: int) -> None:
    rng = random.Random(seed)
    lane_room, table = room_of(20, 60, 200)
    lane = [(60, 120), (200, 400), (20, 40)]
    taken: list[Room] = []
    refused = 0
    for _ in range(3000):
        if rng.random() < 0.55:
            room = lane_room.take(rng.randint(1, 12), rng.randint(1, 60))
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
    assert lane_room.take(60, 200) is not None
    assert not table.active.any()


def test_cells_come_back_where_page_indices_have_run_out() -> None:
    lane_room, _ = room_of(8, 8, 10)
    assert lane_room.take(1, 9)
    for _ in range(20):
        assert lane_room.take(2, 2) is None
    assert lane_room.take(7, 1)


def test_room_of_other_sizes_that_lies_ready_is_taken_apart_at_once() -> None:
    lane_room, _ = room_of(8, 8, 8)
    rooms = [lane_room.take(2, 2) for _ in range(4)]
    for room in rooms:
        assert room is not None
        lane_room.release(room)
    assert lane_room.take(8, 8)


def test_room_is_not_given_again_before_its_blocks_are_final() -> None:
    lane_room, table = room_of(8, 8, 8)
    room = lane_room.take(8, 8)
    assert room is not None
    table.set(room, WORKING)
    lane_room.release(room)
    assert lane_room.take(1, 1) is None
    table.set(room, FINISHED)
    assert lane_room.take(1, 1)
