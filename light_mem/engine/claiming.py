"""Which of the blocks that wait a worker takes next.

A worker asks right after it has copied a batch, which has pushed all else out of the processor's
caches. Each different numpy call then takes some 10 us, as long as this loop needs for 50 blocks.
"""

from __future__ import annotations

from typing import NamedTuple

from light_mem.engine.base import WRITE_BATCH
from light_mem.engine.table_layout import INITIAL, READ, WRITE
from light_mem.engine.task_table import TaskTable

# Claimed at a time at most: enough to make what a batch costs (0.6 ms of a read, 1.3 of a write)
# little beside its copies. Nobody waits for longer because of that: what comes later is behind all
# that waits, and the last batches are small.
BATCH_BYTES = {READ: 32 << 20, WRITE: 32 << 20}
# A few more to write would be two holds of the shard's lock more for them alone.
BATCH_BLOCKS = {READ: 2 * WRITE_BATCH, WRITE: WRITE_BATCH}
# ... and at least this much, where it waits: half of a smaller batch would be its own cost (some
# 300 us for a read, 700 for a write), more than what the other half would wait for.
LEAST_BYTES = {READ: 1 << 20, WRITE: 4 << 20}
# A worker looks for blocks of its own among so many a worker, two batches. Those of a worker that
# is stopped or slow are passed over until others find nothing else among so many, and do them.
AHEAD_BLOCKS = 2 * BATCH_BLOCKS[WRITE]
# ... but no more than these in all: 1 ms, with the queue's lock in hand.
_MOST_AHEAD = 4096


class Choice(NamedTuple):
    """What a worker takes: cells, in the ring's order, and from which entry on some may wait."""

    cells: list[int]
    head: int


class Chooser:
    """Chooses from the rings of one task table, with the queue in hand; changes nothing."""

    def __init__(self, table: TaskTable) -> None:
        self._table = table
        cells = table.cells
        self._states = table.states.data
        self._modes, self._homes = cells["mode"].data, cells["home"].data
        self._lengths = cells["nbytes"].data
        self._rings = {mode: ring.data for mode, ring in table.rings.items()}

    def choose(self, worker: int, mode: int, ahead: bool = False) -> Choice | None:
        """For a worker, in the ring's order: blocks whose home it is, or that have none; where
        there are none of these, what waits for others. At most a fair share of what waits, or
        LEAST_BYTES if that is more, and no more than BATCH_BYTES beyond its first block.

        Looks at a part of the ring; where nothing in it waits the head is behind it then. `ahead`:
        a whole batch, and only if as much waits for each of the other workers, else None.
        """
        table = self._table
        workers = int(table.header["workers"][0])
        waits, own, end = self._look(worker, mode, workers)
        cells = [cell for cell, _ in (own or waits)[: BATCH_BLOCKS[mode]]]
        waiting = len(waits) + table.tail(mode) - end
        share = -(-waiting // workers)
        if ahead:
            batch = self._first(cells, mode, len(cells))
            if waiting < workers * len(batch):
                return None
        chosen = self._first(cells, mode, share)
        taken = set(chosen)
        head = next((at for cell, at in waits if cell not in taken), end)
        return Choice(list(dict.fromkeys(chosen)), head)  # a cell may be there twice

    def _look(
        self, worker: int, mode: int, workers: int
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]], int]:
        """The blocks that wait, those of this worker among them, each with its place in the ring;
        and how far that was looked."""
        table, states, modes, homes = self._table, self._states, self._modes, self._homes
        ring, length = self._rings[mode], table.ring_length
        head, tail = table.head(mode), table.tail(mode)
        # Blocks to read have no home.
        most = BATCH_BLOCKS[mode]
        window = most if mode == READ else min(AHEAD_BLOCKS * workers, _MOST_AHEAD)
        waits: list[tuple[int, int]] = []
        own: list[tuple[int, int]] = []
        nbytes = 0
        for at in range(head, min(tail, head + window)):
            cell = ring[at % length]
            if states[cell] != INITIAL or modes[cell] != mode:
                continue
            waits.append((cell, at))
            if homes[cell] not in (0, worker):
                continue
            own.append((cell, at))
            nbytes += self._lengths[cell]
            if len(own) >= most or nbytes >= BATCH_BYTES[mode]:
                # A full batch. How much follows matters where it may be less than as much for each
                # of the others; what they have claimed of it, two batches each, does not count.
                enough = workers * len(own) + (workers - 1) * 2 * most
                if tail - at > enough:
                    return waits, own, at + 1
        return waits, own, min(tail, head + window)

    def _first(self, cells: list[int], mode: int, share: int) -> list[int]:
        """The first `share` of the cells, within the bounds of a batch."""
        lengths, least, most = self._lengths, LEAST_BYTES[mode], BATCH_BYTES[mode]
        nbytes = 0
        for count, cell in enumerate(cells):
            if nbytes >= most or (count >= share and nbytes >= least):
                return cells[:count]
            nbytes += lengths[cell]
        return cells
