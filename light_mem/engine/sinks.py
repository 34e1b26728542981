"""Where a gather puts a block's bytes: mapped slots, or a file by system calls."""

from __future__ import annotations

import os
from typing import Protocol

from light_mem.engine.places import Bytes1D, Bytes2D, RowNumbers


class Sink(Protocol):
    """Where a gather puts a run of slots; `at` counts bytes from its start."""

    by_calls: bool  # whether it is system calls that store

    def put(self, at: int, piece: Bytes1D) -> None:
        """Store a piece."""

    def put_rows(self, at: int, memory: Bytes2D, rows: RowNumbers) -> None:
        """Store rows of the memory, one after the other."""


class MappedSink:
    """Slots that this process has mapped, or other memory: uint8 [bytes], contiguous."""

    by_calls = False

    def __init__(self, slots: Bytes1D) -> None:
        self._slots = slots

    def put(self, at: int, piece: Bytes1D) -> None:
        self._slots[at : at + len(piece)] = piece

    def put_rows(self, at: int, memory: Bytes2D, rows: RowNumbers) -> None:
        row_bytes = memory.shape[1]
        out = self._slots[at : at + len(rows) * row_bytes].reshape(len(rows), row_bytes)
        # "clip" writes straight to `out`; "raise" would go through a buffer. The rows were checked
        # when the task was made.
        memory.take(rows, 0, out, "clip")


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

    def put(self, at: int, piece: Bytes1D) -> None:
        self._write([piece.data], at)

    def put_rows(self, at: int, memory: Bytes2D, rows: RowNumbers) -> None:
        self._write([memory[row].data for row in rows.tolist()], at)

    def _write(self, pieces: list[memoryview], at: int) -> None:
        at += self._base
        wanted = sum(map(len, pieces))
        done = os.pwritev(self._descriptor, pieces, at)
        if done < wanted:  # a signal, or the end of the room: the rest says which
            rest = memoryview(b"".join(pieces))[done:]
            while rest:
                written = os.pwrite(self._descriptor, rest, at + done)
                rest, done = rest[written:], done + written
