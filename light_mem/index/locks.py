"""Locks between processes; the kernel frees every one of them when its holder dies.

PathLock   one exclusive lock a path (`filelock`): the shards' locks and the lock for opening
RangeLock  locks on byte ranges of one file: owners, the task queue, clients' lanes

Order, for the whole package: the open lock before a shard's lock; never two shards' locks at a
time; owner ranges are only ever tried, never waited for; the queue's range is never held
together with a shard's lock.

A signal handler may raise between any two bytecodes (KeyboardInterrupt, for one). So take the lock
inside the `try` whose `finally` releases it, and let the `finally` ask whether it is held. A
PathLock is released by owner name (`by`), because the call that took it may not have returned.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from light_mem.errors import LockTimeoutError
from light_mem.index.lock_holder import holder_of

POLL_SECONDS = 0.0005  # filelock polls every 50 ms by default; a shard is held for some 100 us
# Long enough for a shard's index to be made anew by another process, short enough that a stopped
# holder (SIGSTOP) costs its waiters some blocks and not their service.
LOCK_TIMEOUT_SECONDS = 10.0
SHORT_SECONDS = 0.1  # longer than a living holder needs

# OFD locks belong to the open file description: two services of one process exclude each other,
# and closing another descriptor of the file does not drop them (fcntl(2), Linux 3.15).
_OFD = hasattr(fcntl, "F_OFD_SETLK") and struct.calcsize("l") == 8
_FLOCK = "hhlli4x"  # struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid


class _Held:
    """The one lock object a path has in this process, and what keeps its threads apart."""

    def __init__(self, path: str) -> None:
        from light_mem.index.kept_lock import KeptFileLock  # 25 ms: ready before it is needed

        # An RLock because it knows its owner: the call that takes it may be interrupted right
        # afterwards, before any flag of ours is set. Nobody takes it twice.
        self.thread: Any = threading.RLock()
        self.by: object = _NOBODY  # who has it; set and reset with `thread` in hand
        self.waited = False  # whether who has it got it through filelock
        self.file = KeptFileLock(path)

    def give_up(self) -> None:
        """Release whatever this thread has acquired so far."""
        if self.thread._is_owned():
            self.file.abandon()  # closing releases the lock, if it was acquired at all
            self.by = _NOBODY
            self.thread.release()


_NOBODY = object()


# Weak: the descriptor of a lock goes with the last PathLock on its path.
_held: weakref.WeakValueDictionary[str, _Held] = weakref.WeakValueDictionary()
# Reentrant: a finalizer that closes a service may run in here and make a PathLock of its own.
_held_guard = threading.RLock()


class PathLock:
    """An exclusive lock between all threads and processes that use this path.

    Two PathLocks on one path in one process share one `filelock` object, since two of those
    would wait for each other. Not reentrant. Not for use in a forked child.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # Of the directory alone: a lock of a store that is a symlink is refused, not followed.
        directory, name = os.path.split(path)
        self.path = os.path.join(os.path.realpath(directory), name)
        self._mine: _Held | None = None

    def prepare(self) -> None:
        """Do what the first hold would do besides waiting: some 25 ms."""
        self._shared()

    def _shared(self) -> _Held:
        held = _held.get(self.path)
        if held is None:
            with _held_guard:
                held = _held.get(self.path)
                if held is None:
                    held = _held[self.path] = _Held(self.path)
        self._mine = held  # keeps the file open for the next hold
        return held

    @contextmanager
    def hold(self, timeout: float = LOCK_TIMEOUT_SECONDS) -> Iterator[None]:
        """Hold the lock; raises LockTimeoutError after `timeout` seconds."""
        by = object()
        try:
            self.acquire(by, timeout)
            yield
        finally:
            try:
                self.release(by)
            finally:
                self.release(by)  # where the first was cut short as it began

    def acquire(self, by: object, timeout: float = LOCK_TIMEOUT_SECONDS) -> None:
        """Take the lock, to be released by this thread; raises as `hold`, a generator, which costs
        some 1 us more. `by`: whom to release it for; no two may be equal. To be called within the
        `try` that releases it."""
        held = self._mine or self._shared()
        if held.thread._is_owned():  # a finalizer, or a caller that is wrong: it would never end
            raise self._timeout(timeout)
        try:
            if not held.thread.acquire(timeout=timeout):
                raise self._timeout(timeout)
            held.waited = not held.file.try_now()
            if held.waited and not timeout:
                raise self._timeout(timeout)
            if held.waited:
                try:
                    held.file.acquire(timeout=timeout, poll_interval=POLL_SECONDS)
                except TimeoutError:  # filelock.Timeout
                    raise self._timeout(timeout) from None
            held.by = by
        except BaseException:
            try:
                held.give_up()
            finally:
                held.give_up()  # where the first was cut short
            raise

    def is_held(self, by: object) -> bool:
        """Whether `acquire` took it for `by`, and it was not released since."""
        return self._mine is not None and self._mine.by == by

    def release(self, by: object) -> None:
        """Let go of what `acquire` took for `by`; does nothing where there is nothing."""
        held = self._mine
        if held is None or held.by != by:
            return
        try:
            if held.waited:
                held.file.release(
                    force=True
                )  # filelock counts holds; an interrupted call miscounts
            else:
                held.file.let_go()
        except BaseException:
            held.file.abandon()
            raise
        finally:
            held.by = _NOBODY  # before others have it
            held.thread.release()

    def _timeout(self, timeout: float) -> LockTimeoutError:
        # Not after a mere try: many may follow, and reading /proc/locks blocks every file lock.
        holder, who = holder_of(self.path) if timeout > SHORT_SECONDS else (None, "")
        return LockTimeoutError(
            f"{self.path} was not free within {timeout:g} s: "
            + (who or "its holder is stopped or very slow"),
            path=self.path,
            timeout=timeout,
            holder=holder,
        )


class RangeLock:
    """Locks on single bytes of a file, exclusive ones but for `share`; the bytes need not exist.

    `path` is opened anew, because a lock belongs to the open file description. Threads of one
    process share the object and so its locks: keep them apart with a `threading.Lock`.
    """

    def __init__(self, path: str | os.PathLike[str], descriptor: int | None = None) -> None:
        """`descriptor`: one of the file, opened for this alone, which closes it."""
        self.path = os.fspath(path)
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC) if descriptor is None else descriptor
        _range_locks.add(self)

    def try_lock(self, at: int) -> bool:
        """Take byte `at` if it is free; the kernel frees it when the process dies."""
        try:
            if _OFD:
                self._call(fcntl.F_OFD_SETLK, fcntl.F_WRLCK, at)
            else:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, at)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def share(self, at: int) -> None:
        """Take byte `at` beside others who share it: also of what cannot be opened for writing.
        Raises OSError, BlockingIOError where somebody has it alone."""
        if _OFD:
            self._call(fcntl.F_OFD_SETLK, fcntl.F_RDLCK, at)
        else:
            fcntl.lockf(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, at)

    def unlock(self, at: int) -> None:
        """Free byte `at`."""
        if _OFD:
            self._call(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, at)
        else:
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, at)

    def lock(self, at: int, timeout: float = LOCK_TIMEOUT_SECONDS) -> None:
        """Wait for byte `at`; raises LockTimeoutError.

        Polls: a blocking lock could not be given up when its holder is stopped.
        """
        if self.try_lock(at):
            return
        deadline = time.monotonic() + timeout
        pause = 0.0
        while not self.try_lock(at):
            if time.monotonic() > deadline:
                raise LockTimeoutError(
                    f"byte {at} of {self.path} was not free within {timeout:g} s: its holder is "
                    "stopped",
                    path=self.path,
                    byte=at,
                    timeout=timeout,
                )
            time.sleep(pause)
            pause = min(0.001, pause + 0.00002)

    def locked_by_another(self, at: int, length: int = 1) -> bool:
        """Whether someone else holds a byte of `[at, at + length)`; own locks do not count."""
        if _OFD:
            kind = self._call(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, at, length)
            return kind != fcntl.F_UNLCK
        raw = struct.pack("qqihh", at, length, 0, fcntl.F_WRLCK, os.SEEK_SET)  # macOS order
        return bool(
            struct.unpack("qqihh", fcntl.fcntl(self._fd, fcntl.F_GETLK, raw))[3] != fcntl.F_UNLCK
        )

    def _call(self, command: int, kind: int, at: int, length: int = 1) -> int:
        raw = struct.pack(_FLOCK, kind, os.SEEK_SET, at, length, 0)
        return int(struct.unpack(_FLOCK, fcntl.fcntl(self._fd, command, raw))[0])

    def close(self) -> None:
        """Free all and close; calling it again does nothing."""
        fd, self._fd = self._fd, -1  # first: closed twice, the number may be another file's
        if fd >= 0:
            os.close(fd)


_range_locks: weakref.WeakSet[RangeLock] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # The child shares the descriptions: were they left open, a lock would outlive its owner for as
    # long as the child lives. Closing them in the child leaves the parent's locks alone.
    for lock in list(_range_locks):
        lock.close()
    global _held_guard
    for held in list(_held.values()):
        held.file.abandon()
    _held.clear()
    _held_guard = threading.RLock()


os.register_at_fork(after_in_child=_after_fork_in_child)


def lock_path(directory: Path, name: str) -> Path:
    """Where the lock called `name` of a store lies."""
    return directory / f"{name}.lock"
