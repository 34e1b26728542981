"""Blocks of a batch for which a device is waited: which ones they are, and how they are read.

Always ahead, by threads (`direct_reads.py`), and in one of two ways:

past the page cache     what is cold, and all with the policy "drop"; the other policy brings it in
                        later (`bring_in.py`)
through the page cache  what is read cold for the second time before it could be brought in; and
                        blocks of a shard that is being written: while O_DIRECT reads from a file of
                        ext4, who writes to it by calls waits for the device (a `pwrite` of 256 KiB
                        took 1.5 ms instead of 20 us)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from light_mem.engine import page_cache
from light_mem.engine.base import Stop
from light_mem.engine.bring_in import BringIn
from light_mem.engine.copy import Stopping
from light_mem.engine.direct_reads import DirectReads
from light_mem.engine.places import Place
from light_mem.engine.read_ahead import Span
from light_mem.engine.scatter import Scatterer
from light_mem.errors import StoreFormatError
from light_mem.index.lookup import Location
from light_mem.index.runs import Run, cut_at_runs

if TYPE_CHECKING:
    import xxhash

    from light_mem.engine.shard_file import ShardFile

# A shard in which nothing was stored for so long is not being written.
QUIET_SECONDS = 1.0

Blocks = Sequence[tuple[int, Location]]  # position in the batch, where it lies
Way = tuple[Span, "Span | None"]  # what is read, and what is to be brought in then
Ways = dict[int, list[Way]]  # of the blocks that wait for a device, by position; one a run


class DeviceReads:
    """Of one process. Not thread-safe."""

    def __init__(
        self,
        page_bytes: int,
        open_file: Callable[[int], ShardFile],
        stored: Callable[[int], int],
        drops: bool,
    ) -> None:
        """`open_file` gives a shard's files, or raises OSError, StoreFormatError; `stored` how many
        blocks were ever stored in a shard. `drops`: the policy is "drop"."""
        self._page_bytes = page_bytes
        self._open_file = open_file
        self._stored = stored
        self._drops = drops
        self._direct = DirectReads(page_bytes)
        self._later = BringIn()
        self.can_read = hasattr(os, "preadv")
        # Of each shard: how many blocks had been stored in it, and when that was seen to change.
        self._changes: dict[int, tuple[int, float]] = {}

    def begin(self, blocks: Blocks, stop: Stop, more: bool = False) -> Ways:
        """A batch is read next, in this order. The device begins with those of its blocks that need
        it and were not aborted; returns how they are read. `more`: the batch before has not been
        read yet, and comes first."""
        found: Ways = {}
        if not self.can_read:
            return found
        # What fails here the reads themselves say, each for its block.
        for at, where, file in self._waiting(blocks):
            if stop(at):
                continue
            past_cache = self._drops or self._is_quiet(where.shard)
            try:
                found[at] = [
                    self._way(file, run, end - start, past_cache)
                    for run, start, end in cut_at_runs(where.runs, where.nbytes, self._page_bytes)
                ]
            except OSError:
                continue
        if found:
            try:
                self._direct.plan([span for ways in found.values() for span, _ in ways], more)
            except OSError:
                pass  # no memory, say
        return found

    @property
    def have_landed(self) -> bool:
        """Whether the device has given all that it began with."""
        return self._direct.have_landed

    def through_cache(self, where: Location) -> list[Way]:
        """How a block is read by calls that waits for no device. Raises OSError,
        StoreFormatError."""
        file = self._open_file(where.shard)
        parts = cut_at_runs(where.runs, where.nbytes, self._page_bytes)
        return [(file.span(run, end - start), None) for run, start, end in parts]

    def read(
        self,
        way: Way,
        scatterer: Scatterer,
        place: Place,
        checksum: xxhash.xxh3_64 | None,
        stopped: Stopping,
    ) -> None:
        """Copy the bytes of a run of slots, as long as `place`; raises Stopped, OSError."""
        span, later = way
        try:
            self._direct.read(span, scatterer, place, checksum, stopped)
        finally:
            if self._drops:  # some of it may be in the page cache all the same
                page_cache.drop(*span)
        if later is not None:
            self._later.add(later)

    @property
    def has_later(self) -> bool:
        """Whether there is something to be brought in."""
        return bool(self._later)

    def bring_in(self) -> bool:
        """Bring in a piece of what was read past the page cache; whether there was any."""
        return self._later.next()

    def close(self) -> None:
        """Wait for what is under way; nothing is brought in any more."""
        self._later.clear()
        self._direct.close()

    def _waiting(self, blocks: Blocks) -> list[tuple[int, Location, ShardFile]]:
        """Those of the blocks for which a device is waited, and their files."""
        there: list[tuple[int, Location, ShardFile]] = []
        middles: list[int] = []
        for at, where in blocks:
            try:
                file = self._open_file(where.shard)
            except (OSError, StoreFormatError):
                continue
            there.append((at, where, file))
            middles.append(self._middle(where, file))
        if self._drops:
            return there
        held = page_cache.hold_each(middles)
        return [block for block, is_held in zip(there, held, strict=True) if not is_held]

    def _middle(self, where: Location, file: ShardFile) -> int:
        """The address of the middle of a block's last run, which says whether the block is in the
        page cache: the ends of a run may have been read with its neighbours."""
        if len(where.runs) == 1:
            return file.address(where.slot) + where.nbytes // 2
        (slot, _), start, end = cut_at_runs(where.runs, where.nbytes, self._page_bytes)[-1]
        return file.address(slot) + (end - start) // 2

    def _way(self, file: ShardFile, run: Run, nbytes: int, past_cache: bool) -> Way:
        through_cache = file.span(run, nbytes)
        if self._later.take(through_cache) or not past_cache:
            return through_cache, None
        span = file.past_cache(run, nbytes)
        return span, None if self._drops or span == through_cache else through_cache

    def _is_quiet(self, shard: int) -> bool:
        """Whether nobody has stored blocks in a shard lately. At the first look, with nothing to
        compare with, the shard counts as quiet."""
        now, stored = time.monotonic(), self._stored(shard)
        before, since = self._changes.get(shard, (stored, now - QUIET_SECONDS))
        if stored != before:
            since = now
        self._changes[shard] = stored, since
        return now - since >= QUIET_SECONDS
