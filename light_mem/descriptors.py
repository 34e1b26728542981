"""Descriptors that the system may refuse to give: what there is instead is the caller's to say.

A call that Python knows may be one that the kernel is too old for (ENOSYS), or that a sandbox or
a container's profile forbids (EPERM as a rule, EACCES by `vm.memfd_noexec` too). Imports nothing
of the library: children that are to start fast use it.
"""

from __future__ import annotations

import errno
import os

_REFUSED = frozenset((errno.ENOSYS, errno.EPERM, errno.EACCES))


def pidfd(pid: int) -> int:
    """A descriptor that is readable once the process has ended; -1: the system gives none.

    Raises ProcessLookupError, and OSError where no descriptors are left.
    """
    try:
        return os.pidfd_open(pid)
    except AttributeError:
        return -1
    except OSError as error:
        if error.errno in _REFUSED:
            return -1
        raise


def memory_object(name: str) -> int:
    """A memory object without a path, empty; -1: the system gives none. Raises OSError."""
    try:
        return os.memfd_create(name, os.MFD_CLOEXEC)
    except AttributeError:
        return -1
    except OSError as error:
        if error.errno in _REFUSED:
            return -1
        raise
