"""The kernel's page cache of one file, by ranges: write out, wait for it, drop.

What the calls promise is little, and each step depends on the one before: `drop` leaves dirty
pages and pages that any process has mapped; `start_write_out` begins with the pages that are dirty
now and does not wait; `finish_write_out` waits, and is no sync: it asks the device for no flush
of its own cache and writes no metadata. A range is bytes `[at, at + nbytes)`.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Any

from light_mem.errors import InvalidArgumentError

log = logging.getLogger("light_mem")

KEEP, DROP = "keep", "drop"

_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4
_PAGE = mmap.PAGESIZE


def _find(name: str, library: type[ctypes.CDLL], *arguments: Any) -> Callable[..., int] | None:
    """A call of the C library that returns an int; None where the system lacks it."""
    try:
        call = getattr(library(None, use_errno=True), name)
    except (OSError, AttributeError):
        return None
    call.argtypes = arguments
    call.restype = ctypes.c_int
    found: Callable[..., int] = call
    return found


# Linux alone has it.
_sync_file_range = _find(
    "sync_file_range", ctypes.CDLL, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint
)
# With the GIL: it takes a microsecond.
_mincore = _find("mincore", ctypes.PyDLL, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


def can_drop() -> bool:
    """Whether this system has the calls; without them only "keep" is left."""
    return _sync_file_range is not None and hasattr(os, "posix_fadvise")


def choose(policy: object) -> str:
    """ "keep" or "drop" as asked for, "keep" with a log line where the system cannot drop; raises
    InvalidArgumentError for anything else."""
    if policy not in (KEEP, DROP):
        raise InvalidArgumentError(
            f'page_cache is "{KEEP}" or "{DROP}", not {policy!r}', page_cache=policy
        )
    if policy == DROP and not can_drop():
        log.warning(
            'page_cache "drop" needs posix_fadvise and sync_file_range, which this system lacks: '
            "the kernel decides what it keeps"
        )
        return KEEP
    return str(policy)


def start_write_out(descriptor: int, at: int, nbytes: int) -> None:
    """Have the dirty pages of a range written, without waiting, unless the device's queue is full;
    raises OSError."""
    _sync(descriptor, at, nbytes, _WRITE)


def finish_write_out(descriptor: int, at: int, nbytes: int) -> None:
    """Wait until the range's pages are written; raises OSError, also for a write that failed."""
    _sync(descriptor, at, nbytes, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)


def _sync(descriptor: int, at: int, nbytes: int, flags: int) -> None:
    if _sync_file_range is not None and _sync_file_range(descriptor, at, nbytes, flags) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"sync_file_range: {os.strerror(code)}")


def drop(descriptor: int, at: int, nbytes: int) -> None:
    """Take the range's clean pages out of the cache, those that nobody has mapped.

    A page that is shared with the next range stays, until that range is dropped. A page that is
    shared with the range before goes. So of ranges that are dropped in order nothing is left.
    """
    first = at - at % _PAGE
    last = at + nbytes
    last -= last % _PAGE
    if last > first:
        os.posix_fadvise(descriptor, first, last - first, os.POSIX_FADV_DONTNEED)


def read_no_further(descriptor: int) -> None:
    """From now on reads of this descriptor bring in what they ask for, and nothing behind it."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)


def holds(address: int, nbytes: int, untold: bool = True) -> bool:
    """Whether all pages of mapped bytes are in the page cache, at this moment. Brings nothing in.

    `untold` where the system does not tell.
    """
    first = address - address % _PAGE
    pages = -(-(address + nbytes - first) // _PAGE)
    there = ctypes.create_string_buffer(pages)
    if _mincore is None or _mincore(first, pages * _PAGE, there) != 0:
        return untold
    # macOS says more of a page in further bits.
    return there.raw == b"\1" * pages or all(byte & 1 for byte in there.raw)


def hold_each(addresses: Sequence[int]) -> list[bool]:
    """`holds` of single bytes; True where the system does not tell. In two thirds of the time."""
    if _mincore is None:
        return [True] * len(addresses)
    there = ctypes.c_ubyte()
    # Made once: to convert a number costs a tenth of a call.
    told, page = ctypes.c_void_p(ctypes.addressof(there)), ctypes.c_size_t(_PAGE)
    return [
        _mincore(address - address % _PAGE, page, told) != 0 or bool(there.value & 1)
        for address in addresses
    ]


def read_edges(descriptor: int, at: int, nbytes: int) -> None:
    """Begin to read the pages that a range shares with its neighbours.

    A write of part of a page that is not in the cache waits until the device has given the rest.
    """
    for edge in {at - at % _PAGE, at + nbytes - (at + nbytes) % _PAGE}:
        if edge < at or edge < at + nbytes < edge + _PAGE:
            os.posix_fadvise(descriptor, edge, _PAGE, os.POSIX_FADV_WILLNEED)
