"""The error tree: every error is a LightMemError and the built-in a caller would catch.

Each carries the values of its message as attributes and survives pickling, because tasks and
clients cross process borders. Damage on disk is not here: it is a miss, logged and counted.
"""

from __future__ import annotations

import errno
import reprlib
from typing import Any


class LightMemError(Exception):
    """Base of all errors raised by this package.

    Keyword arguments become attributes: `InvalidArgumentError("...", page=3).page == 3`.
    """

    def __init__(self, message: str, **values: Any) -> None:
        super().__init__(message)
        for name, value in values.items():
            setattr(self, name, value)
        self.message = message
        self.values = values  # after the attributes: one may have this name

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        values = {name: _plain(value) for name, value in self.values.items()}
        return _rebuild, (type(self), self.message, values)


def _plain(value: Any) -> Any:
    """What of a value crosses a process border: plain data as it is, of all else its text."""
    if isinstance(value, (list, tuple)) and len(value) < 1000:
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value
    if value is None or isinstance(value, (str, bytes, int, float)):
        return value
    return reprlib.repr(value)


def _rebuild(cls: type[LightMemError], message: str, values: dict[str, Any]) -> LightMemError:
    return cls(message, **values)


class InvalidArgumentError(LightMemError, ValueError):
    """An argument that no state of the store or service could make right.

    The argument as it was given is the attribute of its own name (`mode`, `hash_values`), and
    there are of these what fits the message:

    value                      the wrong one of several, or of an environment `variable`; also
                               where the argument's name stands for how many there are
    argument, position         the list that the value is in, and where
    found, expected            what it is, and what it should be; of an array also `shape`,
                               `strides`, `dtype`, `ndim`, `readonly`
    hashes, pages, regions, length, accepted   how many there are, and how many would do
    size, page_bytes           in bytes
    needed, limit, capacity    of what the message counts
    page, offset               what one task would read into twice
    missing, unknown, allowed  options, or CPUs
    path                       of the file that the argument came from
    source                     how memory was to be mapped, a MemorySource
    pool, layout, device       of a host pool of SGLang
    agreed, mine               numbers of all ranks and of this one
    reason                     what the error below it says
    """


class PageIndexError(InvalidArgumentError, IndexError):
    """A page index outside the KV tensor: attributes `page`, `num_pages`.

    Of a region in bytes `offset`, `length`, and `nbytes` of the tensor.
    """


class KVCacheMemoryError(LightMemError, ValueError):
    """The KV tensor lies in memory that worker processes cannot map.

    Attributes, each where it is known: `path` of what is mapped there, `paths` where that is
    several things, `address` where it is nothing, or where it was before it was moved; `source`,
    how it was to be mapped, `size` of the object and the bytes `needed`; `pool` of SGLang;
    `reason`, what the error below it says.
    """


class _SystemError(LightMemError, OSError):
    """An OSError with an `errno`: subclasses name the usual one."""

    default_errno = errno.EIO

    def __init__(self, message: str, **values: Any) -> None:
        super().__init__(message, **values)
        self.errno = values.get("errno", self.default_errno)
        self.strerror = message


class SharedMemoryFullError(_SystemError):
    """Not enough shared memory for the KV tensor: attributes `needed`, `available` (bytes)."""

    default_errno = errno.ENOSPC


class StoreFullError(_SystemError):
    """The file system has no room for the store: attributes `needed`, `available` (bytes)."""

    default_errno = errno.ENOSPC


class StoreBusyError(_SystemError):
    """Another process has the store open and the operation needs it alone: attribute `owners`."""

    default_errno = errno.EBUSY


class PinLimitError(_SystemError):
    """Half of a shard's slots may be pinned, and these hashes would be more; none of them was.

    Attributes `shard`, `pinned`, `needed`, `limit` (slots).
    """

    default_errno = errno.EDQUOT


class LeaseLimitError(_SystemError):
    """Too many blocks are viewed: half of a shard's slots, or as many as one process may.

    Attributes `shard`, `leased`, `needed`, `limit`; slots, or (`shard` -1) blocks of this process.
    """

    default_errno = errno.EDQUOT


class StoreFormatError(LightMemError, ValueError):
    """The directory holds no store of this format, files of others, or another geometry's store.

    Nothing was changed or deleted. Attributes `path` (of the store, or of its file that is wrong),
    `field`, `found`, `expected`.
    """


class ExportExistsError(_SystemError, FileExistsError):
    """The file of an export is there already, or another export is writing it: attribute `path`."""

    default_errno = errno.EEXIST


class BlockNotStoredError(_SystemError):
    """An import could not store a block: an I/O error, or a lock that was not free in time. What
    was stored before it stays.

    Attributes `key` (32 hex digits), `outcome` (the name of an `Outcome`).
    """


class StoreDamagedError(_SystemError):
    """`check()` found damage that it was not allowed, or not able, to repair.

    Attribute `report`, the VerifyReport.
    """


class LockTimeoutError(LightMemError, TimeoutError):
    """A lock was not free in time.

    Attributes `timeout` (seconds); `path`, of the file with the lock (the queue's is the task
    table, as this process has it open), or of the store; `byte`, where that alone is locked;
    `shards`, where several locks are meant. Where there is no path, `what`: "task". `holder`: the
    pid of who has the lock, None where the kernel does not tell.
    """

    holder: int | None = None


class TaskTableFullError(LightMemError, TimeoutError):
    """No room in the task table in time: attributes `blocks`, `capacity`, `timeout` (seconds)."""


class TaskExpiredError(LightMemError, LookupError):
    """The task's row was given to another task after its creator had dropped it.

    Attribute `row`, of the task table.
    """


class ServiceClosedError(LightMemError, RuntimeError):
    """The service is closed, or its server process is gone or not this process's to look at.

    Attributes `pid`, of a server that is gone; `shard`, when its files are closed; `pool` and
    `pools`, when SGLang asks for one that was not opened.
    """


class ForkedProcessError(LightMemError, RuntimeError):
    """A service or client was used in a forked child; hand a client over instead.

    Attribute `pid`, of the child.
    """


class WorkerStartError(LightMemError, RuntimeError):
    """Worker processes could not be started, or died again and again.

    Attributes `reason`, and `log`, the last line that they said.
    """
