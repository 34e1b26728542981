"""The task tables of the servers that have a store open, mapped to be read.

A table is a memory object without a name; its server's open descriptors lead to it
(/proc/<pid>/fd, for processes of the same user). Whether its server lives is said by the lock on
the server's lane, which the kernel frees when it dies, in whatever container.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from light_mem.engine.queue import LANE_BYTE
from light_mem.engine.table_layout import NAME
from light_mem.engine.task_table import TaskTable
from light_mem.errors import ServiceClosedError
from light_mem.index.locks import RangeLock
from light_mem.maintenance.owners import Ownership

_PROC = Path("/proc")
_LINK = f"/memfd:{NAME}"


class ServerTable(NamedTuple):
    """A server's table and the process through which it was found: the server itself, but where
    that is in another container, one that shares its table."""

    pid: int
    table: TaskTable


def find_tables(directory: Path) -> tuple[list[ServerTable], int]:
    """The tables of the living servers of a store, by process id, and how many servers there are
    whose table cannot be seen: another user's or container's, or no Linux."""
    servers = [owner for owner in Ownership(directory).alive if owner.kind == "server"]
    found: dict[str, ServerTable] = {}
    _collect(sorted({owner.pid for owner in servers}), directory, found)
    if len(found) < len(servers):  # the pids may mean other processes here: look at all of them
        _collect(_all_pids(), directory, found)
    headers = [table.table.header[0] for table in found.values()]
    seen = {_process(int(h["server_pid"]), float(h["server_started"])) for h in headers}
    strange = sum(_process(owner.pid, owner.started) not in seen for owner in servers)
    # What a closed service has left open for its views has no table, and is none of a stranger's.
    unseen = min(strange, max(0, len(servers) - len(found)))
    return sorted(found.values(), key=lambda table: table.pid), unseen


def _process(pid: int, started: float) -> tuple[int, int]:
    """One process, as it knows itself: in containers of their own several have the same pid. Of
    its start the hundredths of a second, since the boot or 1970, however the clock was set."""
    return pid, round(100 * started) % 100


def _collect(pids: Iterable[int], directory: Path, found: dict[str, ServerTable]) -> None:
    for pid in pids:
        for path in _descriptors(pid):
            table = _open(path, pid, directory)
            if table is not None:
                found.setdefault(
                    bytes(table.header["table_id"][0]).decode(), ServerTable(pid, table)
                )


def _all_pids() -> list[int]:
    try:
        return sorted(int(name) for name in os.listdir(_PROC) if name.isdigit())
    except OSError:
        return []


def _descriptors(pid: int) -> Iterator[str]:
    folder = f"{_PROC}/{pid}/fd"
    try:
        names = os.listdir(folder)
    except OSError:
        return  # gone, or another user's
    for name in names:
        try:
            if os.readlink(f"{folder}/{name}").startswith(_LINK):
                yield f"{folder}/{name}"
        except OSError:
            continue


def _open(path: str, pid: int, directory: Path) -> TaskTable | None:
    """The table there, if its server lives and serves this store."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        table = TaskTable(descriptor, None, writable=False)
    except (ServiceClosedError, ValueError, OverflowError, OSError):
        return None  # half made, another version's, or something else by that name
    finally:
        os.close(descriptor)
    table.fd = -1  # the mapping has its own
    return table if _serves(table, pid, directory) and _lives(path) else None


def _serves(table: TaskTable, pid: int, directory: Path) -> bool:
    store = os.fsdecode(bytes(table.header["store"][0]))
    # As that process sees it: in a container the path may mean something else here.
    for root in (f"{_PROC}/{pid}/root", ""):
        try:
            return os.path.samefile(root + store, directory)
        except OSError:
            continue
    return False


def _lives(path: str) -> bool:
    try:
        lock = RangeLock(path)
    except OSError:
        return False
    try:
        return lock.locked_by_another(LANE_BYTE)
    finally:
        lock.close()
