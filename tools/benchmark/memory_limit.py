"""A control group with a memory limit, for measurements beyond memory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class NoGroupError(RuntimeError):
    """No group with a limit can be made here; the message says what would help."""


def _mounts() -> Iterator[tuple[str, Path, str]]:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if kind in ("cgroup", "cgroup2"):
            yield kind, Path(where), options


def _own() -> dict[str, str]:
    """The groups of this process by controller; "" is version 2."""
    found = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            found[controller] = path
    return found


def _candidates() -> Iterator[tuple[Path, str]]:
    """Folders in which a group may be made, and the name of its limit."""
    own = _own()
    for kind, where, options in _mounts():
        if kind == "cgroup" and "memory" in options.split(",") and "memory" in own:
            yield where / own["memory"].lstrip("/"), "memory.limit_in_bytes"
        elif kind == "cgroup2" and "" in own:
            # A group that has processes cannot give its children controllers: its parent may.
            mine = where / own[""].lstrip("/")
            for place in (mine, mine.parent):
                control = place / "cgroup.subtree_control"
                if control.is_file() and "memory" in control.read_text().split():
                    yield place, "memory.max"


def _remove(group: Path) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            group.rmdir()
            return
        except OSError:  # the last of its processes are on their way out
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@contextmanager
def memory_limit(nbytes: int) -> Iterator[Path]:
    """A new group with a limit of `nbytes`: the file to write a process's id to.

    It is removed at the end, when all its processes must have ended. Raises NoGroupError.
    """
    said = []
    for place, limit in _candidates():
        group = place / f"light-mem-bench-{os.getpid()}"
        try:
            group.mkdir()
        except OSError as error:
            said.append(str(error))
            continue
        try:
            try:
                (group / limit).write_text(str(nbytes))
            except OSError as error:
                said.append(str(error))
                continue
            yield group / "cgroup.procs"
            return
        finally:
            _remove(group)
    raise NoGroupError(
        "no control group with a memory limit can be made here "
        f"({'; '.join(said) or 'no memory controller in reach'}); run it as root, or in one that "
        "has a limit: systemd-run --user --scope -p MemoryMax=1G python "
        "tools/bench_beyond_memory.py --limit 1024 --limited"
    )
