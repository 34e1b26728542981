"""Room of one lane of the task table: rows, cells, page indices; taken by tasks and given back."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from light_mem.engine.table_layout import is_final
from light_mem.engine.task_table import TaskTable
from light_mem.index.space import FreeRuns


class Room(NamedTuple):
    """Room of one task: global row, first cell, cells, first page index, page indices."""

    row: int
    start: int
    blocks: int
    pages: int
    page_count: int


class LaneRoom:
    """What of a lane is free. Not thread-safe, but for `release`: any thread, at any moment."""

    def __init__(self, table: TaskTable, lane: int) -> None:
        self._table = table
        sizes = table.sizes
        self._first_cell, self._first_row = lane * sizes.cells, lane * sizes.rows
        self._tops = table.lanes[lane : lane + 1]  # up to where it was ever used
        self._cells = FreeRuns([(self._first_cell, sizes.cells)])
        self._pages = FreeRuns([(lane * sizes.pages, sizes.pages)])
        self._rows: deque[int] = deque(range(self._first_row, self._first_row + sizes.rows))
        self._released: deque[Room] = deque()
        # Room of ready tasks by (blocks, page indices), for the next one of that size: most tasks
        # of a server are alike, and merging free ranges costs more than all else here.
        self._spare: dict[tuple[int, int], list[Room]] = {}

    def take(self, blocks: int, pages: int) -> Room | None:
        """Room for a task, where there is any: so many cells, and so many page indices."""
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
        tops = self._tops
        tops["cells_top"] = max(int(tops["cells_top"][0]), start + blocks - self._first_cell)
        tops["rows_top"] = max(int(tops["rows_top"][0]), row + 1 - self._first_row)
        return Room(row, start, blocks, first, pages)

    def release(self, room: Room) -> None:
        """A task's room may be used again once the task is ready. Takes no lock."""
        self._released.append(room)

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
        for _ in range(len(self._released)):
            room = self._released.popleft()
            # Not `active`: a worker that was late to clear it may do so in the life of the next
            # task of the row.
            if not is_final(self._table.snapshot(room.start, room.start + room.blocks)):
                self._released.append(room)  # still running: nobody may get its cells
                continue
            if self._table.active[room.row]:
                # Its worker has stored the last state and not told of it yet. Once another task
                # has these cells it would find them unfinished, and this one stay active for good.
                self._table.finish(room.row, 0)
            self._spare.setdefault((room.blocks, room.page_count), []).append(room)
            self._rows.append(room.row)
