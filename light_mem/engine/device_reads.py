"""Blocks of a batch for which a device is waited: which ones they are, and how they are read.

They are read past the page cache (`direct_reads.py`), and brought into it later (`bring_in.py`),
unless the policy is "drop": then all blocks are read so, and none stays.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from light_mem.engine.bring_in import BringIn
from light_mem.engine.copy import Copier
from light_mem.engine.direct_reads import DirectReads
from light_mem.engine.dropping import Dropper
from light_mem.engine.places import Place
from light_mem.errors import StoreFormatError
from light_mem.index.lookup import Location
from light_mem.index.replica import Run

if TYPE_CHECKING:
    import xxhash

    from light_mem.engine.shard_file import ShardFile

# To ask whether a block is in the page cache takes a microsecond. Of shorter blocks than this one
# of four is asked for, the last one too, and all where one is not: a store that was read once since
# the start of the machine is in the page cache or it is not.
_ASK_ALWAYS_BYTES = 1 << 20
_ONE_OF = 4

Blocks = Sequence[tuple[int, Location]]  # position in the batch, where it lies


class DeviceReads:
    """Of one process. Not thread-safe."""

    def __init__(
        self, page_bytes: int, open_file: Callable[[int], ShardFile], dropper: Dropper | None
    ) -> None:
        """`open_file` gives a shard's files; raises OSError, StoreFormatError."""
        self._page_bytes = page_bytes
        self._open_file = open_file
        self._dropper = dropper
        self._direct = DirectReads(page_bytes) if dropper is None else dropper
        self._later = BringIn()
        self._can_read = hasattr(os, "preadv")
        self._waits_for: set[int] = set()

    def begin(self, blocks: Blocks) -> None:
        """A batch is read now, in this order: the device begins with what it is needed for."""
        if self._dropper is not None:
            self._waits_for = {at for at, _ in blocks}
        else:
            self._waits_for = self._cold_ones(blocks) if self._can_read else set()
        if not self._waits_for:
            return
        spans = []
        # What fails here the reads themselves say, each for its block.
        for at, where in blocks:
            if at in self._waits_for:
                try:
                    file = self._open_file(where.shard)
                    spans += [file.past_cache(run, n) for run, n in self.runs(where)]
                except (OSError, StoreFormatError):
                    continue
        try:
            self._direct.plan(spans)
        except OSError:
            pass  # no memory, say

    def waits_for(self, at: int) -> bool:
        """Whether `read` is for the block at this position of the batch."""
        return at in self._waits_for

    def read(
        self,
        file: ShardFile,
        run: Run,
        copier: Copier,
        place: Place,
        checksum: xxhash.xxh3_64 | None,
        stopped: Callable[[], bool],
    ) -> None:
        """Copy the bytes of a run of slots, as long as `place`; raises Stopped, OSError."""
        span, through_cache = file.past_cache(run, place.nbytes), file.span(run, place.nbytes)
        self._direct.read(span, copier, place, checksum, stopped)
        if self._dropper is None and span != through_cache:
            self._later.add(through_cache)

    def runs(self, where: Location) -> list[tuple[Run, int]]:
        """The runs of a block, and how many bytes of it lie in each."""
        if len(where.runs) == 1:
            return [(where.runs[0], where.nbytes)]
        found, left = [], where.nbytes
        for run in where.runs:
            nbytes = min(left, run[1] * self._page_bytes)
            found.append((run, nbytes))
            left -= nbytes
        return found

    def rest(self) -> bool:
        """Do a piece of what can wait; whether there was any."""
        return self._later.next()

    def close(self) -> None:
        """Wait for what is under way; nothing is brought in any more."""
        self._later.clear()
        if isinstance(self._direct, DirectReads):
            self._direct.close()

    def _cold_ones(self, blocks: Blocks) -> set[int]:
        last = len(blocks) - 1
        some = [
            block
            for n, block in enumerate(blocks)
            if n % _ONE_OF == 0 or n == last or block[1].nbytes >= _ASK_ALWAYS_BYTES
        ]
        cold = {at for at, where in some if self._is_cold(where)}
        if cold and len(some) < len(blocks):
            cold = {at for at, where in blocks if self._is_cold(where)}
        return cold

    def _is_cold(self, where: Location) -> bool:
        """Whether the end of a block is not in the page cache: its beginning may have been read
        with a neighbour's end."""
        run, nbytes = self.runs(where)[-1]
        try:
            return not self._open_file(where.shard).is_end_cached(run, nbytes)
        except (OSError, StoreFormatError):
            return False
