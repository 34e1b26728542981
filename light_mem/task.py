"""CacheTask: what `create` returns. Its states live in the task table; polling costs no message,
no lock and no system call."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Generator, Sequence
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from light_mem.engine import task_table
from light_mem.engine.process import is_alive
from light_mem.engine.task_table import READ, TableAddress, TaskTable, is_final, is_safe
from light_mem.errors import LockTimeoutError, ServiceClosedError, TaskExpiredError
from light_mem.index.keys import HashValue
from light_mem.layouts import Layout

if TYPE_CHECKING:
    from light_mem.engine.queue import TaskQueue
    from light_mem.session import Place, Session

log = logging.getLogger("light_mem")

# How often a waiter looks whether the server still lives.
_LIVENESS_SECONDS = 0.5


class State(IntEnum):
    """State of a block. Only a Finished block's bytes may be used."""

    Initial = 0
    Working = 1
    Finished = 2
    Aborted = 3


_PUBLIC = (State.Initial, State.Working, State.Finished, State.Aborted, State.Working)


class CacheBlock(NamedTuple):
    """One block of a task at the moment of asking: its hash, its pages in order, its state.

    `regions`, (offset, length) in bytes, is set instead of `pages` by `create_regions`.
    """

    hash: HashValue
    pages: tuple[int, ...]
    state: State
    regions: tuple[tuple[int, int], ...] = ()

    def ready(self) -> bool:
        """Whether the block is Finished."""
        return self.state is State.Finished


class CacheTask:
    """One `create` call: an ordered list of blocks, each with its own state.

    Any thread may use it, and so may any process of the server that it is pickled to. Dropping it
    lets the work go on. When the object that `create` returned is dropped, or knows that the task
    is ready, its room in the table may go to a later task; a pickled copy that asks after that
    gets TaskExpiredError. So keep the original while others poll copies. In another process than
    the server's, asking for an unready task raises ServiceClosedError once the server has died.
    """

    def __init__(
        self,
        *,
        mode: int,
        hashes: Sequence[HashValue],
        layout: Layout,
        already: list[int],
        table: TaskTable | None = None,
        place: Place | None = None,
        session: Session | None = None,
        final: bytes | None = None,
    ) -> None:
        self._mode = mode
        self._hashes = hashes
        self._layout = layout
        self._already = already
        self._final = final  # the states once they are all final
        self._table = table
        self._shared = False  # pickled: copies may look at the table
        if table is not None and place is not None:
            self._row, self._start = place.row, place.start
            self._end = place.start + place.blocks
            self._generation = int(table.generations[place.row])
            if session is not None:
                self._release = weakref.finalize(self, session.release, place)
                self._release.atexit = False

    # --- states ----------------------------------------------------------------------------------

    def _states(self) -> bytes:
        if self._final is not None:
            return self._final
        table = self._table
        assert table is not None
        states = table.snapshot(self._start, self._end)
        # The row after the states: a row that was given away meanwhile has another generation.
        if table.generations[self._row] != self._generation:
            raise TaskExpiredError(
                "the room of this task was given to another one: its creator had dropped it",
                row=self._row,
            )
        if is_final(states):
            self._final = states
            if not self._shared and hasattr(self, "_release"):
                self._release()
        elif table.orphaned:
            raise _server_is_gone(table)
        return states

    def ready(self) -> bool:
        """Whether every block is Finished or Aborted."""
        return self._final is not None or is_final(self._states())

    def data_safe(self) -> bool:
        """Write: whether every byte has left the KV tensor, so that its pages may be reused.

        It may come before `ready()`, never after. For a read it equals `ready()`.
        """
        states = self._states()
        return is_final(states) if self._mode == READ else is_safe(states)

    def state(self) -> list[State]:
        """The state of each block, in the order of the hashes."""
        return [_PUBLIC[s] for s in self._states()]

    def count(self, state: State) -> int:
        """How many blocks are in this state; cheaper than `state()` where there are many."""
        if state is State.Working:  # has two values in the table
            return self.state().count(state)
        return self._states().count(int(state))

    def get_page_already_list(self) -> list[int]:
        """Pages of a write whose blocks were stored when the task was made; fixed from then on."""
        return list(self._already)

    @property
    def mode(self) -> str:
        """ "read" or "write"."""
        return "read" if self._mode == READ else "write"

    @property
    def blocks(self) -> list[CacheBlock]:
        """The blocks with their states now."""
        of = self._layout
        return [
            CacheBlock(h, of.pages_of(at), state, of.regions_of(at))
            for at, (h, state) in enumerate(zip(self._hashes, self.state(), strict=True))
        ]

    def __len__(self) -> int:
        return len(self._hashes)

    def __repr__(self) -> str:
        try:
            states = self.state()
        except (TaskExpiredError, ServiceClosedError) as error:
            return f"<CacheTask {self.mode}, {len(self)} blocks: {error}>"
        counts = ", ".join(f"{states.count(s)} {s.name}" for s in State if s in states)
        return f"<CacheTask {self.mode}, {len(self)} blocks: {counts}>"

    # --- waiting ---------------------------------------------------------------------------------

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until the task is ready, at most `timeout` seconds; returns `ready()`.

        Raises ServiceClosedError when the server dies meanwhile.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            table = self._table
            if table is None or self._final is not None:
                return self.ready()
            seen = int(table.rows["done"][self._row])
            if self.ready():
                return True
            left = _LIVENESS_SECONDS
            if deadline is not None:
                left = min(left, deadline - time.monotonic())
                if left <= 0:
                    return False
            table.futex.wait(table.row_word(self._row), seen, left)
            if not self.ready():
                check_server(table)

    def __await__(self) -> Generator[Any, None, CacheTask]:
        """Wait without blocking the event loop; the result is the task itself."""
        if not self.ready():
            loop = asyncio.get_running_loop()
            future: asyncio.Future[None] = loop.create_future()
            assert self._table is not None
            settle = partial(_complete, future)
            _notifier(self._table).add(_Waiting(self, settle, lambda: not future.cancelled()))
            yield from future.__await__()
        return self

    def add_done_callback(self, callback: Callable[[CacheTask], object]) -> None:
        """Call `callback(task)` once, when the task is ready or its server has died.

        At once, in this thread, when that is so already; else in a thread that all waiting tasks
        of the service share, so it is to return soon. What it raises is logged.
        """
        table = self._table
        if table is None or _outcome(self) is not None:
            _call(callback, self)
        else:
            settle: Callable[[_Outcome], None] = lambda _: _call(callback, self)  # noqa: E731
            _notifier(table).add(_Waiting(self, settle, lambda: True))

    def abort(self, queue: TaskQueue, timeout: float) -> None:
        """For `CacheService.abort`; raises LockTimeoutError when a worker does not let go."""
        table = self._table
        if table is None or self.ready():
            return
        queue.abort(table, self._start, self._end, self._row, self._generation)
        if not self.wait(timeout):
            raise LockTimeoutError(
                f"a worker did not let go of the task's pages within {timeout:g} s: it is stopped",
                path="task",
                timeout=timeout,
            )

    # --- other processes -------------------------------------------------------------------------

    def __reduce__(self) -> tuple[Any, ...]:
        self._shared = True
        address = None
        where = None
        if self._table is not None and not self.ready():
            address = self._table.address()
            where = (self._row, self._start, self._end, self._generation)
        fields = (
            self._mode,
            list(self._hashes),
            self._layout,
            self._already,
            self._final,
        )
        return _restore, (address, where, fields)


def _restore(
    address: TableAddress | None,
    where: tuple[int, int, int, int] | None,
    fields: tuple[Any, ...],
) -> CacheTask:
    mode, hashes, layout, already, final = fields
    task = CacheTask(
        mode=mode,
        hashes=hashes,
        layout=layout,
        already=already,
        final=final,
    )
    if address is not None and where is not None:
        task._table = TaskTable.attach(address)
        task._row, task._start, task._end, task._generation = where
    return task


def check_server(table: TaskTable) -> None:
    """Raise ServiceClosedError when the process that runs the workers is gone."""
    header = table.header
    pid, started = int(header["server_pid"][0]), float(header["server_started"][0])
    if table.orphaned or (pid != os.getpid() and not is_alive(pid, started)):
        raise _server_is_gone(table)


def _server_is_gone(table: TaskTable) -> ServiceClosedError:
    pid = int(table.header["server_pid"][0])
    return ServiceClosedError(f"the server (pid {pid}) is gone", pid=pid)


class _Waiting(NamedTuple):
    """Somebody who is to be told of a task, unless not `wanted()` any more."""

    task: CacheTask
    settle: Callable[[_Outcome], None]
    wanted: Callable[[], bool]


class _Notifier:
    """Tells of the ready tasks of one table: one thread, which lives while somebody waits."""

    def __init__(self, table: TaskTable) -> None:
        self._table = weakref.ref(table)
        self._guard = threading.Lock()
        self._numbers = itertools.count()
        self._waiting: dict[int, _Waiting] = {}
        self._running = False
        self._looked = 0.0  # when the server was last seen alive

    def add(self, waiting: _Waiting) -> None:
        number = next(self._numbers)
        with self._guard:
            self._waiting[number] = waiting
            if not self._running:
                try:
                    threading.Thread(target=self._run, name="lightmem-await", daemon=True).start()
                except RuntimeError:  # no more threads: the next one to wait tries again
                    del self._waiting[number]
                    raise
                self._running = True
        # The thread reads the word that it sleeps on before it looks who waits: a task that gets
        # ready after this line wakes it, one that is ready by now may have done so too early.
        outcome = _outcome(waiting.task)
        if outcome is not None:
            self._settle(number, outcome)

    def _settle(self, number: int, outcome: _Outcome) -> None:
        with self._guard:
            waiting = self._waiting.pop(number, None)
        if waiting is not None:
            waiting.settle(outcome)

    def _run(self) -> None:
        try:
            while self._tell():
                pass
        except BaseException:
            with self._guard:
                self._running = False  # the next one to wait starts another thread
            raise

    def _tell(self) -> bool:
        """Tell of what is ready now, or sleep; False: nobody waits any more."""
        table = self._table()
        seen = 0 if table is None else int(table.header["done_seq"][0])
        with self._guard:
            if table is None or not self._waiting:
                self._running = False
                return False
            waiting = list(self._waiting.items())
        gone = self._gone(table)
        settled = False
        for number, each in waiting:
            outcome = _outcome(each.task) or gone
            if outcome is not None or not each.wanted():
                self._settle(number, outcome or True)
                settled = True
        waiting.clear()
        if not settled:
            table.futex.wait(table.done_word, seen, _LIVENESS_SECONDS / 10)
        return True

    def _gone(self, table: TaskTable) -> ServiceClosedError | None:
        now = time.monotonic()
        if now - self._looked < _LIVENESS_SECONDS:
            return None
        self._looked = now
        try:
            check_server(table)
        except ServiceClosedError as error:
            return error
        return None


_Outcome = Exception | bool  # True: ready; else what the one who waits gets raised


def _outcome(task: CacheTask) -> _Outcome | None:
    """None: not ready, and nothing is wrong."""
    try:
        return task.ready() or None
    except (TaskExpiredError, ServiceClosedError) as error:
        return error


def _complete(future: asyncio.Future[None], outcome: _Outcome) -> None:
    def settle() -> None:
        if not future.done():
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(None)

    try:
        future.get_loop().call_soon_threadsafe(settle)
    except RuntimeError:
        pass  # the loop was closed: nobody awaits any more


def _call(callback: Callable[[CacheTask], object], task: CacheTask) -> None:
    try:
        callback(task)
    except BaseException as error:  # SystemExit too: the thread has others to tell
        # As text: a log record that is kept would keep the memory of the task.
        text = f"{type(error).__name__}: {error}"
        log.error("a callback of %s failed: %s", repr(task), text)


_notifiers: weakref.WeakKeyDictionary[TaskTable, _Notifier] = weakref.WeakKeyDictionary()
_notifiers_guard = threading.Lock()


def _notifier(table: TaskTable) -> _Notifier:
    with _notifiers_guard:
        return _notifiers.setdefault(table, _Notifier(table))


def _after_fork_in_child() -> None:
    # The threads that tell are the parent's.
    global _notifiers_guard
    _notifiers_guard = threading.Lock()
    _notifiers.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


assert [int(s) for s in State] == [
    task_table.INITIAL,
    task_table.WORKING,
    task_table.FINISHED,
    task_table.ABORTED,
]
