"""Who has a store open, for people: kinds, process ids, commands. Only looks.

Whether an owner lives is said by its lock in the `owners` file; its pid is what it called itself,
which in another container is another number.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from light_mem.errors import StoreBusyError
from light_mem.index import file as index_file
from light_mem.index.format import named_slot
from light_mem.index.members import DirectoryLocks
from light_mem.index.owners import FILE_BYTES, NAME, Owners, started_at
from light_mem.index.owners import listing as listing
from light_mem.maintenance.report import OwnerReport

_OUR_NAMES = "lightmem-"  # of processes that name themselves: `program.name_process`

Blocks = set[tuple[int, int]]  # (shard, first slot)


class Named(NamedTuple):
    """The blocks that the records of owners, dead ones too, name."""

    intents: dict[int, Blocks]  # by owner: being written
    leases: Blocks  # leased by any of them


class Ownership:
    """The owners file at one moment."""

    def __init__(self, directory: Path) -> None:
        records, living = _read(directory)
        reports = {number: _report(record) for number, record in records.items()}
        self.living = {number: r for number, r in reports.items() if number in living}
        self.alive = tuple(self.living.values())
        self.dead = tuple(r for number, r in reports.items() if number not in living)


def named_by_owners(directory: Path) -> Named:
    """The blocks that owners say they are writing, or have leased."""
    named = Named({}, set())
    for number, record in _read(directory)[0].items():
        named.intents[number] = _blocks(record["intents"])
        named.leases.update(_blocks(record["leases"]))
    return named


def _blocks(words: np.ndarray[Any, Any]) -> Blocks:
    return {named_slot(word) for word in words[words != 0].tolist()}


def _read(directory: Path) -> tuple[dict[int, np.void], set[int]]:
    """The records by owner, and which owners live."""
    path = directory / NAME
    # One that is too short was never in use.
    if not path.exists() or path.stat().st_size < FILE_BYTES:
        return {}, set()
    # Not writable: what is mounted read-only here may be in use elsewhere.
    owners = Owners(directory, writable=False)
    try:
        living = {info.owner for info in owners.alive()}
        records = owners.records[owners.records["pid"] != 0].copy()
        numbers = np.flatnonzero(owners.records["pid"].copy()).tolist()
    finally:
        owners.close()
    return dict(zip(numbers, records, strict=False)), living


def _report(record: np.void) -> OwnerReport:
    pid = int(record["pid"])
    return OwnerReport(
        pid,
        bytes(record["kind"]).decode("ascii", "replace"),
        float(record["started"]),
        int(record["joined"]) / 1e9,
        command_of(pid, float(record["started"])),
    )


def command_of(pid: int, started: float) -> str:
    """The command of a process, shortened; "" when it cannot be seen or is another process."""
    if abs(started_at(pid) - started) > 1:
        return ""  # not that process: another container's, or one that took the number over
    try:
        name = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    if name.startswith(_OUR_NAMES):
        return name  # its command line is a program text: nobody knows it by that
    words = raw.decode("utf-8", "replace").split("\0")
    text = " ".join(os.path.basename(word) if "/" in word else word for word in words[:3]).strip()
    return text if len(text) <= 40 else text[:37] + "..."


def require_alone(directory: Path, what: str) -> None:
    """Raise StoreBusyError, which names the processes, when anyone has the store open."""
    alive = Ownership(directory).alive
    if alive:
        raise _needs_alone(what, directory, alive)
    locks = DirectoryLocks(directory)
    try:
        locks.require_listed(directory / NAME, lambda _: False)
    except StoreBusyError:
        if alive := Ownership(directory).alive:  # that joined between the two looks
            raise _needs_alone(what, directory, alive) from None
        raise
    finally:
        locks.close()


def _needs_alone(what: str, directory: Path, owners: Sequence[OwnerReport]) -> StoreBusyError:
    return StoreBusyError(
        f"{what} needs {directory} alone, and it is open in: {listing(owners)}", owners=owners
    )


def opened_meanwhile(directory: Path, owners: Sequence[OwnerReport]) -> StoreBusyError:
    """The error of a change of size that these processes came in the way of."""
    return StoreBusyError(
        f"{directory} was opened meanwhile by {listing(owners)} and keeps its size", owners=owners
    )


def maps_index(pid: int, directory: Path) -> bool | None:
    """Whether a process has mapped the index file that lies there now; None: it cannot be seen."""
    try:
        wanted = (directory / index_file.NAME).stat()
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return None
    inodes = {int(words[4]) for words in map(str.split, lines) if len(words) > 5}
    return wanted.st_ino in inodes
