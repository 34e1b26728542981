"""Who a process is, and whether this one was forked from one that used the library."""

from __future__ import annotations

import os

from light_mem.errors import ForkedProcessError
from light_mem.index.owners import process_start

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
    """Whether the process with this pid *and* start time runs; a pid alone is reused."""
    found = process_start(pid)
    if not found and not started:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True
    return bool(found) and abs(found - started) < 1.5
