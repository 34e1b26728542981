"""A queue of blocks with nobody at it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from light_mem.engine.queue import TaskQueue
from light_mem.engine.table_layout import CELL, INITIAL, WRITE
from light_mem.engine.table_memory import Sizes
from light_mem.engine.task_table import TaskTable
from light_mem.index.locks import RangeLock

MIB = 1 << 20
WORKERS = 2


@dataclass
class Queued:
    """A queue with nobody at it."""

    table: TaskTable
    queue: TaskQueue

    def push(self, homes: list[int], mode: int = WRITE, first: int = 0) -> list[int]:
        """Queue a block of 1 MiB for each of these homes; their cells."""
        cells = np.arange(first, first + len(homes), dtype=np.uint32)
        records = np.zeros(len(homes), CELL)
        records["mode"], records["nbytes"], records["home"] = mode, MIB, homes
        self.table.cells[cells] = records

        def publish() -> None:
            self.table.states[cells] = INITIAL

        self.queue.push(cells, mode, publish)
        return list(cells.tolist())


@pytest.fixture
def queued() -> Iterator[Queued]:
    table = TaskTable.create(
        Sizes(1, 64, 4096, 4096),
        store="",
        page_bytes=MIB,
        num_pages=1,
        pages_per_block=1,
        workers=WORKERS,
    )
    queue = TaskQueue(table, RangeLock(table.lock_path()))
    one = Queued(table, queue)
    del table, queue
    yield one
    one.queue.close()
    one.table.close()
    vars(one).clear()  # pytest keeps the object a while, and with it a mapping
