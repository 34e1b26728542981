"""Who holds a lock, as far as the kernel tells: for the message of who waited in vain."""

from __future__ import annotations

import os

from light_mem.index.proc_stat import stat_fields

# States in /proc/<pid>/stat (proc(5)) in which a process lets go of nothing.
_STATES = {
    b"T": ", which is stopped (SIGCONT lets it go on)",
    b"t": ", which a debugger has stopped",
    b"D": ", which waits for a device",
}


def holder_of(path: str) -> tuple[int | None, str]:
    """The process that has the flock(2) on a file, and what is to be said of it.

    (None, ""): it cannot be seen. /proc/locks (Linux) shows only processes of our own container,
    and names a file by a device that some file systems do not give to stat(2).
    """
    try:
        found = os.stat(path)
        device = found.st_dev
        wanted = b"%02x:%02x:%d" % (os.major(device), os.minor(device), found.st_ino)
        with open("/proc/locks", "rb") as locks:
            lines = locks.read().splitlines()
    except OSError:
        return None, ""
    for line in lines:
        # "4: FLOCK  ADVISORY  WRITE 2041 fd:01:263194 0 EOF"; a waiter has "->" before its kind.
        words = line.split()
        if len(words) > 5 and words[1] == b"FLOCK" and words[5] == wanted:
            return _described(int(words[4]))
    return None, ""


def _described(pid: int) -> tuple[int | None, str]:
    try:
        state = stat_fields(pid)[0]
    except OSError:
        # Another container's number, or of one who died and left its descriptor to a child.
        return None, ""
    if pid == os.getpid():
        return pid, f"held by pid {pid}, this process"
    return pid, f"held by pid {pid}" + _STATES.get(state, ", which is very slow")
