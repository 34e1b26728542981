"""One batch to read, as the reader asks for it: where its blocks lie, and in which order."""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from light_mem.engine.base import BlockIO, Job, Report, Stop
from light_mem.engine.device_reads import Ways
from light_mem.index.lookup import Location, Lookup

# A block whose bytes lie in their pages and that nobody has been told of: position, where it lay,
# and the checksum of what was copied (None: it is not asked for).
Copied = tuple[int, Location, "xxhash.xxh3_64 | None"]


class ReadJob(Job):
    """A batch to read.

    entries   where the index lists the blocks, -1: it does not
    located   where they lie; None: not listed, or listed with runs that make no sense
    order     positions in the batch, in the order of the files: how a device reads ahead
    ahead     the blocks to read, in the order in which they are read: position, and where
    ways      how those are read that wait for a device
    by_calls  whether the others are not to be read through the mapping either
    """

    def __init__(
        self,
        batch: Sequence[BlockIO],
        lookup: Lookup,
        report: Report,
        stop: Stop,
        entries: list[int] | None = None,
    ) -> None:
        super().__init__(batch, report, stop)
        keys = [block[:2] for block in batch]
        self.entries, self.located = _look_up(lookup, keys, entries)
        self.order = sorted(range(len(batch)), key=self.entries.__getitem__)
        self.ahead: list[tuple[int, Location]] = []
        self.ways: Ways = {}
        self.by_calls = False

    def there(self) -> list[tuple[int, Location]]:
        """The blocks that are there, in the order of the files: position, and where."""
        return [(at, where) for at in self.order if (where := self.located[at]) is not None]

    def where(self, at: int) -> Location:
        """Where a block lies that is there."""
        where = self.located[at]
        assert where is not None
        return where


def _look_up(
    lookup: Lookup, keys: list[tuple[int, int]], entries: list[int] | None
) -> tuple[list[int], list[Location | None]]:
    """Where the index lists the blocks, and where they lie. Most still are where `entries` says."""
    found = [-1] * len(keys) if entries is None else list(entries)
    located = lookup.locate_each(found, keys)
    missed = [at for at, where in enumerate(located) if where is None]
    for at, entry in zip(missed, lookup.find_each([keys[at] for at in missed]), strict=True):
        found[at] = entry
        located[at] = lookup.locate(entry, *keys[at]) if entry >= 0 else None
    return found, located
