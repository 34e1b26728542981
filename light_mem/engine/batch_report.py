"""What a worker tells of its batch: states of the blocks, counters, tasks that are ready."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from light_mem.engine.base import Outcome
from light_mem.engine.table_layout import (
    ABORTED,
    COPIED,
    FINISHED,
    READ,
    WORKER,
    Cells,
    words_of,
)
from light_mem.engine.task_table import TaskTable

_COUNTERS = {
    Outcome.STORED: "blocks_written",
    Outcome.PRESENT: "blocks_present",
    Outcome.LOADED: "blocks_read",
    Outcome.MISSING: "missing",
    Outcome.LOST: "lost_races",
    Outcome.DAMAGED: "damaged",
    Outcome.NO_ROOM: "no_room",
    Outcome.STOPPED: "stopped",
    Outcome.FAILED: "failed",
}
_COPIED = Outcome.COPIED
# By number: an attribute of an enumeration's member costs more than all else here.
_FINAL = [ABORTED] * (max(Outcome) + 1)
_MOVED = [False] * len(_FINAL)
_WORDS = words_of(WORKER)
_OUTCOME_WORDS = [0] * len(_FINAL)
for _outcome, _counter in _COUNTERS.items():
    _OUTCOME_WORDS[_outcome] = _WORDS[_counter]
    _FINAL[_outcome] = FINISHED if _outcome.success else ABORTED
    _MOVED[_outcome] = _outcome in (Outcome.STORED, Outcome.LOADED)


class Stopwatch:
    """Busy time of a worker, shared by its batches. Batches overlap (the last blocks of one are
    reported after the next began); each moment counts once."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Work begins, or goes on after a pause that does not count."""
        self._since = time.perf_counter_ns()

    def lap(self) -> int:
        """Nanoseconds since the last call."""
        now, before = time.perf_counter_ns(), self._since
        self._since = now
        return now - before


class BatchReport:
    """The `Report` of one batch of a worker. One thread."""

    def __init__(
        self,
        table: TaskTable,
        worker: int,
        cells: Sequence[int],
        records: Cells,
        stopwatch: Stopwatch,
    ) -> None:
        """`records`: what the cells hold, all of one mode; `stopwatch`: the worker's, started."""
        self._table = table
        self._worker = worker
        self._cells = cells
        self._lengths, self._rows = records.nbytes, records.row
        self._left = Counter(records.row)  # a task may end before the batch does
        reading = records.mode[0] == READ
        self._bytes_word = _WORDS["bytes_read" if reading else "bytes_written"]
        self._time_word = _WORDS["read_ns" if reading else "write_ns"]
        self._tally = [0] * len(_FINAL)  # by outcome
        self._moved = 0
        self._stopwatch = stopwatch

    def __call__(self, positions: Sequence[int], outcome: Outcome) -> None:
        """Tell what became of blocks, by their positions in the batch."""
        if outcome is _COPIED:
            self._set_states(positions, COPIED)
            return
        number = int(outcome)
        self._tally[number] += len(positions)
        if _MOVED[number]:
            lengths = self._lengths
            self._moved += sum([lengths[at] for at in positions])
        rows, left = self._rows, self._left
        ready = []
        for at in positions:
            row = rows[at]
            left[row] -= 1
            if not left[row]:
                ready.append(row)
        # Before the last state: whoever sees the task ready sees its numbers. And each time: an
        # idle worker sees by them that others read.
        self.count()
        self._set_states(positions, _FINAL[number])
        for row in ready:
            self._table.finish(row, self._worker)

    def _set_states(self, positions: Sequence[int], state: int) -> None:
        states, start, cells = self._table.map, self._table.sections.states, self._cells
        for at in positions:
            states[start + cells[at]] = state

    def count(self) -> None:
        """Add what was told since the last call to the worker's counters."""
        words = self._table.worker_words(self._worker)
        words[self._time_word] += self._stopwatch.lap()
        words[self._bytes_word] += self._moved
        self._moved = 0
        for number, blocks in enumerate(self._tally):
            if blocks:
                words[_OUTCOME_WORDS[number]] += blocks
                self._tally[number] = 0
