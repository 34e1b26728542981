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
        self.message = message
        self.values = values
        for name, value in values.items():
            setattr(self, name, value)

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
    """An argument that no state of the store or service could make right."""


class PageIndexError(InvalidArgumentError, IndexError):
    """A page index outside the KV tensor: attributes `page`, `num_pages`."""


class KVCacheMemoryError(LightMemError, ValueError):
    """The KV tensor lies in memory that worker processes cannot map."""


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

    Nothing was changed or deleted. Attributes `path`, `field`, `found`, `expected`.
    """


class StoreDamagedError(_SystemError):
    """`check()` found damage that it was not allowed, or not able, to repair."""


class LockTimeoutError(LightMemError, TimeoutError):
    """A lock was not free in time: attributes `path`, `timeout` (seconds)."""


class TaskTableFullError(LightMemError, TimeoutError):
    """No room in the task table in time: attributes `blocks`, `capacity`, `timeout` (seconds)."""


class TaskExpiredError(LightMemError, LookupError):
    """The task's row was given to another task after its creator had dropped it."""


class ServiceClosedError(LightMemError, RuntimeError):
    """The service is closed, or its server process is gone."""


class ForkedProcessError(LightMemError, RuntimeError):
    """A service or client was used in a forked child; hand a client over instead."""


class WorkerStartError(LightMemError, RuntimeError):
    """Worker processes could not be started, or died again and again."""
