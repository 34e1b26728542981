"""Small writes in the thread that asks for them.

The counterpart of `small_reads.py`: one block of some 100 KB is written by `create` itself, in a
part of the time that a worker needs to be woken. It never waits: the shard's lock is only tried,
while blocks are queued the workers, who are busy with the locks then, get this one as well, and a
thread goes over the entries of large shards (`scans_ahead.py`). The one unavoidable wait is the
kernel's dirty-page throttling (balance_dirty_pages, up to 200 ms a call), so after a slow write
this path is off for a while.
"""

from __future__ import annotations

import time

from light_mem.engine.base import BlockIO, Outcome
from light_mem.engine.in_server import InServer
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.opening import has_descriptors_for
from light_mem.engine.scans_ahead import ScansAhead
from light_mem.engine.table_layout import WRITE
from light_mem.engine.task_table import TaskTable
from light_mem.errors import LockTimeoutError, ServiceClosedError, StoreFormatError

# Finding space may scan all entries of a shard (the order of use, free space after others'
# changes): 1 ms for this many slots, 5 ms if every second one is free (measured; 2 and 14 ms for
# four times as many). In larger shards the caller does not wait for it.
MAX_SCANNED_SLOTS = 16384
# What the thread that scans does under the shard's lock takes 3 ms for each 131,072 slots at most
# (measured, one slot a block; see also `replica.MOST_RUNS`).
MAX_SLOTS = 1 << 22
SLOW_NS = 5_000_000
PAUSE_NS = 1_000_000_000  # after a slow one


class SmallWrites(InServer):
    """Writes blocks in the server's process."""

    def __init__(self, engine: LocalStorageEngine, table: TaskTable, wanted: bool) -> None:
        """`wanted`: False where there will be none."""
        super().__init__(engine, table, WRITE)
        self._table = table
        slots = engine.geometry.slots
        self._closed = not wanted or slots > MAX_SLOTS
        self._ahead = ScansAhead(engine.prepare_shard) if slots > MAX_SCANNED_SLOTS else None
        self._not_before = 0

    def prepare(self) -> None:
        """Open the shards, which the first writes would wait for: 25 ms and more. Until then, and
        where it fails, or would take the descriptors that the server needs, the workers get them.
        Raises nothing."""
        if not self._closed and has_descriptors_for(self._engine.geometry.shards):
            self._engine.prepare()
            if self._ahead is not None:
                self._ahead.start()

    def write(self, block: BlockIO) -> Outcome | None:
        """STORED or PRESENT, which counts as use; None: not done, leave it to the workers. The
        block has left its pages when this returns."""
        if self._table.depth(WRITE):
            return None
        with self._turn() as mine:
            started = time.perf_counter_ns()
            if not mine or started < self._not_before:
                return None
            try:
                outcome = self._engine.write_now(block, self._ahead)
            except (LockTimeoutError, OSError, StoreFormatError, ServiceClosedError):
                return None  # who writes it says what is wrong
            finally:
                ended = time.perf_counter_ns()
                if ended - started > SLOW_NS:
                    self._not_before = ended + PAUSE_NS
            if self._was_closed():
                return None
            if outcome is Outcome.STORED:
                self._count(1, block.nbytes, started)
            return outcome

    def close(self) -> None:
        super().close()
        if self._ahead is not None:
            self._ahead.close()
