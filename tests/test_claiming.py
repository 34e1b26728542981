"""What a worker chooses from the rings, against a plain look at all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from light_mem.engine.claiming import (
    AHEAD_BLOCKS,
    BATCH_BLOCKS,
    BATCH_BYTES,
    LEAST_BYTES,
    Chooser,
)
from light_mem.engine.table_layout import ABORTED, CELL, FINISHED, INITIAL, READ, WORKING, WRITE
from light_mem.engine.table_memory import Sizes
from light_mem.engine.task_table import TaskTable
from tests.engine_helpers import let_go

CELLS = 4096


@dataclass
class Rings:
    """A table whose rings are filled and emptied by hand; which cells each worker has in hand."""

    table: TaskTable
    rng: np.random.Generator
    next_cell: int = 0
    in_hand: dict[int, list[list[int]]] = field(default_factory=dict)

    def push(self, mode: int, count: int, size: int, workers: int) -> None:
        cells = np.arange(self.next_cell, min(CELLS, self.next_cell + count))
        records = np.zeros(len(cells), CELL)
        records["mode"] = mode
        records["nbytes"] = self.rng.integers(1, 2 * size, len(cells))
        if mode == WRITE:  # in turns, as they are dealt, and some of no home
            turns = np.arange(len(cells)) // int(self.rng.integers(1, 60))
            records["home"] = turns % (workers + 1)
        tail = self.table.tail(mode)
        places = np.arange(tail, tail + len(cells)) % self.table.ring_length
        self.table.rings[mode][places] = cells
        self.table.cells[cells], self.table.states[cells] = records, INITIAL
        self.table.move_tail(mode, tail + len(cells))
        self.next_cell += len(cells)

    def take(self, worker: int, cells: list[int]) -> None:
        """A worker begins a batch; it has two in hand at most."""
        self.table.states[cells] = WORKING
        batches = self.in_hand.setdefault(worker, [])
        batches.append(cells)
        if len(batches) > 2:
            self.table.states[batches.pop(0)] = FINISHED


def plain(table: TaskTable, worker: int, mode: int, ahead: bool) -> list[int] | None:
    """As `Chooser.choose` says it, in as many steps as it takes."""
    workers = int(table.header["workers"][0])
    head, tail = table.head(mode), table.tail(mode)
    window = BATCH_BLOCKS if mode == READ else min(4096, AHEAD_BLOCKS * workers)
    ring = [int(table.rings[mode][at % table.ring_length]) for at in range(head, tail)]
    waits = [
        c for c in ring[:window] if table.states[c] == INITIAL and table.cells["mode"][c] == mode
    ]
    own = [c for c in waits if table.cells["home"][c] in (0, worker)]
    waiting = len(waits) + len(ring[window:])
    chosen: list[int] = []
    nbytes = 0
    for cell in (own or waits)[:BATCH_BLOCKS]:
        if nbytes >= BATCH_BYTES[mode]:
            break
        if len(chosen) * workers >= waiting and nbytes >= LEAST_BYTES[mode] and not ahead:
            break
        chosen.append(cell)
        nbytes += int(table.cells["nbytes"][cell])
    return None if ahead and waiting < workers * len(chosen) else chosen


@pytest.fixture
def table() -> Iterator[TaskTable]:
    made = TaskTable.create(
        Sizes(1, 8, CELLS, 16), store="", page_bytes=64, num_pages=1, pages_per_block=1, workers=3
    )
    yield made
    made.close()
    let_go(made)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("workers", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("size", [64, 300_000, 4 << 20])
def test_a_worker_gets_what_a_plain_look_at_the_ring_gives(
    table: TaskTable, seed: int, workers: int, size: int
) -> None:
    table.header["workers"] = workers
    rings = Rings(table, np.random.default_rng(seed))
    chooser = Chooser(table)
    short = 0
    for turn in range(250):
        if turn % 25 == 0:
            count = 1500 if workers == 40 and not turn else 260
            rings.push(
                WRITE if not turn else int(rings.rng.choice([READ, WRITE])), count, size, workers
            )
        mode, worker = int(rings.rng.choice([READ, WRITE])), int(rings.rng.integers(1, workers + 1))
        if rings.rng.random() < 0.1 and rings.next_cell:
            cell = int(rings.rng.integers(rings.next_cell))
            if table.states[cell] == INITIAL:
                table.states[cell] = ABORTED
        ahead = mode == READ and rings.rng.random() < 0.3
        choice, expected = chooser.choose(worker, mode, ahead), plain(table, worker, mode, ahead)
        if choice is None:
            assert expected is None
            continue
        head = table.head(mode)
        assert choice.cells == expected
        rings.take(worker, choice.cells)
        passed = [table.rings[mode][at % table.ring_length] for at in range(head, choice.head)]
        assert not (table.states[passed] == INITIAL).any(), "a block that waits is passed over"
        table.move_head(mode, choice.head)
        short += 0 < len(choice.cells) < BATCH_BLOCKS
    assert short  # the end of a task, where fair shares count, was met


@pytest.mark.parametrize("far", [False, True])
def test_blocks_behind_one_that_is_queued_twice_are_not_passed_over(
    table: TaskTable, far: bool
) -> None:
    """An abort leaves its entry, and the next task of that size gets the same cell."""
    table.header["workers"] = 1
    rings = Rings(table, np.random.default_rng(0))
    rings.push(WRITE, BATCH_BLOCKS, 64, 1)
    tail = table.tail(WRITE)
    table.rings[WRITE][tail] = 0  # the 97th entry: a cell of the 96 before it
    table.move_tail(WRITE, tail + 1)
    rings.push(WRITE, 50, 64, 1)
    table.cells["home"] = 0
    chooser = Chooser(table)
    if far:
        look = chooser._look_far(1, WRITE, table.head(WRITE), table.tail(WRITE))
        chooser._look = lambda *_: look  # type: ignore[method-assign]
    first = chooser.choose(1, WRITE)
    assert first is not None
    assert first.cells == list(range(BATCH_BLOCKS))
    assert first.head == BATCH_BLOCKS + 1


def test_a_look_at_much_that_waits_ends_with_the_first_full_batch(table: TaskTable) -> None:
    table.header["workers"] = 2
    rings = Rings(table, np.random.default_rng(0))
    rings.push(WRITE, 2000, 64, 2)
    look = Chooser(table)._look(1, WRITE, 2)
    assert len(look.own) == BATCH_BLOCKS
    assert look.end - table.head(WRITE) == look.number < 2 * AHEAD_BLOCKS
