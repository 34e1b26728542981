"""What a worker tells of a batch, and what it makes of the cells of one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from light_mem.engine.base import Outcome
from light_mem.engine.batch_report import BatchReport, Stopwatch
from light_mem.engine.places import Rows
from light_mem.engine.table_layout import (
    ABORTED,
    COPIED,
    FINISHED,
    INITIAL,
    READ,
    WORKER_COUNTERS,
    WRITE,
    Cells,
)
from light_mem.engine.table_memory import Sizes
from light_mem.engine.task_table import TaskTable
from light_mem.engine.worker import Worker
from tests.engine_helpers import let_go

ROWS = 3  # tasks, with 12 blocks each
BLOCKS = 12


class Told:
    """A batch over the first blocks of three tasks, and what was told when a task was finished."""

    def __init__(
        self, table: TaskTable, mode: int, cells: list[int], stopwatch: Stopwatch | None = None
    ) -> None:
        self.table = table
        self.cells = cells
        table.cells["row"][cells] = [cell // BLOCKS for cell in cells]
        table.cells["nbytes"][cells] = [100 + cell for cell in cells]
        table.cells["mode"][cells] = mode
        self.report = BatchReport(table, 2, cells, table.read(cells), stopwatch or Stopwatch())
        self.finished: list[tuple[int, dict[str, int], bytes]] = []
        table.finish = self._finish  # type: ignore[method-assign]

    def _finish(self, row: int, worker: int) -> bool:
        assert worker == 2
        states = self.table.snapshot(row * BLOCKS, (row + 1) * BLOCKS)
        self.finished.append((row, self.numbers(), states))
        return True

    def numbers(self) -> dict[str, int]:
        found = {name: int(self.table.workers[name][2]) for name in WORKER_COUNTERS}
        return {name: n for name, n in found.items() if n and not name.endswith("_ns")}

    def states(self) -> list[int]:
        return list(self.table.snapshot(0, ROWS * BLOCKS))


@pytest.fixture
def table() -> Iterator[TaskTable]:
    table = TaskTable.create(
        Sizes(2, 4, 64, 64), store="", page_bytes=64, num_pages=1, pages_per_block=1, workers=2
    )
    for row in range(ROWS):
        table.rows["start"][row], table.rows["count"][row] = row * BLOCKS, BLOCKS
    yield table
    table.close()
    let_go(table)


def test_no_time_counts_twice_where_batches_overlap(table: TaskTable) -> None:
    began = time.perf_counter_ns()
    stopwatch = Stopwatch()
    one, two = (Told(table, WRITE, cells, stopwatch) for cells in ([0, 1], [12, 13]))
    for told, at in ((one, 0), (two, 0), (one, 1), (two, 1)):
        sum(range(10_000))  # some work
        told.report([at], Outcome.FAILED)
    spent = int(table.workers["write_ns"][2])
    assert 0 < spent <= time.perf_counter_ns() - began


@pytest.mark.parametrize("begun", ["has_begun_reads", "has_begun_writes", ""])
def test_writes_are_ended_before_reads_go_on_and_time_goes_on_while_something_is_begun(
    table: TaskTable, begun: str
) -> None:
    for cell, mode in ((0, WRITE), (1, READ)):
        table.cells["mode"][cell] = mode
        table.cells["places"][cell] = 1
    engine = Mock(has_begun_reads=False, has_begun_writes=False)
    queue: Any = None
    worker = Worker(2, table, queue, np.zeros((4, 64), np.uint8), engine)
    worker._stopwatch = Mock()
    worker.do([0])
    assert [name for name, *_ in engine.method_calls] == ["begin_write"]
    assert worker._stopwatch.start.call_count == 1
    if begun:
        setattr(engine, begun, True)
    worker.do([1])
    assert [name for name, *_ in engine.method_calls][1:] == ["begin_read", "finish_writes"]
    assert worker._stopwatch.start.call_count == (1 if begun else 2)


@pytest.mark.parametrize("at_once", [1, 100])
def test_a_task_is_finished_once_with_its_states_and_numbers_in_place(
    table: TaskTable, at_once: int
) -> None:
    cells = list(reversed(range(ROWS * BLOCKS)))
    told = Told(table, WRITE, cells)
    for first in range(0, len(cells), at_once):
        positions = list(range(first, min(len(cells), first + at_once)))
        told.report(positions, Outcome.COPIED)
        told.report(positions, Outcome.STORED)
    assert [row for row, _, _ in told.finished] == [2, 1, 0]
    for row, numbers, states in told.finished:
        assert states == bytes([FINISHED]) * BLOCKS
        done = (ROWS - row) * BLOCKS if at_once == 1 else ROWS * BLOCKS
        assert numbers["blocks_written"] == done
        assert numbers["bytes_written"] == sum(100 + cell for cell in cells[:done])
    told.report.count()  # nothing twice
    assert told.numbers()["blocks_written"] == ROWS * BLOCKS
    assert int(table.workers["write_ns"][2]) > 0
    assert not int(table.workers["read_ns"][2])


def test_only_what_was_moved_counts_as_bytes_and_each_outcome_as_itself(table: TaskTable) -> None:
    told = Told(table, READ, list(range(BLOCKS)))
    told.report([0, 1], Outcome.LOADED)
    for at, outcome in enumerate(
        (
            Outcome.MISSING,
            Outcome.LOST,
            Outcome.DAMAGED,
            Outcome.STOPPED,
            Outcome.FAILED,
            Outcome.PRESENT,
            Outcome.NO_ROOM,
        ),
        start=2,
    ):
        told.report((at,), outcome)
    states = [FINISHED] * 2 + [ABORTED] * 5 + [FINISHED, ABORTED] + [INITIAL] * 27
    assert told.states() == states
    assert not told.finished
    told.report([], Outcome.LOADED)
    told.report([9, 10, 11], Outcome.MISSING)
    assert [row for row, _, _ in told.finished] == [0]
    assert told.numbers() == {
        "blocks_read": 2,
        "bytes_read": 201,
        "missing": 4,
        "lost_races": 1,
        "damaged": 1,
        "stopped": 1,
        "failed": 1,
        "blocks_present": 1,
        "no_room": 1,
    }


def test_copied_is_told_of_the_very_blocks(table: TaskTable) -> None:
    told = Told(table, WRITE, [5, 3, 30])
    told.report([0, 2], Outcome.COPIED)
    assert [at for at, state in enumerate(told.states()) if state == COPIED] == [5, 30]
    assert not told.numbers()


def pages_of(words: np.ndarray, firsts: list[int], counts: list[int]) -> list[list[int]]:
    worker = Worker.__new__(Worker)
    worker._table = SimpleNamespace(pages=words)  # type: ignore[assignment]
    worker._memory = np.zeros((1, 1), np.uint8)
    fields = dict.fromkeys(Cells._fields, (0,) * len(firsts))
    records = Cells(**{**fields, "pages": tuple(firsts), "places": tuple(counts)})
    found = [block.place for block in worker._blocks(records)]
    assert all(isinstance(place, Rows) and place.numbers.dtype == np.intp for place in found)
    return [place.numbers.tolist() for place in found]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("firsts", "counts"),
    [
        ([7], [3]),
        ([0, 4, 8, 12], [4] * 4),
        ([12, 4, 8, 0], [4] * 4),
        ([0, 5, 13], [4] * 3),  # another task's between them
        ([8, 1004, 16, 1000], [4] * 4),  # of two tasks
        ([0, 4, 8], [4, 4, 3]),  # the last one shorter
        ([9992, 9996], [4] * 2),  # at the end of the table
        ([3, 3], [2] * 2),
    ],
)
def test_each_block_gets_its_own_page_indices(firsts: list[int], counts: list[int]) -> None:
    words = np.random.default_rng(1).permutation(10_000).astype(np.uint32)
    expected = [words[at : at + n].tolist() for at, n in zip(firsts, counts, strict=True)]
    assert pages_of(words, firsts, counts) == expected


def test_page_indices_of_random_batches() -> None:
    rng = np.random.default_rng(2)
    words = rng.permutation(4096).astype(np.uint32)
    for _ in range(400):
        n, count = int(rng.integers(1, 57)), int(rng.integers(1, 9))
        offset = int(rng.integers(0, count)) if rng.random() < 0.5 else 0
        firsts = (rng.integers(0, 4000 // count, n) * count + offset).tolist()
        if rng.random() < 0.3:
            firsts[int(rng.integers(n))] += 1
        counts = [count] * n
        if rng.random() < 0.3:
            counts[int(rng.integers(n))] = int(rng.integers(1, count + 1))
        expected = [words[at : at + c].tolist() for at, c in zip(firsts, counts, strict=True)]
        assert pages_of(words, firsts, counts) == expected
