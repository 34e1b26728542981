"""The files of a store, opened and made: never through a symlink, and in another user's directory
never root's own.

Root runs the tools over stores of services that are not root's. What a symlink there leads to may
be anybody's, and a file that root kept would shut the service out.
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

from light_mem.descriptors import keep_standard_numbers
from light_mem.errors import StoreFormatError

log = logging.getLogger("light_mem")

_MODE = 0o600


def open_file(path: str | os.PathLike[str], flags: int) -> int:
    """A descriptor of a file of a store. Raises OSError; StoreFormatError for a symlink."""
    keep_standard_numbers()
    try:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, _MODE)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise refused_link(Path(path)) from None


def open_directory(path: str | os.PathLike[str]) -> int:
    """A descriptor of a store's directory, to look at and to lock. Raises OSError."""
    keep_standard_numbers()
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def open_or_make(path: str | os.PathLike[str]) -> int:
    """A descriptor to read and write a file with, which is made, empty, where it is missing. Raises
    as `open_file`."""
    path = Path(path)
    owner = _other_owner(path.parent)
    if owner is None:
        return open_file(path, os.O_RDWR | os.O_CREAT)
    while True:
        try:
            return open_file(path, os.O_RDWR)
        except FileNotFoundError:
            pass
        try:
            return _make_for(path, owner)
        except FileExistsError:
            pass  # somebody was faster: theirs is opened


def make(path: Path) -> int:
    """A descriptor to read and write a new, empty file with, in the place of whatever has its name:
    one that is renamed when it is whole. Raises OSError."""
    path.unlink(missing_ok=True)  # a pid comes again
    return _make_exclusively(path, _other_owner(path.parent))


def refused_link(path: Path) -> StoreFormatError:
    """The error that a file of a store is a symlink."""
    return StoreFormatError(
        f"{path} is a symlink, which no file of a store may be: what it leads to may be another's. "
        "The directory of a store may be one; nothing was changed",
        path=str(path),
        field="file",
        found="symlink",
        expected="file",
    )


def _other_owner(directory: Path) -> tuple[int, int] | None:
    """User and group of a directory that belongs to somebody else, where this process is root: what
    it makes there is to be theirs."""
    if os.geteuid() != 0:
        return None
    found = os.stat(directory)
    return (found.st_uid, found.st_gid) if found.st_uid else None


def _make_for(path: Path, owner: tuple[int, int]) -> int:
    """Make a file that is the owner's as soon as it has its name: their service may look for it
    meanwhile, and this process may be killed. Raises FileExistsError."""
    keep_standard_numbers()
    try:
        descriptor = os.open(path.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, _MODE)
    except (AttributeError, OSError):  # a system, or a file system, without files without a name
        return _make_exclusively(path, owner)
    try:
        _give(descriptor, path, owner)
        _name(descriptor, path)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError) and not isinstance(error, FileExistsError):  # no /proc
            return _make_exclusively(path, owner)
        raise
    return descriptor


def _name(descriptor: int, path: Path) -> None:
    directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Only with a directory's descriptor does Python follow the link that /proc has there.
        os.link(f"/proc/self/fd/{descriptor}", path.name, dst_dir_fd=directory)
    finally:
        os.close(directory)


def _make_exclusively(path: Path, owner: tuple[int, int] | None) -> int:
    descriptor = open_file(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        if owner is not None:
            _give(descriptor, path, owner)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _give(descriptor: int, path: Path, owner: tuple[int, int]) -> None:
    try:
        os.fchown(descriptor, *owner)
    except OSError as error:  # a root that may not, or a user whom this namespace does not have
        log.warning("%s stays root's and may shut user %d out: %s", path, owner[0], error)
