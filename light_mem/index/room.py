"""Room for files, allocated before they are mapped.

A store to a mapped hole on a full disk is SIGBUS, which Python cannot catch; so no hole is mapped.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from light_mem.errors import StoreFullError

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
