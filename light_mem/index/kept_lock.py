"""A `filelock` lock that keeps its file open between two holds.

filelock opens and closes the file each time, which costs more than everything else that a holder
of a shard's lock does for a block. The lock is the same flock(2) on the same file, so it excludes
plain `filelock.FileLock` objects, other processes, and other objects of this one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time

import filelock

from light_mem.index import store_files

# Pauses (s) before the first retries. A shard's lock is held for about 100 us; without them a
# waiter would sleep for 500 us (`locks.POLL_SECONDS`).
PAUSES = (0.00002, 0.00005, 0.0001)


class KeptFileLock(filelock.BaseFileLock):
    """An exclusive lock on one path. Not reentrant; threads need a lock of their own around it.

    A file that was replaced or deleted while it was open here is noticed at the next acquisition:
    the lock is always that of the file which the path names.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path, mode=0o600, thread_local=False)
        self._path = path
        self._descriptor = -1
        self._identity = (0, 0)
        self._locked = False

    @property
    def is_locked(self) -> bool:
        """Whether this object holds the lock."""
        return self._locked

    def try_now(self) -> bool:
        """Take the lock without waiting for long, and without what filelock does around it: a free
        lock is taken in a third of the time. Let go of it with `let_go`."""
        self._acquire()
        return self._locked

    def let_go(self) -> None:
        """Release what `try_now` took."""
        self._release()

    def _acquire(self) -> None:
        pauses = iter(PAUSES)
        while not self._locked:
            if self._descriptor < 0:
                self._open()
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                if self._is_current():
                    pause = next(pauses, None)
                    if pause is None:
                        return  # somebody else's: the caller waits and tries again
                    time.sleep(pause)
                    continue
            else:
                # After the lock: the file may have been replaced between the two calls.
                self._locked = self._is_current()
            if not self._locked:
                self.abandon()

    def _release(self) -> None:
        self._locked = False
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _open(self) -> None:
        try:
            self._descriptor = store_files.open_or_make(self._path)
        except OSError as error:
            # Others may change what this one may only look at. flock(2) needs no right to write.
            if error.errno not in (errno.EROFS, errno.EACCES) or not os.path.exists(self._path):
                raise
            self._descriptor = store_files.open_file(self._path, os.O_RDONLY)
        found = os.fstat(self._descriptor)
        self._identity = (found.st_dev, found.st_ino)

    def _is_current(self) -> bool:
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            return False
        return (found.st_dev, found.st_ino) == self._identity

    def abandon(self) -> None:
        """Close the descriptor without unlocking: in a forked child the lock is the parent's, and
        left open it would outlive the parent for as long as the child lives."""
        self._locked = False
        # No call between the two, at which a signal handler might raise: nobody would close it.
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            try:
                os.close(descriptor)
            except OSError:
                pass

    def __del__(self) -> None:
        # Closing is unlocking, unless a forked child still has it open.
        if getattr(self, "_descriptor", -1) >= 0:
            self.abandon()
