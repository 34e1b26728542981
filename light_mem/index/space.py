"""Free runs of slots of one shard: sorted by place, to merge; by length, for the best fit.

A replica in one process; replica.py keeps it true by replaying the shared journal. Not thread-safe:
used under the shard's lock. Also hands out ranges of the task table.
"""

from __future__ import annotations

from collections.abc import Iterable

from sortedcontainers import SortedDict, SortedList

from light_mem.index.runs import Run


class FreeRuns:
    """Half-open runs `[start, start + length)` that do not touch each other.

    An exception in the middle of a call (a signal handler's, no memory) leaves them inconsistent:
    the caller must then build them again.
    """

    def __init__(self, runs: Iterable[Run] = ()) -> None:
        self._by_start: SortedDict = SortedDict()
        self._by_length: SortedList = SortedList()
        self.total = 0
        for start, length in runs:
            self.add(start, length)

    @classmethod
    def of_gaps(cls, starts: list[int], lengths: list[int]) -> FreeRuns:
        """Runs that are known not to touch each other, by place; much faster than one by one."""
        space = cls()
        space._by_start.update(zip(starts, lengths, strict=True))
        space._by_length.update(zip(lengths, starts, strict=True))
        space.total = sum(lengths)
        return space

    def __len__(self) -> int:
        return len(self._by_start)

    def runs(self) -> list[Run]:
        """All runs by place."""
        return list(self._by_start.items())

    @property
    def longest(self) -> int:
        """Length of the longest run, 0 when nothing is free."""
        return self._by_length[-1][0] if self._by_length else 0

    def take(self, length: int) -> int | None:
        """Take `length` slots in one piece from the shortest run that fits; None: none does."""
        at = self._by_length.bisect_left((length, -1))
        if at == len(self._by_length):
            return None
        found, start = self._by_length.pop(at)
        del self._by_start[start]
        if found > length:
            self._insert(start + length, found - length)
        self.total -= length
        return int(start)

    def take_pieces(self, length: int) -> list[Run] | None:
        """Take `length` slots from the longest runs, in as few pieces as it goes, by place."""
        if self.total < length:
            return None
        pieces = []
        while length:
            found, start = self._by_length.pop()
            del self._by_start[start]
            part = min(found, length)
            if found > part:
                self._insert(start + part, found - part)
            pieces.append((int(start), int(part)))
            self.total -= part
            length -= part
        return sorted(pieces)

    def remove(self, start: int, length: int) -> bool:
        """Take exactly this run, as another process did; False: it was not all free."""
        at = self._by_start.bisect_right(start) - 1
        if at < 0:
            return False
        first, found = self._by_start.peekitem(at)
        if first + found < start + length:
            return False
        self._drop(first, found)
        if first < start:
            self._insert(first, start - first)
        if start + length < first + found:
            self._insert(start + length, first + found - start - length)
        self.total -= length
        return True

    def add(self, start: int, length: int) -> bool:
        """Free a run, which merges with its neighbours; False: some of it was free already."""
        at = self._by_start.bisect_left(start)
        after, after_length = before, before_length = -1, 0
        if at < len(self._by_start):
            after, after_length = self._by_start.peekitem(at)
            if start + length > after:
                return False
        if at > 0:
            before, before_length = self._by_start.peekitem(at - 1)
            if before + before_length > start:
                return False
        self.total += length
        if start + length == after:
            self._drop(after, after_length)
            length += after_length
        if before >= 0 and before + before_length == start:
            self._drop(before, before_length)
            start, length = before, before_length + length
        self._insert(start, length)
        return True

    def _insert(self, start: int, length: int) -> None:
        self._by_start[start] = length
        self._by_length.add((length, start))

    def _drop(self, start: int, length: int) -> None:
        del self._by_start[start]
        self._by_length.remove((length, start))
