"""Where a gather puts a block's bytes: mapped slots, or a file by system calls."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from light_mem.engine.places import Bytes2D, RowNumbers

# What stores: `call(first, piece)` a piece, uint8, contiguous; `call(*arguments)` rows.
Store = tuple[Callable[[Any, memoryview], object], object]
StoreRows = tuple[Callable[..., object], tuple[object, ...]]


class Sink(Protocol):
    """Where a gather puts a run of slots. It says beforehand what stores a piece, so that between
    two copies there is only the call; `at` counts bytes from the run's start."""

    by_calls: bool  # whether it is system calls that store

    def storing(self, at: int, nbytes: int) -> Store:
        """What stores a piece of so many bytes."""

    def storing_rows(
        self, at: int, memory: Bytes2D, rows: RowNumbers, views: Sequence[memoryview]
    ) -> StoreRows:
        """What stores rows of the memory, one after the other; `views`: the same rows."""


class MappedSink:
    """Slots that this process has mapped, or other memory: uint8 [bytes], contiguous."""

    by_calls = False

    def __init__(self, slots: memoryview) -> None:
        self._slots = slots

    def storing(self, at: int, nbytes: int) -> Store:
        return self._slots[at : at + nbytes].__setitem__, _ALL

    def storing_rows(
        self, at: int, memory: Bytes2D, rows: RowNumbers, views: Sequence[memoryview]
    ) -> StoreRows:
        row_bytes = memory.shape[1]
        slots = np.frombuffer(self._slots, np.uint8, len(rows) * row_bytes, at)
        # "clip" writes straight to `out`; "raise" would go through a buffer. The rows were checked
        # when the task was made.
        return memory.take, (rows, 0, slots.reshape(len(rows), row_bytes), "clip")


_ALL = slice(None)


class FileSink:
    """Slots of a file from byte `base` on, by system calls; raises OSError.

    For slots that this process has not mapped yet: there a store to the mapping costs a page fault
    every 4 KiB, four times the copy on a fresh file.

    What is put had better be mapped: a page of the KV memory that this process has not touched yet
    stops the kernel's copy, which then fills what it had meant to write with zeros and starts again
    there: half of the time of a first fill (Linux 6.18; perf: zero_user_segments). Whoever writes
    many blocks touches them before (`first_touch`, `is_put_straight`).
    """

    by_calls = True

    def __init__(self, descriptor: int, base: int) -> None:
        self._descriptor = descriptor
        self._base = base

    def storing(self, at: int, nbytes: int) -> Store:
        return self.put, at

    def storing_rows(
        self, at: int, memory: Bytes2D, rows: RowNumbers, views: Sequence[memoryview]
    ) -> StoreRows:
        return self.put_each, (at, views)

    def put(self, at: int, piece: memoryview | bytes) -> None:
        """Store a piece."""
        self.put_each(at, [piece])

    def put_each(self, at: int, pieces: Sequence[memoryview | bytes]) -> None:
        """Store pieces, one after the other."""
        at += self._base
        wanted = sum(map(len, pieces))
        done = os.pwritev(self._descriptor, pieces, at)
        if done < wanted:  # a signal, or the end of the room: the rest says which
            rest = memoryview(b"".join(pieces))[done:]
            while rest:
                written = os.pwrite(self._descriptor, rest, at + done)
                rest, done = rest[written:], done + written
