"""Who has the store open, and which slots each was filling when it died.

The file `owners` holds a record a process; a process that joins takes the lock on one byte,
which the kernel frees when the process dies, however it dies and in whatever container (how that
stays true when somebody removes the file: `members.py`). The record says what people want to know
(pid, start time, kind) and lists the process's *intents*: the first slots of the blocks that it is
copying into. An intent is written before its slot is marked, so the slots of a dead process are
found without a scan. Its leases, on blocks that it looks at in place, are listed too (`leases.py`).
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from light_mem.errors import StoreBusyError
from light_mem.index import store_files
from light_mem.index.format import MAX_OWNERS, OWNER, ShardSlot, named_slot, slot_word
from light_mem.index.members import DirectoryLocks, MemberLocks
from light_mem.index.proc_stat import stat_fields
from light_mem.index.room import allocate
from light_mem.index.store_files import open_file

NAME = "owners"
FILE_BYTES = MAX_OWNERS * OWNER.itemsize


class OwnerInfo(NamedTuple):
    """One process that has the store open."""

    owner: int
    pid: int
    started: float
    kind: str

    def __str__(self) -> str:
        return f"{self.kind} {self.pid}"


class Owner:
    """This process's membership; made by `Owners.join`."""

    def __init__(self, owners: Owners, number: int) -> None:
        self._owners = owners
        self.number = number
        self._words: memoryview[int] = owners.records["intents"][number].data

    def announce(self, at: int, block: ShardSlot) -> None:
        """Say that a block is being filled, before its slots are marked; `at`: which of the
        record's MAX_INTENTS words says so."""
        self._words[at] = slot_word(*block)

    def withdraw(self, at: int) -> None:
        """What a word says is published, or given back."""
        self._words[at] = 0

    def leave(self) -> None:
        """Leave in order: nothing is being filled."""
        self._owners.forget(self.number)


class Owners:
    """The owners file of one store, opened by this process. Owner numbers start at 1."""

    def __init__(self, directory: Path, writable: bool = True) -> None:
        """Open it, and make it where it is missing or too short. Tools that only look do not write,
        maybe because their file system is read-only here: they may ask who is alive, and read the
        records. Theirs raises FileNotFoundError, and ValueError where the file is too short. The
        others' raises StoreBusyError where it is not the file of those who have the store open."""
        path = directory / NAME
        flags = os.O_RDWR if writable else os.O_RDONLY
        with ExitStack() as undo:
            members = DirectoryLocks(directory)
            undo.callback(members.close)
            if writable and not os.path.lexists(path):
                members.require_listed(path, lambda _: os.path.lexists(path))
            self._map_file(path, flags)
            self.locks = MemberLocks(path, members, flags)
            undo.callback(self.locks.close)
            if writable:
                self.locks.require_listed()
            undo.pop_all()
        # A lock of our own does not keep us out, nor does it keep our threads apart.
        self._joined: set[int] = set()
        # Reentrant: a finalizer may leave and close in the middle of `reclaim`.
        self._guard = threading.RLock()
        self._reclaiming = False
        self._closing = False

    def _map_file(self, path: Path, flags: int) -> None:
        writable = flags == os.O_RDWR
        descriptor = store_files.open_or_make(path) if writable else open_file(path, flags)
        try:
            if writable and os.fstat(descriptor).st_size < FILE_BYTES:
                # Never shortened and never replaced: others may have it mapped and locked.
                allocate(descriptor, path, FILE_BYTES)
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            self._map = mmap.mmap(descriptor, FILE_BYTES, access=access)
        finally:
            os.close(descriptor)
        self.records = np.frombuffer(self._map, OWNER)

    def join(self, kind: str) -> Owner:
        """Become an owner; `kind` is at most 16 ASCII letters. Raises StoreBusyError when full."""
        record = np.zeros((), OWNER)
        record["pid"] = os.getpid()
        record["started"] = started_at(os.getpid())
        record["kind"] = kind.encode()
        record["joined"] = time.time_ns()
        with self._alone():
            for number in range(1, MAX_OWNERS):
                # A record with a pid whose lock is free is a dead owner with intents to be taken
                # back first; `reclaim` does that.
                if self.records["pid"][number] or not self.locks.try_lock(number):
                    continue
                if self.records["pid"][number]:
                    self.locks.unlock(number)
                    continue
                self.records[number] = record
                self._joined.add(number)
                return Owner(self, number)
        raise StoreBusyError(
            f"{MAX_OWNERS - 1} processes have the store open already", owners=self.alive()
        )

    def reclaim(self, take_back: Callable[[int, list[ShardSlot]], bool]) -> int:
        """Call `take_back(owner, intents)` for each dead owner, whose leases are ended there as
        well; returns how many of them left nothing (it was True), and so are forgotten.

        One thread at a time, and not in the middle of itself: the loser of two would empty the
        record of a new owner.
        """
        with self._alone():
            if self._reclaiming:
                return 0
            self._reclaiming = True
            try:
                return self._reclaim(take_back)
            finally:
                self._reclaiming = False

    def _reclaim(self, take_back: Callable[[int, list[ShardSlot]], bool]) -> int:
        dead = 0
        for number in np.flatnonzero(self.records["pid"].copy()).tolist():
            if self._closing:
                break  # further in: the store was left
            if number in self._joined or not self.locks.try_lock(number):
                continue
            try:
                if not self.records["pid"][number]:
                    continue  # another process has just reclaimed it
                words = self.records["intents"][number].tolist()
                if take_back(number, [named_slot(word) for word in words if word]):
                    self.records[number] = np.zeros((), OWNER)
                    dead += 1
            finally:
                self.locks.unlock(number)
        return dead

    def forget(self, number: int) -> None:
        """The membership has ended: its record is empty, its lock goes. Does nothing when it has
        ended before: the record may be another's."""
        with self._alone():
            if number not in self._joined:
                return
            self.records[number] = np.zeros((), OWNER)
            self._joined.discard(number)
            self.locks.unlock(number)

    def alive(self) -> list[OwnerInfo]:
        """The other processes that have the store open now."""
        return [
            OwnerInfo(
                number,
                int(self.records["pid"][number]),
                float(self.records["started"][number]),
                bytes(self.records["kind"][number]).decode("ascii", "replace"),
            )
            for number in np.flatnonzero(self.records["pid"].copy()).tolist()
            if number and self.locks.locked_by_another(number)
        ]

    def is_alive(self, number: int) -> bool:
        """Whether an owner lives: this process, or one that holds the lock of its byte."""
        return number in self._joined or self.locks.locked_by_another(number)

    def others(self) -> bool:
        """Whether any other process has the store open."""
        return self.locks.others()

    def flush(self) -> None:
        """Have the records on the device: an index that is clean is believed after a power cut, and
        only they name the slots in it that the dead were filling. Raises OSError."""
        self._map.flush()

    def close(self) -> None:
        """Close the file; memberships end. Where records of the dead are being reclaimed, maybe by
        this very thread, that goes on, with its locks, and closes it at its end."""
        self._closing = True
        self._close_if_free()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            with self._guard:
                yield
        finally:
            if self._closing:
                self._close_if_free()

    def _close_if_free(self) -> None:
        # Each side looks after it has made its mark (closing; let go): one of them finds it free.
        if self._guard.acquire(blocking=False):
            try:
                if not self._reclaiming:
                    self.locks.close()
            finally:
                self._guard.release()


class _Process(Protocol):
    """An OwnerInfo, or what a tool knows of a process besides; its text is what people read."""

    @property
    def kind(self) -> str: ...


def listing(owners: Sequence[_Process]) -> str:
    """The processes in one line; a server's workers are counted, not listed."""
    named = [str(o) for o in owners if o.kind != "worker"] or [str(o) for o in owners]
    workers = sum(o.kind == "worker" for o in owners)
    more = f" and {workers} workers" if workers and len(named) < len(owners) else ""
    return ", ".join(named) + more


def process_start(pid: int) -> float:
    """Start time of a process in seconds since the boot, the other half of its identity; 0:
    unknown. Since 1970 it would be another one whenever the clock is set."""
    try:
        return start_in_proc(pid)
    except OSError:
        return 0.0


def start_in_proc(pid: int) -> float:
    """`process_start`, of a process that /proc shows; raises OSError for any other, and where no
    descriptors are left to look."""
    return int(stat_fields(pid)[19]) / os.sysconf("SC_CLK_TCK")  # starttime, field 22


def started_at(pid: int) -> float:
    """Start time of a process in seconds since 1970, for people; 0: unknown.

    As `psutil.Process(pid).create_time()`, which the workers do not import for its 26 ms.
    """
    return since_1970(process_start(pid))


def since_1970(start: float) -> float:
    """A `process_start` in seconds since 1970, as the clock is set now; 0: unknown."""
    try:
        lines = Path("/proc/stat").read_bytes().splitlines() if start else []
    except OSError:
        return 0.0
    boot = next((int(line.split()[1]) for line in lines if line.startswith(b"btime")), 0)
    return boot + start if boot else 0.0
