"""The locks of a store's members: on a byte of `owners`, and on the same byte of the directory.

The file `owners` may be removed, or a copy be put in its place (a backup that is restored), while
processes have the store open. Whoever opened the store then would find nobody in it, cut files that
others have mapped and give away blocks that they look at. The directory cannot be lost like that:
who finds the store by its path has it in hand. So member n also has a lock on byte n of the
directory, and a byte that is taken there and free in `owners` is of somebody who is not listed.

That lock is shared, since a directory can only be opened for reading, and who asks for it takes
none, so nobody is in the way of another. It comes after the other one and goes before it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from light_mem.errors import StoreBusyError
from light_mem.index.format import MAX_OWNERS
from light_mem.index.locks import RangeLock
from light_mem.index.store_files import open_directory, open_file

# A process that is killed does not let go of both locks in one step.
_DYING_SECONDS = 1.0
_LOOK_SECONDS = 0.005


class Place(NamedTuple):
    """Which directory one is, whatever its path by now."""

    device: int
    inode: int

    @classmethod
    def of(cls, found: os.stat_result) -> Place:
        """That of what was looked at."""
        return cls(found.st_dev, found.st_ino)


class DirectoryLocks:
    """Shared locks on bytes of a directory. Where its file system refuses them there are none: then
    `owners` alone says who is a member."""

    def __init__(self, directory: Path) -> None:
        """Raises OSError."""
        descriptor = open_directory(directory)
        self.place = Place.of(os.fstat(descriptor))
        self._locks = RangeLock(directory, descriptor)

    def share(self, number: int) -> None:
        """Take a byte, beside others who may have it."""
        with suppress(OSError):
            self._locks.share(number)

    def unlock(self, number: int) -> None:
        """Free a byte."""
        with suppress(OSError):
            self._locks.unlock(number)

    def locked_by_another(self, at: int, length: int = 1) -> bool:
        """Whether someone else holds a byte of `[at, at + length)`."""
        try:
            return self._locks.locked_by_another(at, length)
        except OSError:
            return False

    def require_listed(self, path: Path, is_listed: Callable[[int], bool]) -> None:
        """Raise StoreBusyError where someone else has a byte that `is_listed` does not know, which
        asks the file `path`, for longer than a process takes to die."""
        deadline = time.monotonic() + _DYING_SECONDS
        number = 0
        while self.locked_by_another(number, MAX_OWNERS - number):
            if is_listed(number) or not self.locked_by_another(number):
                number += 1
            elif time.monotonic() > deadline:
                raise StoreBusyError(
                    f"{path} was removed or replaced while others have the store open: who they "
                    f"are is not known (`fuser -v {path.parent}` may say it), nor what they look "
                    "at. Stop them first",
                    owners=[],
                )
            else:
                time.sleep(_LOOK_SECONDS)

    def close(self) -> None:
        """Free all and close; calling it again does nothing."""
        self._locks.close()


class MemberLocks:
    """Both locks of each member, as one. Threads of one process share the object and so its locks:
    keep them apart."""

    def __init__(self, path: Path, directory: DirectoryLocks, flags: int) -> None:
        """`path`: of the file `owners`; `directory`: closed with this object. Raises OSError."""
        self._listed = RangeLock(path, open_file(path, flags))
        self._directory = directory
        self.place = directory.place

    def require_listed(self) -> None:
        """Raise StoreBusyError where a member is not in this file: another one was here."""
        path = Path(self._listed.path)
        self._directory.require_listed(path, self._listed.locked_by_another)

    def try_lock(self, number: int) -> bool:
        """Take a member's locks if they are free; the kernel frees them when the process dies."""
        if not self._listed.try_lock(number):
            return False
        if self._directory.locked_by_another(number):  # of one who is just dying
            self._listed.unlock(number)
            return False
        self._directory.share(number)
        return True

    def unlock(self, number: int) -> None:
        """Free a member's locks."""
        self._directory.unlock(number)
        self._listed.unlock(number)

    def locked_by_another(self, at: int, length: int = 1) -> bool:
        """Whether a member with a number in `[at, at + length)` lives; own locks do not count."""
        return self._listed.locked_by_another(at, length)

    def others(self) -> bool:
        """Whether any other process is a member, be it listed or not."""
        listed, directory = self._listed, self._directory
        return listed.locked_by_another(0, MAX_OWNERS) or directory.locked_by_another(0, MAX_OWNERS)

    def close(self) -> None:
        """Free all and close; calling it again does nothing."""
        self._directory.close()
        self._listed.close()
