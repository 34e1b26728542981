"""Room for files, allocated before they are mapped.

A store to a mapped hole on a full disk is SIGBUS, which Python cannot catch; so no hole is mapped.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from light_mem.errors import StoreFullError
from light_mem.index.store_files import make, open_file

_ZEROS = bytes(1 << 20)


def refuse_full(error: OSError, path: Path, needed: int, what: str) -> None:
    """Raise StoreFullError, which begins with `what`, where the error says that there is no room
    for `needed` bytes of a file."""
    if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        raise StoreFullError(
            f"{what}: {error.strerror}",
            needed=needed,
            available=shutil.disk_usage(path.parent).free,
            errno=error.errno,
        ) from error


def allocate(descriptor: int, path: Path, size: int) -> None:
    """Give an open file `size` bytes of room; what it holds stays.

    Raises StoreFullError, and the file then has the length it had.
    """
    found = os.fstat(descriptor).st_size
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:  # macOS; this fills no holes in what the file has already
            for at in range(found, size, len(_ZEROS)):
                os.pwrite(descriptor, _ZEROS[: size - at], at)
    except OSError as error:
        os.ftruncate(descriptor, found)
        refuse_full(error, path, size, f"{path} needs {size} bytes")
        raise


def lengthen(descriptor: int, path: Path, size: int) -> None:
    """`allocate` where others may have the file open: what they store to it meanwhile stays, also
    if this fails. (Where the file system cannot allocate, the C library adds zeros to bytes that it
    has found to be zeros, one a block: not proof against who stores there at that moment.)

    Raises StoreFullError, OSError.
    """
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:  # macOS; a hole, since writing zeros would be over what others write
            os.ftruncate(descriptor, size)
    except OSError as error:
        refuse_full(error, path, size, f"{path} needs {size} bytes")
        raise


def lacking(path: Path, size: int) -> int:
    """Bytes of room that a file lacks of `size`: all of them where there is none.

    A file that a tool with holes has restored (`tar -S`, `rsync -S`, `cp --sparse`) is long enough
    and yet lacks room. So does one that a file system compresses.
    """
    try:
        # st_blocks counts 512-byte units, whatever st_blksize.
        return max(0, size - path.stat().st_blocks * 512)
    except FileNotFoundError:
        return size


def fill_holes(path: Path, size: int) -> None:
    """Allocate the first `size` bytes of a file that seems to have holes there; what it holds
    stays. Nobody else may have it open: where the file system cannot allocate, the C library
    writes zeros over zeros that it has read. Raises StoreFullError, OSError.

    A compressed file seems to have holes for good. To look for them would walk over its extents,
    as allocating them does where there is nothing to be done.
    """
    if not lacking(path, size):
        return
    descriptor = open_file(path, os.O_RDWR)
    try:
        allocate(descriptor, path, size)
    finally:
        os.close(descriptor)


@contextmanager
def held(path: Path, size: int) -> Iterator[None]:
    """Keep room on a full disk: `path` is a file of `size` bytes meanwhile. Raises StoreFullError,
    OSError, and leaves none then."""
    try:
        descriptor = make(path)
        try:
            allocate(descriptor, path, size)
        finally:
            os.close(descriptor)  # else the room would not be free as soon as the file has gone
        yield
    finally:
        path.unlink(missing_ok=True)
