"""How a child of ours ended, in words.

A status is given once, to whoever asks first: a server that waits for all its children takes those
of ours as well, and where SIGCHLD is ignored the kernel keeps none. `subprocess` says 0 then.
"""

from __future__ import annotations

import os
import signal
import subprocess


def how_it_ended(process: subprocess.Popen[bytes], pidfd: int) -> str | None:
    """None: it runs. Later calls cannot know any more. `pidfd`: of the process, -1: there is none.

    Does not wait.
    """
    try:
        # Only looked at: what `poll` would take it cannot tell from what others have taken.
        ended = _look(process.pid, pidfd)
    except ChildProcessError:
        if pidfd >= 0:  # it has ended: by its number `poll` might ask for a new child
            process.returncode = 0
            return _lost()
        return _lost() if process.poll() is not None else None
    except (AttributeError, OSError):  # no such call: macOS, Linux before 5.4, a sandbox
        status = process.poll()
        return None if status is None else _words(status)
    if ended is None:
        return None
    process.poll()
    exited = ended.si_code == os.CLD_EXITED
    return _words(ended.si_status if exited else -ended.si_status)


def _look(pid: int, pidfd: int) -> os.waitid_result | None:
    # By the pidfd: once another has taken the status, the number may be a new child's.
    kind, number = (os.P_PIDFD, pidfd) if pidfd >= 0 else (os.P_PID, pid)
    return os.waitid(kind, number, os.WEXITED | os.WNOHANG | os.WNOWAIT)


def _lost() -> str:
    return "died (its exit status was taken by another part of the server)"


def _words(status: int) -> str:
    if status >= 0:
        return f"died with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:  # a real-time signal
        name = f"signal {-status}"
    # The kernel's killer sends it where memory is short, of the machine or of the container.
    why = " (out of memory? see the kernel's log)" if -status == signal.SIGKILL else ""
    return f"was killed by {name}{why}"
