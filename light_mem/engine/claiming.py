"""Which of the blocks that wait a worker takes next.

A worker asks right after it has copied a batch, which has pushed all else out of the processor's
caches. Each different numpy call then takes some 10 us, as long as a loop needs for 50 blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from light_mem.engine.intents import MOST_BLOCKS
from light_mem.engine.table_layout import INITIAL, READ, WRITE
from light_mem.engine.task_table import TaskTable

# Upper limit of a claim: large enough that the overhead of a batch (0.6 ms for reads, 1.3 ms for
# writes) is small compared with its copies. It makes nobody wait longer: new blocks queue behind
# all others anyway, the last batches are small, and reads are done in the middle of writes.
BATCH_BYTES = {READ: 32 << 20, WRITE: 64 << 20}
# At most this many blocks per claim: writes beyond it would need two more holds of the shard's lock
# for a few blocks. (Blocks of 246 KB: twice as many are written no faster, half as many 4% slower.)
BATCH_BLOCKS = MOST_BLOCKS
# If that much is waiting, claim at least this: a smaller batch costs more in overhead (300 us for a
# read, 700 us for a write) than the rest gains by starting sooner.
LEAST_BYTES = {READ: 1 << 20, WRITE: 4 << 20}
# A worker looks for blocks of its own among the first AHEAD_BLOCKS x workers entries. Blocks of a
# stopped or slow worker are skipped until others find nothing else there; then they do them.
AHEAD_BLOCKS = 2 * BATCH_BLOCKS
# ... but among no more than these: that takes 0.2 ms, with the queue's lock held.
_MOST_AHEAD = 4096
# Above this many entries numpy is faster than a loop, which takes 0.2 to 0.3 us per entry.
_LOOP_ENTRIES = 1024


class Choice(NamedTuple):
    """What a worker takes: cells, in the ring's order, and from which entry on some may wait."""

    cells: list[int]
    head: int


class Look(NamedTuple):
    """What a look at a part of the ring found."""

    number: int  # of blocks that wait
    waits: list[tuple[int, int]]  # the first of them, a batch and one more: cell, place in the ring
    own: list[int]  # cells of the first that the worker had better do, a batch
    end: int  # of that part


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
        """Choose blocks for a worker, in the ring's order: those whose home it is or that have no
        home; if there are none, those that wait for other workers. At most a fair share of what
        waits, or LEAST_BYTES if that is more; none is added once BATCH_BYTES are reached.

        Looks only at the first part of the ring; if nothing in it waits, the new head is behind
        it. Entries behind that part count as waiting, even those of aborted blocks.

        `ahead`: the worker still has reads to do. Returns a full batch, but only if as much waits
        for every other worker; else None.
        """
        table = self._table
        workers = table.num_workers
        look = self._look(worker, mode, workers)
        cells = look.own or [cell for cell, _ in look.waits[:BATCH_BLOCKS]]
        waiting = look.number + table.tail(mode) - look.end
        if ahead and waiting < workers * len(self._first(cells, mode, len(cells))):
            return None
        chosen = self._first(cells, mode, -(-waiting // workers))
        taken = set(chosen)
        # All that was noted may be taken, where a cell is there twice: the rest waits behind it.
        noted_all = len(look.waits) == look.number
        end = look.end if noted_all else look.waits[-1][1] + 1
        head = next((at for cell, at in look.waits if cell not in taken), end)
        return Choice(list(dict.fromkeys(chosen)), head)  # a cell may be there twice

    def _look(self, worker: int, mode: int, workers: int) -> Look:
        head, tail = self._table.head(mode), self._table.tail(mode)
        most = BATCH_BLOCKS
        # Blocks to read have no home.
        window = most if mode == READ else min(AHEAD_BLOCKS * workers, _MOST_AHEAD)
        end = min(tail, head + window)
        if end - head > _LOOP_ENTRIES:
            return self._look_far(worker, mode, head, end)
        states, modes, homes, lengths = self._states, self._modes, self._homes, self._lengths
        ring, length, full = self._rings[mode], self._table.ring_length, BATCH_BYTES[mode]
        waits: list[tuple[int, int]] = []
        own: list[int] = []
        count = nbytes = 0
        for at in range(head, end):
            cell = ring[at % length]
            if states[cell] != INITIAL or modes[cell] != mode:
                continue
            count += 1
            if len(waits) <= most:
                waits.append((cell, at))
            if homes[cell] not in (0, worker) or len(own) >= most:
                continue
            own.append(cell)
            nbytes += lengths[cell]
            if len(own) >= most or nbytes >= full:
                # A full batch. How much follows matters where it may be less than as much for each
                # of the others; what they have claimed of it, two batches each, does not count.
                enough = workers * len(own) + (workers - 1) * 2 * most
                if tail - at > enough:
                    return Look(count, waits, own, at + 1)
        return Look(count, waits, own, end)

    def _look_far(self, worker: int, mode: int, head: int, end: int) -> Look:
        """`_look` at many entries."""
        most = BATCH_BLOCKS
        places = np.arange(head, end)
        cells = np.asarray(self._rings[mode])[places % self._table.ring_length]
        waits = np.asarray(self._states)[cells] == INITIAL
        waits &= np.asarray(self._modes)[cells] == mode
        cells, places = cells[waits], places[waits]
        homes = np.asarray(self._homes)[cells]
        own = cells[(homes == 0) | (homes == worker)][:most].tolist()
        first = slice(0, most + 1)
        pairs = list(zip(cells[first].tolist(), places[first].tolist(), strict=True))
        return Look(len(cells), pairs, own, end)

    def fullness(self, cells: list[int], mode: int) -> float:
        """How much of a full batch these cells are, by bytes or by blocks."""
        nbytes = sum([self._lengths[cell] for cell in cells])
        return max(nbytes / BATCH_BYTES[mode], len(cells) / BATCH_BLOCKS)

    def _first(self, cells: list[int], mode: int, share: int) -> list[int]:
        """The first `share` of the cells, within the bounds of a batch."""
        lengths, least, most = self._lengths, LEAST_BYTES[mode], BATCH_BYTES[mode]
        nbytes = 0
        for count, cell in enumerate(cells):
            if nbytes >= most or (count >= share and nbytes >= least):
                return cells[:count]
            nbytes += lengths[cell]
        return cells
