"""Who a process is, whether it lives, and whether it was forked from one that used the library."""

from __future__ import annotations

import errno
import os
import select
import threading
import weakref
from collections.abc import Callable

from light_mem import descriptors
from light_mem.errors import ForkedProcessError
from light_mem.index.owners import process_start, start_in_proc
from light_mem.index.proc_stat import stat_fields

_LOOK_SECONDS = 0.5  # only where there are no pidfds

_forks = 0


def _after_fork_in_child() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_after_fork_in_child)


def fork_token() -> int:
    """A number that another one replaces in a forked child; compared without a system call."""
    return _forks


def refuse_fork(token: int, what: str) -> None:
    """Raise ForkedProcessError when this process was forked since `token` was taken."""
    if token != _forks:
        raise ForkedProcessError(
            f"this {what} belongs to the parent process; after a fork its locks and threads are "
            "not here. Start the child with spawn and hand it `service.client()`",
            pid=os.getpid(),
        )


def is_alive(pid: int, started: float) -> bool:
    """Whether the process with this pid *and* `process_start` runs; a pid alone is reused.

    One that has ended and that its parent has not waited for yet (a zombie) does not run. Where no
    descriptors are left to look, it is taken to run.
    """
    try:
        found = start_in_proc(pid)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return True
        found = 0.0
    if not found and not started:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True
    return bool(found) and found == started and not _has_exited(pid)


def is_shown(pid: int, started: float) -> bool:
    """Whether /proc shows this process running. It does so, and `is_alive` is false, for a process
    that is in no PID namespace of ours, below a /proc of another one."""
    try:
        state = stat_fields(pid)[0]
    except OSError:
        return False
    return state not in b"ZX" and process_start(pid) == started


def _has_exited(pid: int) -> bool:
    # Not the state in /proc/<pid>/stat: it is the main thread's, which may end before the others.
    try:
        pidfd = descriptors.pidfd(pid)
    except ProcessLookupError:
        return True
    except OSError:  # no descriptor left
        return False
    if pidfd < 0:
        return False
    try:
        return bool(_readable(pidfd, timeout=0))
    finally:
        os.close(pidfd)


def _readable(*descriptors: int, timeout: int | None = None) -> list[int]:
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(timeout)]


class DeathWatch:
    """Says whether another process has died: `dead`, an attribute that costs no system call.

    A thread sleeps on the process's pidfd; it ends with this object. Any thread may look.
    """

    def __init__(self, pid: int, started: float) -> None:
        self.dead = False
        end = _watch(pid, started, weakref.ref(self))
        # A forked child shares the eventfd with its parent: it must not end the parent's thread.
        weakref.finalize(self, _end_watch, end, fork_token())

    def tell(self) -> None:
        """The process has died."""
        self.dead = True


def _end_watch(end: Callable[[], object], token: int) -> None:
    if token == fork_token():
        end()


def _watch(pid: int, started: float, watch: weakref.ref[DeathWatch]) -> Callable[[], object]:
    """Start the thread; returns what ends it."""

    def tell() -> None:
        told = watch()
        if told is not None:
            told.tell()

    def sleep(pidfd: int, stop: int) -> None:
        # Only this thread closes the descriptors: nobody else can meet a number that was reused.
        if stop not in _readable(pidfd, stop):
            tell()
            _readable(stop)
        os.close(pidfd)
        os.close(stop)

    def look(ended: threading.Event) -> None:
        while is_alive(pid, started):
            if ended.wait(_LOOK_SECONDS):
                return
        tell()

    if not hasattr(os, "eventfd"):
        pidfd = -1
    else:
        try:
            pidfd = descriptors.pidfd(pid)
        except ProcessLookupError:
            tell()
            return lambda: None
        except OSError:  # no descriptor left
            pidfd = -1
    if pidfd < 0:
        ended = threading.Event()
        threading.Thread(target=look, args=(ended,), name="lightmem-watch", daemon=True).start()
        return ended.set
    stop = -1
    try:
        stop = os.eventfd(0, os.EFD_CLOEXEC)
        if not is_alive(pid, started):  # it has died, or another process has the pid by now
            tell()
        thread = threading.Thread(
            target=sleep, args=(pidfd, stop), name="lightmem-watch", daemon=True
        )
        thread.start()
    except (OSError, RuntimeError):  # no descriptor left, or no thread, which would close them
        for descriptor in (pidfd, stop):
            if descriptor >= 0:
                os.close(descriptor)
        raise
    return lambda: os.eventfd_write(stop, 1)
