"""One process's copy of a shard's free space, kept true by the shard's journal.

The journal in the shard's control page holds the last changes. A holder catches up with what
others did by replaying a few records; after longer absence, or after a death, it reads the
entries instead. Used under the shard's lock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from light_mem.index import format as fmt
from light_mem.index.control import Control
from light_mem.index.recovery import Table, occupied_runs
from light_mem.index.runs import Run, pieces
from light_mem.index.space import FreeRuns

# Changes that a hold which must not take long replays at most: some 6 us each.
NEAR_CHANGES = 128
# Free runs that are noted by a thread of the server, whose other threads stand still meanwhile:
# some 2 ms for so many.
MOST_RUNS = 4096


class ScanNeeded(Exception):
    """What was asked for goes over all entries of a shard, and the hold was not to; see
    `ShardIndex.change`. It never leaves the engine."""


def free_runs(entries: Table, most: float = math.inf) -> FreeRuns:
    """The runs of slots that entries, ENTRY [n], leave free; raises ScanNeeded for more than `most`
    of them."""
    found = [(piece.start, *occupied_runs(entries[piece])) for piece in pieces(len(entries))]
    starts = np.concatenate([first + part for first, part, _ in found])
    lengths = np.concatenate([part for _, _, part in found])
    # Gaps between the furthest end so far and the next start: runs of a damaged index overlap.
    ends = np.maximum.accumulate(np.concatenate(([0], starts + lengths)))
    gaps = np.concatenate((starts, [len(entries)])) - ends
    free = np.flatnonzero(gaps > 0)
    if free.size > most:
        raise ScanNeeded
    return FreeRuns.of_gaps(ends[free].tolist(), gaps[free].tolist())


class SpaceReplica:
    """Free slots of one shard in one process."""

    def __init__(self, control: npt.NDArray[np.void], entries: npt.NDArray[np.void]) -> None:
        self._control = Control(control)
        self._journal = control["journal"][0]
        self._entries = entries
        self._runs: FreeRuns | None = None
        self._epoch = -1
        self._held_from = -1  # the epoch at which this hold began
        # How many free runs this hold may find by going over all entries; 0: it must not.
        self.most_runs = math.inf
        # Allocated in this hold and not marked yet: the entries do not show them.
        self.unmarked: list[Run] = []

    @property
    def runs(self) -> FreeRuns:
        """The free runs. After taking from them, call `taken` to tell the other processes."""
        assert self._runs is not None
        return self._runs

    @property
    def is_near(self) -> bool:
        """Whether few changes are to be replayed, and no entries read. Without the lock, a hint."""
        return self._runs is not None and 0 <= self._control.epoch - self._epoch <= NEAR_CHANGES

    def check_scan(self) -> None:
        """All entries are about to be gone over; raises ScanNeeded where this hold must not."""
        if not self.most_runs:
            raise ScanNeeded

    def begin(self) -> None:
        """A hold of the lock begins: see what others did."""
        self._catch_up()
        self._held_from = self._epoch

    def distrust(self) -> None:
        """Forget the replica (it may contain changes nobody else saw); the next hold reads the
        entries again."""
        self._runs = None

    def _catch_up(self) -> None:
        epoch = self._control.epoch
        runs = self._runs
        if runs is None or not 0 <= epoch - self._epoch <= fmt.JOURNAL_LENGTH:
            self.read()
            return
        self._runs = None  # until all is replayed: an exception leaves none, rather than wrong ones
        for at in range(self._epoch, epoch):
            record = int(self._journal[at % fmt.JOURNAL_LENGTH])
            start, length = record >> 32, record & fmt.JOURNAL_LENGTH_MASK
            replay = runs.add if record & fmt.JOURNAL_FREED else runs.remove
            sound = 0 < length <= len(self._entries) - start
            if not sound or not replay(start, length):
                self.read()
                return
        self._epoch = epoch
        self._runs = runs

    def read(self) -> None:
        """Read the entries instead of the journal."""
        self._runs = None
        self.check_scan()
        runs = free_runs(self._entries, self.most_runs)
        for start, length in self.unmarked:
            runs.remove(start, length)
        self._epoch = self._control.epoch
        self._runs = runs  # last: an exception before leaves none

    def put_back(self, runs: Iterable[Run]) -> bool:
        """Runs are free again, and nobody has been told that they were taken; False: damage."""
        added = [self.runs.add(start, length) for start, length in runs]
        return all(added)

    def free(self, runs: list[Run]) -> bool:
        """Runs are free again, and others are told; False: some were free already: damage."""
        if not self.put_back(runs):
            return False
        self._tell(runs, freed=True)
        self._control.used_slots -= sum(length for _, length in runs)
        return True

    def taken(self, runs: list[Run]) -> None:
        """Tell others of runs that were taken from `runs`."""
        self._tell(runs, freed=False)
        self._control.used_slots += sum(length for _, length in runs)
        self.unmarked += runs

    def _tell(self, runs: Iterable[Run], freed: bool) -> None:
        """Write runs into the journal."""
        mark = fmt.JOURNAL_FREED if freed else 0
        journal = self._journal
        for start, length in runs:
            if self._epoch > self._held_from:
                # The last record of this hold, which nobody has seen, may just grow: a batch that
                # fills neighbouring slots is one record, and others need not read the entries.
                last = int(journal[(self._epoch - 1) % fmt.JOURNAL_LENGTH])
                first, count = last >> 32, last & fmt.JOURNAL_LENGTH_MASK
                if last & fmt.JOURNAL_FREED == mark and first + count == start:
                    journal[(self._epoch - 1) % fmt.JOURNAL_LENGTH] = (
                        first << 32 | mark | count + length
                    )
                    continue
            journal[self._epoch % fmt.JOURNAL_LENGTH] = start << 32 | mark | length
            self._epoch += 1
        self._control.epoch = self._epoch
