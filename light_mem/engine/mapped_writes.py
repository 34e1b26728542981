"""How the slots of a mapped file are written: by `pwrite` or by stores to the mapping.

A store to a page that this process may not write to yet is a fault; a `pwrite` needs none. So what
was not written of late goes by calls, and what is written again soon goes through the mapping. What
the first stores cost depends on what the page table holds: a page that the kernel has protected (it
was written to the device, or only read here) faults by itself, 2 to 4 us every 4 KiB, and ext4
looks at all of its folio each time. Where the page table holds nothing, Linux 6.18 maps a whole
folio (8 to 15 pages in the mean) by one fault. So the slots are taken out of it before their first
stores: pages of 60 KB, us a page of 4 KiB: by calls 0.73, first stores 0.88 (3.3 with what was
there left in), further stores 0.48; pages of 3,840 bytes 0.75, 1.11 (3.0), 0.48.
"""

from __future__ import annotations

import mmap
import sys
from typing import cast

import numpy as np

from light_mem.engine.copy import Stopping
from light_mem.engine.dirty_pages import DirtyPages
from light_mem.engine.sinks import FileSink, MappedSink, OpenFile, Sink

if sys.platform == "linux":
    import resource

_PAGE = mmap.PAGESIZE

SOON_SECONDS = 5.0  # slots that are written again within them may be so once more
# How many times in a row a run is written by calls before it goes through the mapping. Where one
# fault maps many pages, the first stores pay in the write after them: 5.4, 6.6, 8.5, 9.6 and 10.0
# GB/s in the first five writes after a `sync` (two workers, pages of 60 KB), with four calls 6.0,
# 6.0, 6.6, 6.0 and 3.9. Where each page faults, they cost as much as they save in four to five
# writes.
CALLS_BEFORE = 1
CALLS_BEFORE_FAULTS = 4
# Shorter slots share their folios with others that stay in the page table: there each page faults.
LEAST_BYTES = 64 * 1024


class MappedWrites:
    """Of one file, as one process maps it. Not thread-safe."""

    def __init__(
        self, mapping: mmap.mmap, descriptor: int, base: int, slots: int, slot_bytes: int
    ) -> None:
        """The slots lie one after the other, from byte `base` of the file on."""
        self._mapping, self._file = mapping, OpenFile(descriptor)
        self._base, self._slot_bytes = base, slot_bytes
        self._bytes = np.frombuffer(mapping, np.uint8)
        self._dirty = DirtyPages()
        # Per slot that began or ended a run: when this process last wrote it (s, monotonic;
        # negative: by pwrite; 0: never). Per slot that began one: how many pwrites came in quick
        # succession. Zeros take no memory until they are overwritten, so readers do not pay 9 bytes
        # a slot.
        self._written_at = np.zeros(slots)
        self._written = cast("memoryview[float]", self._written_at.data)
        self._calls = np.zeros(slots, np.uint8).data
        self.calls_before = CALLS_BEFORE
        self.begin(0.0)

    def close(self) -> None:
        """The descriptor is closed, and may be another file's: writes by calls fail (EBADF), of
        sinks that were given out before as well."""
        self._file.descriptor = -1

    def begin(self, now: float) -> None:
        """Begin to write runs of slots, at `now`, s (monotonic). The caller asks `sink` for each
        run, calls `start`, puts them all, and calls `was_put` for each, unless a put failed."""
        self._now = now
        self._wanted = 0  # bytes of those runs
        self._taken_out = 0  # ... of which so many are taken out of the page table
        self._faults = 0  # of this thread before they were put

    def sink(self, start: int, length: int, by_calls: bool = False) -> Sink:
        """How a run of slots is written. `by_calls`: not through the mapping in any case."""
        now = self._now
        # The ends stand for the run: where slots between them are older, some faults are all.
        last, other = self._written[start], self._written[start + length - 1]
        if other != last:
            last = min(last, other, key=abs)
        at, nbytes = self._base + start * self._slot_bytes, length * self._slot_bytes
        self._wanted += nbytes
        first_stores = last <= 0
        if (
            by_calls
            or (first_stores and not self._may_pay(nbytes, last, self._calls[start], now))
            or not self._dirty.need_no_fault(self._file.descriptor, at, nbytes, last, now)
        ):
            return FileSink(self._file, at)
        if first_stores and nbytes >= LEAST_BYTES:
            self._take_out(at, nbytes)
        return MappedSink(self._bytes[at : at + nbytes])

    def start(self) -> None:
        """Begin counting faults: those between `begin` and here belong to other files."""
        if sys.platform == "linux" and self._taken_out:
            self._faults = _faults()

    def leaving_out(self, stopped: Stopping) -> Stopping:
        """`stopped`, with the page faults it causes left out of the count: a worker reads other
        blocks in it, between two puts. To be called after `start`."""
        if sys.platform != "linux" or not self._taken_out or stopped is None:
            return stopped
        ask = stopped

        def asked() -> bool:
            before = _faults()
            stop = ask()
            self._faults += _faults() - before
            return stop

        return asked

    def was_put(self, start: int, length: int, sink: Sink) -> None:
        """A run of slots was written."""
        written, now = self._written, self._now
        if sink.by_calls:
            in_a_row = self._calls[start] + 1 if _is_soon(written[start], now) else 1
            self._calls[start] = min(in_a_row, CALLS_BEFORE_FAULTS)
            now = -now
        elif self._taken_out:
            self._learn()
        written[start] = written[start + length - 1] = now

    def _may_pay(self, nbytes: int, written: float, calls: int, now: float) -> bool:
        """Whether first stores may pay in later ones."""
        before = self.calls_before if nbytes >= LEAST_BYTES else CALLS_BEFORE_FAULTS
        return calls >= before and _is_soon(written, now)

    def _take_out(self, at: int, nbytes: int) -> None:
        """Take what will be stored to out of the page table."""
        if sys.platform == "linux":  # where it is sure to leave the bytes alone (madvise(2))
            first, end = at // _PAGE * _PAGE, -(-(at + nbytes) // _PAGE) * _PAGE
            try:
                self._mapping.madvise(mmap.MADV_DONTNEED, first, end - first)
            except OSError:  # this process has it locked, mlock(2): each page faults
                self.calls_before = CALLS_BEFORE_FAULTS
                return
            self._taken_out += nbytes

    def _learn(self) -> None:
        """Whether the first stores were a fault each page, if they were nearly all there was: the
        others' faults count as well."""
        if sys.platform == "linux" and self._taken_out * 10 >= self._wanted * 9:
            faults = _faults() - self._faults
            few = faults * _PAGE * 2 <= self._taken_out
            self.calls_before = CALLS_BEFORE if few else CALLS_BEFORE_FAULTS
        self._taken_out = 0


def _faults() -> int:
    """Page faults of this thread by now. Linux."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


def _is_soon(written: float, now: float) -> bool:
    """Whether a write comes soon after one by calls."""
    return written < 0 and now + written < SOON_SECONDS
