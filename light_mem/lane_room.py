"""Room of one lane of the task table: rows, cells, page indices; taken by tasks and given back."""

from __future__ import annotations

from collections import deque
from operator import attrgetter
from typing import NamedTuple

from light_mem.engine.table_layout import ABORTED, is_final
from light_mem.engine.task_table import TaskTable
from light_mem.index.runs import Run
from light_mem.index.space import FreeRuns


class Room(NamedTuple):
    """Room of one task: global row, first cell, cells, first page index, page indices."""

    row: int
    start: int
    blocks: int
    pages: int
    page_count: int


class LaneRoom:
    """What of a lane is free. Not thread-safe, but for `release`: any thread, at any moment.

    An exception may come between any two instructions (a signal whose handler raises, no memory),
    also in the sorted containers, and would leave room free twice, or lost for good. So `take`
    marks the containers invalid first and valid last; a `take` that finds them invalid rebuilds
    them from `_given`, which changes in single steps.
    """

    def __init__(self, table: TaskTable, lane: int) -> None:
        self._table = table
        sizes = table.sizes
        self._all_cells = lane * sizes.cells, sizes.cells
        self._all_pages = lane * sizes.pages, sizes.pages
        self._all_rows = range(lane * sizes.rows, (lane + 1) * sizes.rows)
        self._tops = table.lanes[lane : lane + 1]  # up to where it was ever used
        self._given: dict[int, Room] = {}  # by row
        self._released: deque[Room] = deque()  # given, and nobody asks for their tasks any more
        # All from here on follows from `_given`.
        self._whole = True
        self._cells = FreeRuns([self._all_cells])
        self._pages = FreeRuns([self._all_pages])
        self._rows: deque[int] = deque(self._all_rows)
        # Those of a former owner last: a worker that was late to tell of its tasks may do so yet.
        self._rows.rotate(-int(self._tops["rows_top"][0]))
        # Room of ready tasks by (blocks, page indices), for the next one of that size: most tasks
        # of a server are alike, and merging free ranges costs more than all else here.
        self._spare: dict[tuple[int, int], list[Room]] = {}

    def take(self, blocks: int, pages: int, held: list[Room]) -> Room | None:
        """Room for a task, where there is any: so many cells, and so many page indices.

        It is in `held` as well, which is the caller's: if this raises, or anything after it, what
        is in there is to be released. Its cells are final until the task is submitted.
        """
        if not self._whole:
            self._make_anew()
        self._whole = False
        room = self._take(blocks, pages)
        if room is not None:
            # First the caller: what is given and nobody has would be lost, while to release what
            # was not given does nothing.
            held.append(room)
            self._given[room.row] = room
        self._whole = True
        return room

    def release(self, room: Room) -> None:
        """A task's room may be used again once the task is ready. Takes no lock. Twice is as once:
        no two rooms that were given are the same object."""
        self._released.append(room)

    def _take(self, blocks: int, pages: int) -> Room | None:
        self._collect()
        if not self._rows:
            return None
        spare = self._spare.get((blocks, pages))
        if spare:
            reused = spare.pop()
            start, first = reused.start, reused.pages
        else:
            taken = self._take_runs(blocks, pages)
            if taken is None:
                return None
            start, first = taken
        row = self._rows.popleft()  # the longest unused one: late readers of old tasks find out
        tops, table = self._tops, self._table
        end = start + blocks
        # Before the states: whoever still polls a former task of this row finds out.
        table.generations[row] += 1
        # Cells that were never used are INITIAL: as such the room could not come back before it
        # is submitted, and its process may fail or die until then. Before they count as used: a
        # drain would wait for them.
        table.states[start:end] = ABORTED
        tops["cells_top"] = max(int(tops["cells_top"][0]), end - self._all_cells[0])
        tops["rows_top"] = max(int(tops["rows_top"][0]), row + 1 - self._all_rows.start)
        return Room(row, start, blocks, first, pages)

    def _take_runs(self, blocks: int, pages: int) -> tuple[int, int] | None:
        start = self._cells.take(blocks)
        first = None if start is None else self._pages.take(pages)
        if start is not None and first is not None:
            return start, first
        if start is not None:
            self._cells.add(start, blocks)
        if not self._spare:
            return None
        for rooms in self._spare.values():
            for room in rooms:
                self._cells.add(room.start, room.blocks)
                self._pages.add(room.pages, room.page_count)
        self._spare.clear()
        return self._take_runs(blocks, pages)

    def _collect(self) -> None:
        released, given = self._released, self._given
        for _ in range(len(released)):
            room = released[0]  # leaves last: one that is given and not in here would be lost
            if given.get(room.row) is not room:
                released.popleft()  # it was released before, or never given
                continue
            # Not `active`: a worker that was late to clear it may do so in the life of the next
            # task of the row.
            if not is_final(self._table.snapshot(room.start, room.start + room.blocks)):
                released.rotate(-1)  # still running: nobody may get its cells
                continue
            if self._table.active[room.row]:
                # Its worker has stored the last state and not told of it yet. Once another task
                # has these cells it would find them unfinished, and this one stay active for good.
                self._table.finish(room.row, 0)
            # Before its cells may be another row's: copies of its task find out here.
            self._table.generations[room.row] += 1
            del given[room.row]
            self._spare.setdefault((room.blocks, room.page_count), []).append(room)
            self._rows.append(room.row)
            released.popleft()

    def _make_anew(self) -> None:
        """All that is free, from what is given."""
        given = self._given
        rooms = sorted(given.values(), key=attrgetter("start"))
        self._cells = _between(self._all_cells, [(room.start, room.blocks) for room in rooms])
        rooms.sort(key=attrgetter("pages"))
        self._pages = _between(self._all_pages, [(room.pages, room.page_count) for room in rooms])
        # The order of those that are still here, then those that were in somebody's hands.
        rows = dict.fromkeys([*self._rows, *self._all_rows])
        self._rows = deque(row for row in rows if row not in given)
        self._spare = {}


def _between(whole: Run, taken: list[Run]) -> FreeRuns:
    """What runs that are sorted and apart leave free of a whole one."""
    starts, lengths = [], []
    at = whole[0]
    for start, length in [*taken, (whole[0] + whole[1], 0)]:
        if start > at:
            starts.append(at)
            lengths.append(start - at)
        at = start + length
    return FreeRuns.of_gaps(starts, lengths)
