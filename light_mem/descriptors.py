"""Descriptors: none of ours has a standard stream's number, and the system may refuse to give one.

A process may run without standard streams (a daemon, `<&-`). What it opens then has the numbers 0
to 2, so that a child is given its own standard input in the place of what it was to inherit, and
what a library complains of on standard error goes into our files.

A call that Python knows may be one that the kernel is too old for (ENOSYS), or that a sandbox or
a container's profile forbids (EPERM as a rule, EACCES by `vm.memfd_noexec` too). Imports nothing
of the library: children that are to start fast use it.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable

_REFUSED = frozenset((errno.ENOSYS, errno.EPERM, errno.EACCES))


def keep_standard_numbers() -> None:
    """Open /dev/null in the place of standard streams that are closed, before anything is opened
    that lives long or is passed on: moving a descriptor (F_DUPFD) does not help, since `mmap` keeps
    a duplicate with the lowest number that is free. Raises OSError. Any thread."""
    for number in range(3):
        try:
            fcntl.fcntl(number, fcntl.F_GETFD)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            if opened > 2:  # another thread has filled them all
                os.close(opened)


def pidfd(pid: int) -> int:
    """A descriptor that is readable once the process has ended; -1: the system gives none.

    Raises ProcessLookupError, and OSError where no descriptors are left.
    """
    return _unless_refused(lambda: os.pidfd_open(pid))


def memory_object(name: str) -> int:
    """A memory object without a path, empty; -1: the system gives none. Raises OSError."""
    return _unless_refused(lambda: os.memfd_create(name, os.MFD_CLOEXEC))


def memory_file(name: str) -> int:
    """A file without a path, empty, in memory if the system gives such. Raises OSError."""
    memory = memory_object(name)
    return memory if memory >= 0 else temporary_file()


def temporary_file() -> int:
    """A file without a path in the directory of temporary ones, empty. Raises OSError."""
    import tempfile  # slow, and rarely needed

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _unless_refused(call: Callable[[], int]) -> int:
    try:
        return call()
    except AttributeError:  # Python does not know it here
        return -1
    except OSError as error:
        if error.errno in _REFUSED:
            return -1
        raise
