"""Slots read by system calls: what a device or a file cannot give is an error then.

Through a mapping it would be SIGBUS, which ends the process. A worker is replaced, a server is not.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

# The processor's caches still have such a piece when it is summed up (246 KB in 14 us, 4 MB in 0.24
# ms; with 512 KiB 13 us and 0.57 ms).
PIECE_BYTES = 128 << 10
# What reading fails with when the bytes are lost: a bad sector, for a read past the page cache (or
# a file that ends before them), and one whose protection information does not fit.
_LOST = (errno.EIO, errno.ENODATA, errno.EILSEQ)


def pieces(descriptor: int, at: int, nbytes: int) -> Iterator[bytes]:
    """The bytes `[at, at + nbytes)` of a file, in order; raises OSError. Any thread."""
    end = at + nbytes
    while at < end:
        piece = os.pread(descriptor, min(PIECE_BYTES, end - at), at)
        if not piece:
            raise cut_short(end - at)
        yield piece
        at += len(piece)


def cut_short(missing: int) -> OSError:
    """The error of a read that wants so many bytes behind a file's end."""
    return OSError(errno.ENODATA, f"the file ends {missing} bytes too early")


def problem_of(error: Exception) -> str | None:
    """What is wrong with a block, in words, whose reading has failed so; None: nothing that will
    not pass."""
    if getattr(error, "errno", None) not in _LOST:
        return None
    return f"the device does not give its bytes ({error})"
