"""Where a gather puts a block's bytes: mapped slots, or a file by system calls."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from light_mem.engine.places import Bytes1D, Bytes2D, RowNumbers

# What stores: `call(first, piece)` a piece, `call(*arguments)` rows.
Store = tuple[Callable[[Any, Bytes1D], object], object]
StoreRows = tuple[Callable[..., object], tuple[object, ...]]


class Sink(Protocol):
    """Where a gather puts a run of slots. It says beforehand what stores a piece, so that between
    two copies there is only the call. All are called, in the order in which they were asked for,
    unless the copy fails; `at` counts bytes from the run's start."""

    by_calls: bool  # whether it is system calls that store

    def storing(self, at: int, nbytes: int) -> Store:
        """What stores a piece of so many bytes."""

    def storing_rows(self, at: int, memory: Bytes2D, rows: RowNumbers) -> StoreRows:
        """What stores rows of the memory, one after the other."""


class MappedSink:
    """Slots that this process has mapped, or other memory: uint8 [bytes], contiguous."""

    by_calls = False

    def __init__(self, slots: Bytes1D) -> None:
        self._slots = slots

    def storing(self, at: int, nbytes: int) -> Store:
        # Not a memoryview: assigning to one, the thread keeps the GIL.
        return np.copyto, self._slots[at : at + nbytes]

    def storing_rows(self, at: int, memory: Bytes2D, rows: RowNumbers) -> StoreRows:
        row_bytes = memory.shape[1]
        out = self._slots[at : at + len(rows) * row_bytes].reshape(len(rows), row_bytes)
        # "clip" writes straight to `out`; "raise" would go through a buffer. The rows were checked
        # when the task was made.
        return memory.take, (rows, 0, out, "clip")


class OpenFile:
    """A descriptor as long as it is open: -1 then, for its number may be another file's by now."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor


class FileSink:
    """Slots of a file from byte `base` on, by system calls; raises OSError.

    For slots that this process has not mapped yet: there a store to the mapping costs a page fault
    every 4 KiB, four times the copy on a fresh file.

    The source should be mapped: at a page of the KV memory that this process has not touched yet
    the kernel's copy stops, fills the rest of its target with zeros, and starts again there. That
    took half the time of a first fill (Linux 6.18; perf: zero_user_segments). So the pages of a
    batch are touched before (`first_touch`, `is_put_straight`).
    """

    by_calls = True

    def __init__(self, file: OpenFile, base: int) -> None:
        self._file = file
        self._base = base

    def storing(self, at: int, nbytes: int) -> Store:
        return self.put, at

    def storing_rows(self, at: int, memory: Bytes2D, rows: RowNumbers) -> StoreRows:
        return self._put_each, (at, [memory[row] for row in rows.tolist()])

    def put(self, at: int, piece: Bytes1D | bytes) -> None:
        """Store a piece."""
        self._put_each(at, [piece])

    def _put_each(self, at: int, pieces: Sequence[Any]) -> None:
        """Store pieces, bytes each, one after the other."""
        at += self._base
        wanted = sum(map(len, pieces))
        done = os.pwritev(self._file.descriptor, pieces, at)
        if done < wanted:  # a signal, or the end of the room: the rest says which
            rest = memoryview(b"".join(pieces))[done:]
            while rest:
                written = os.pwrite(self._file.descriptor, rest, at + done)
                rest, done = rest[written:], done + written
