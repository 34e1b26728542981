"""Has the kernel map pages of the KV memory many at a time, before this process copies them.

The first store to a page that the process has not mapped is a fault for that one page, twice as
long as its copy. A load that faults has the kernel map what lies around it as well, AROUND_BYTES of
pages that are there already, and those of shared memory it maps for stores too (do_fault_around in
Linux's mm/memory.c). So rows are read at their ends before the first store to them: 245 MB of pages
of 3,840 bytes that a new worker reads by `preadv` cost 8,400 faults instead of 92,900, and 0.10
seconds of the kernel's time instead of 0.25 (Linux 6.18). A `pwrite` from pages that are not mapped
is slow as well (`sinks.FileSink`). This creates no pages other than those of the rows, and maps
only the surroundings of rows that the process used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from light_mem.engine.places import Bytes1D, Bytes2D, Place, Regions, RowNumbers, Rows

AROUND_BYTES = 64 * 1024  # what one fault maps, so aligned: Linux's default of fault_around_bytes

Positions = npt.NDArray[np.intp]


class FirstTouch:
    """What of the KV memory this process has touched. Not thread-safe."""

    def __init__(self) -> None:
        self._memories: dict[type, _Memory] = {}  # of rows, and of regions

    def before_copies(
        self, places: Sequence[Place], needed: Callable[[Place], bool] | None = None
    ) -> None:
        """Touch what lies at these places, or those of them where it is `needed`, unless that was
        done before. Blocks that each bring their own memory (an import) are skipped: their maker
        has just written that memory."""
        if self._is_done(places):
            return
        if needed is not None:
            places = [place for place in places if needed(place)]
        for kind in (Rows, Regions):
            alike = [place for place in places if type(place) is kind]
            memories = {id(place.memory) for place in alike}
            if len(memories) != 1:
                continue
            array = alike[0].memory
            memory = self._memories.get(kind)
            if memory is None or memory.array is not array:
                memory = self._memories[kind] = _Memory(array)
            if memory.left:
                memory.touch(alike)

    def _is_done(self, places: Sequence[Place]) -> bool:
        """Whether they all lie in one memory of which everything has been touched."""
        if not places:
            return True
        known = self._memories.get(type(places[0]))
        if known is None or known.left:
            return False
        return {id(place.memory) for place in places} == {id(known.array)}

    def forget(self) -> None:
        """Let go of the memories."""
        self._memories.clear()


class _Memory:
    def __init__(self, array: Bytes1D | Bytes2D) -> None:
        self.array = array
        self._flat = array.reshape(-1)
        self._before = array.ctypes.data % AROUND_BYTES  # from where the first is aligned
        self._touched = np.zeros(-(-(self._before + array.nbytes) // AROUND_BYTES), np.bool_)
        self.left = len(self._touched)

    def touch(self, places: Sequence[Place]) -> None:
        if isinstance(places[0], Rows):
            numbers = np.concatenate([place.numbers for place in places if isinstance(place, Rows)])
            row_bytes = places[0].memory.shape[1]
            if row_bytes > 2 * AROUND_BYTES:
                # What lies around its middle is of this row alone: touched, the row has been.
                middles = numbers * row_bytes + (self._before + row_bytes // 2)
                numbers = numbers[~self._touched[middles // AROUND_BYTES]]
            if numbers.size:
                self._touch(_positions_of_rows(numbers, row_bytes))
        else:
            lists = [place.regions for place in places if isinstance(place, Regions)]
            self._touch(_positions_of_regions(lists))

    def _touch(self, at: Positions) -> None:
        around = (at + self._before) // AROUND_BYTES
        new = ~self._touched[around]
        if new.any():
            self._flat[at[new]]
            self._touched[around] = True
            # Not np.unique: that imports numpy.ma, 30 ms in the first read of a worker. And not by
            # counting the bitmap: 0.1 ms a block for 128 GiB of KV memory.
            self.left -= len(set(around[new].tolist()))


# Positions such that every AROUND_BYTES block that a row or region touches contains one of them.


def _positions_of_rows(numbers: RowNumbers, row_bytes: int) -> Positions:
    at: Positions = numbers * row_bytes
    if row_bytes <= AROUND_BYTES // 8:
        return at  # few reach over an edge, and what lies there are other rows
    return _stretches(at, np.full(len(at), row_bytes))


def _positions_of_regions(lists: list[list[tuple[int, int]]]) -> Positions:
    flat = chain.from_iterable(chain.from_iterable(lists))
    table = np.fromiter(flat, np.intp).reshape(-1, 2)
    table = table[table[:, 1] > 0]  # an empty one may lie at the very end
    return _stretches(table[:, 0], table[:, 1])


def _stretches(offsets: Positions, lengths: Positions) -> Positions:
    """Positions for regions: both ends of each, and one every AROUND_BYTES between them."""
    ends = offsets + lengths - 1
    counts = -(-lengths // AROUND_BYTES)
    if (counts <= 1).all():
        return np.concatenate([offsets, ends])
    steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.concatenate([np.repeat(offsets, counts) + steps * AROUND_BYTES, ends])
