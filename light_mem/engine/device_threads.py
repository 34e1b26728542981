"""Threads that wait for a device: they hold no lock of Python's while they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

P = ParamSpec("P")
R = TypeVar("R")

# Of each worker. Four brought a tenth less: what they read waits for the same processor.
_THREADS = 2


class DeviceThreads:
    """Started with the first call. Not thread-safe."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Have a call made by one of the threads; made here when the system gives no thread."""
        if self._pool is None:
            from concurrent.futures import ThreadPoolExecutor  # 10 ms that few workers need

            self._pool = ThreadPoolExecutor(_THREADS, self._name)
        try:
            return self._pool.submit(call, *args, **kwargs)
        except RuntimeError:
            # The pool queues a call before it starts the thread for it, so a thread that it has
            # may make the call yet: not after this, when its memory may be another's.
            self.close()
            return _made(call, *args, **kwargs)

    def close(self) -> None:
        """Wait for what was submitted and end the threads."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _made(call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
    from concurrent.futures import Future

    future: Future[R] = Future()
    try:
        future.set_result(call(*args, **kwargs))
    except Exception as error:
        future.set_exception(error)
    return future


def give_up(call: Future[R]) -> None:
    """Return when a call has ended, however, or will never begin: its memory is free then."""
    if not call.cancel():
        call.exception()
