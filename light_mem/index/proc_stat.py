"""What /proc/<pid>/stat says of a process (proc(5), Linux)."""

from __future__ import annotations


def stat_fields(pid: int) -> list[bytes]:
    """The fields from the state on, which is the third one there; raises OSError where /proc does
    not show the process, or no descriptor is left to look."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        stat = file.read()
    # The name before the state may hold spaces and parentheses.
    return stat[stat.rindex(b")") + 2 :].split()
