"""Processes of our own: their environment and name, and how one ends with its parent.

Each is its own program: `multiprocessing` would run the server's `__main__` again, and a fork of a
process with threads may hang. Imports next to nothing of the library: a child costs what it needs.
"""

from __future__ import annotations

import os
import select
import sys
import threading
from collections.abc import Callable

from light_mem import descriptors

# How glibc copies, read from GLIBC_TUNABLES when a program starts (glibc manual, "Tunables").
# What we copy goes to pages that this processor does not read again soon, so copies had better go
# around its caches: a plain store first reads the line that it replaces. glibc does so only from
# three quarters of the shared cache on, and up to there uses `rep movsb`, which is slower. Measured
# with rows of 60 KB to random places, one core of an EPYC 7003: 7.9 GB/s without, 11.1 with both.
# The threshold is about the least that glibc takes, more than 0x4040 (dl-cacheinfo.h), for from
# sixteen times as much on it copies from four pages of the kernel side by side instead of two
# (memmove-vec-unaligned-erms.S), of which the processor fetches more ahead: pieces of 480 KiB and
# their checksums 1.14 to 1.17 times as fast as with 0x8000 to the slots, 1.07 to the KV memory (two
# processes, Intel Xeon). Unknown names are ignored, and so is the variable by other C libraries.
COPY_TUNABLES = (
    "glibc.cpu.x86_non_temporal_threshold=0x4080:glibc.cpu.x86_rep_movsb_threshold=0x10000000"
)
_LOOK_MS = 1000  # only where there are no pidfds
_PR_SET_NAME = 15  # linux/prctl.h


def environment(added: dict[str, str]) -> dict[str, str]:
    """The environment of a child that copies: ours, `added`, and COPY_TUNABLES unless the user
    has tunables of his own (GLIBC_TUNABLES set, be it empty)."""
    return {"GLIBC_TUNABLES": COPY_TUNABLES, **os.environ, **added}


def name_process(name: str) -> None:
    """What `ps`, `top` and the kernel's log call this process (Linux): at most 15 bytes. Else it
    is the program's name, `python`."""
    if sys.platform == "linux":
        import ctypes  # not above: a child without a name does without it

        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode())


def die_with(
    parent: int, pipe: int | None = None, last: Callable[[], object] = lambda: None
) -> None:
    """End this process as soon as the parent is dead, however it dies.

    `pipe`: one end of a pipe whose other end only the parent has, which no program inherits. It is
    closed as well when the parent becomes another program (`exec`), with the same pid and start:
    for a pidfd nothing has happened then. Not noticed while a forked child of it has that end too.
    `last`: done before this process ends, in another thread than its own.

    Raises ProcessLookupError when it is dead already.
    """
    # Not PR_SET_PDEATHSIG: it fires when the *thread* that started the child ends (prctl(2)).
    pidfd = descriptors.pidfd(parent)
    poll = select.poll()
    if pidfd >= 0:
        poll.register(pidfd, select.POLLIN)
    if pipe is not None:
        poll.register(pipe, 0)  # POLLERR or POLLHUP: the other end is closed

    def watch() -> None:
        try:
            while os.getppid() == parent and not poll.poll(None if pidfd >= 0 else _LOOK_MS):
                pass
            last()
        finally:
            os._exit(1)

    if os.getppid() != parent:  # it died before it could be watched
        os._exit(1)
    threading.Thread(target=watch, name="parent", daemon=True).start()
