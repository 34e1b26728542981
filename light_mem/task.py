"""CacheTask: what `create` returns. Its states live in the task table; polling costs no message,
no lock and no system call."""

from __future__ import annotations

import asyncio
import logging
import math
import reprlib
import time
import traceback
import weakref
from collections.abc import Callable, Generator, Sequence
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any

from light_mem.engine.table_layout import READ, is_final, is_safe
from light_mem.engine.task_table import TableAddress, TaskTable
from light_mem.errors import (
    InvalidArgumentError,
    LockTimeoutError,
    ServiceClosedError,
    TaskExpiredError,
)
from light_mem.index.keys import HashValue, is_bool
from light_mem.index.locks import SHORT_SECONDS
from light_mem.layouts import Layout
from light_mem.states import CacheBlock, State
from light_mem.waiting import (
    LIVENESS_SECONDS,
    Settled,
    Waiting,
    check_server,
    complete,
    notifier_of,
    outcome_of,
    server_is_gone,
)

if TYPE_CHECKING:
    from light_mem.engine.queue import TaskQueue
    from light_mem.lane_room import Room
    from light_mem.session import Session

log = logging.getLogger("light_mem")


_FINISHED = bytes([State.Finished])
_PUBLIC = (State.Initial, State.Working, State.Finished, State.Aborted, State.Working)


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
        room: Room | None = None,
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
        self._kept: object = None
        if table is not None and room is not None:
            self._row, self._start = room.row, room.start
            self._end = room.start + room.blocks
            self._generation = int(table.generations[room.row])
            if session is not None:
                self._release = weakref.finalize(self, session.release, room)
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
            final: bytes | None = self.__dict__["_final"]  # as another thread may have set it
            if final is not None:
                return final
            raise TaskExpiredError(
                "the room of this task was given to another one: its creator had dropped it",
                row=self._row,
            )
        if is_final(states):
            self._final, self._kept = states, None
            if not self._shared and hasattr(self, "_release"):
                # Not `self._release()`, which forgets it first: a signal that raises then would
                # lose the room. Twice is as once.
                if known := self._release.peek():
                    known[1](*known[2])
                self._release.detach()
        elif table.orphaned:
            raise server_is_gone(table)
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

    def finished_prefix(self) -> int:
        """How many leading blocks are Finished, so far: of a read, those whose pages may be used.

        What lies behind them is of no use to a prefix, and a worker may be at it until `ready()`.
        """
        states = self._states()
        return len(states) - len(states.lstrip(_FINISHED))

    def count(self, state: State) -> int:
        """How many blocks are in this state; cheaper than `state()` where there are many."""
        if type(state) is not State:
            try:
                state = State(state)
            except ValueError:
                raise InvalidArgumentError(
                    f"state is a light_mem.State, not {reprlib.repr(state)}", state=state
                ) from None
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

        No more than 0 seconds, as what is left of a deadline may be: it only looks. Raises
        ServiceClosedError when the server dies meanwhile, InvalidArgumentError.
        """
        deadline = None if timeout is None else time.monotonic() + _number(timeout)
        while True:
            table = self._table
            if table is None or self._final is not None:
                return self.ready()
            seen = int(table.rows["done"][self._row])
            if self.ready():
                return True
            left = LIVENESS_SECONDS
            if deadline is not None:
                left = min(left, deadline - time.monotonic())
                if left <= 0:
                    return False
            table.futex.wait(table.row_word(self._row), seen, left)
            if not self.ready():
                check_server(table, int(table.rows["created"][self._row]))

    def __await__(self) -> Generator[Any, None, CacheTask]:
        """Wait without blocking the event loop; the result is the task itself."""
        if not self.ready():
            loop = asyncio.get_running_loop()
            future: asyncio.Future[None] = loop.create_future()
            assert self._table is not None
            settle = partial(complete, future)
            notifier_of(self._table).add(Waiting(self, settle, lambda: not future.cancelled()))
            yield from future.__await__()
        return self

    def add_done_callback(self, callback: Callable[[CacheTask], object]) -> None:
        """Call `callback(task)` once, when the task is ready or its server has died.

        At once, in this thread, when that is so already; else in a thread that all waiting tasks
        of the service share, so it is to return soon. What it raises is logged.
        """
        if not callable(callback):
            raise InvalidArgumentError(f"no callback: {callback!r}", callback=callback)
        table = self._table
        if table is None or outcome_of(self) is not None:
            _call(callback, self)
        else:
            settle: Callable[[Settled], None] = lambda _: _call(callback, self)  # noqa: E731
            notifier_of(table).add(Waiting(self, settle, lambda: True))

    def abort(self, queue: TaskQueue, timeout: float) -> None:
        """For `CacheService.abort`; raises LockTimeoutError when a worker does not let go."""
        table = self._table
        if table is None or self.ready():
            return
        deadline = time.monotonic() + timeout
        # Whoever has the queue in hand and lives needs a moment: without it nothing is aborted.
        patience = max(timeout, SHORT_SECONDS)
        queue.abort(table, self._start, self._end, self._row, self._generation, patience)
        if not self.wait(deadline - time.monotonic()):
            raise LockTimeoutError(
                f"a worker did not let go of the task's pages within {timeout:g} s: it is stopped",
                what="task",
                timeout=timeout,
            )

    def keep(self, needed: object) -> None:
        """Have what the task needs stay until it is known to be ready."""
        if self._final is None:
            self._kept = needed

    # --- other processes -------------------------------------------------------------------------

    def __reduce__(self) -> tuple[Any, ...]:
        self._shared = True
        address = None
        where = None
        if self._table is not None and not self.ready():
            address = self._table.address()
            where = (self._row, self._start, self._end, self._generation)
        fields = (self._mode, list(self._hashes), self._layout, self._already, self._final)
        return _restore, (address, where, fields)


def _number(timeout: object) -> float:
    number = float(timeout) if isinstance(timeout, Real) and not is_bool(timeout) else math.nan
    if not math.isnan(number):
        return number
    raise InvalidArgumentError(
        f"timeout is a number of seconds or None, not {reprlib.repr(timeout)}", timeout=timeout
    )


def _call(callback: Callable[[CacheTask], object], task: CacheTask) -> None:
    try:
        callback(task)
    except BaseException:  # SystemExit too: the thread has others to tell
        # As text, not by `exc_info`: a log record that is kept would keep the memory of the task.
        log.error("a callback of %s failed: %s", repr(task), traceback.format_exc().rstrip())


def _restore(
    address: TableAddress | None,
    where: tuple[int, int, int, int] | None,
    fields: tuple[Any, ...],
) -> CacheTask:
    mode, hashes, layout, already, final = fields
    task = CacheTask(mode=mode, hashes=hashes, layout=layout, already=already, final=final)
    if address is not None and where is not None:
        task._table = TaskTable.attach(address)
        task._row, task._start, task._end, task._generation = where
    return task
