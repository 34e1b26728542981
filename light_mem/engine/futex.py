"""Waiting on a 32-bit word of shared memory: no descriptor, no thread, any number of waiters.

futex(2) through ctypes, since Python has no name for it. Where it is missing (macOS, unknown
processors) `wait` sleeps for a moment instead: callers look again anyway.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import sys
import time

# The number of futex(2), from the kernel's syscall tables (asm/unistd.h).
_NUMBERS = {
    "x86_64": 202,
    "aarch64": 98,
    "riscv64": 98,
    "loongarch64": 98,
    "ppc64le": 221,
    "s390x": 238,
}
_WAIT, _WAKE = 0, 1
_SLEEP = 0.001
_LONGEST = 1e9  # seconds that the kernel is asked to sleep; its own clock has an end
_NUMBER = _NUMBERS.get(platform.machine()) if sys.platform == "linux" else None


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


class FutexWords:
    """Words of one shared mapping, named by byte offset; offsets are multiples of 4.

    The process that changes a word wakes its waiters afterwards. Any thread, any process.
    """

    def __init__(self, mapping: mmap.mmap) -> None:
        self._anchor = ctypes.c_char.from_buffer(mapping)
        self._base = ctypes.addressof(self._anchor)

    def wait(self, offset: int, expected: int, timeout: float) -> None:
        """Sleep until woken, while the word still is `expected`; may return early for no reason."""
        if _NUMBER is None:
            time.sleep(min(timeout, _SLEEP))
            return
        timeout = min(timeout, _LONGEST)
        span = _Timespec(int(timeout), int(timeout % 1 * 1e9))
        result = _syscall(
            ctypes.c_long(_NUMBER),
            ctypes.c_void_p(self._base + offset),
            ctypes.c_int(_WAIT),
            ctypes.c_uint32(expected),
            ctypes.byref(span),
            None,
            ctypes.c_int(0),
        )
        if result < 0:
            code = ctypes.get_errno()
            if code not in (errno.EAGAIN, errno.ETIMEDOUT, errno.EINTR):
                raise OSError(code, os.strerror(code))

    def wake(self, offset: int, count: int = 2**31 - 1) -> None:
        """Wake up to `count` waiters of the word."""
        if _NUMBER is not None:
            _syscall(
                ctypes.c_long(_NUMBER),
                ctypes.c_void_p(self._base + offset),
                ctypes.c_int(_WAKE),
                ctypes.c_int(count),
                None,
                None,
                ctypes.c_int(0),
            )
