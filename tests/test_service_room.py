"""Room in the task table: it is bounded, waited for, and used again without mixing tasks up."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from light_mem import (
    CacheTask,
    InvalidArgumentError,
    LockTimeoutError,
    State,
    TaskExpiredError,
    TaskTableFullError,
)
from light_mem.engine.queue import QUEUE_BYTE
from light_mem.index.locks import RangeLock
from tests.conftest import wait_until
from tests.deaths import interleave
from tests.service_rig import WAIT, rig


async def _awaited(task: CacheTask) -> CacheTask:
    return await task


def test_a_full_table_makes_create_wait_and_then_fail(tmp_path: Path) -> None:
    with rig(tmp_path, run=False, max_blocks=4, create_timeout=0.2) as r:
        tasks = [r.service.create("w", [f"a{n}", f"b{n}"], [0, 1]) for n in range(2)]
        started = time.monotonic()
        with pytest.raises(TaskTableFullError) as caught:
            r.service.create("w", ["c"], [2])
        assert 0.2 <= time.monotonic() - started < 5
        assert isinstance(caught.value, TimeoutError)
        assert (caught.value.blocks, caught.value.capacity) == (1, 4)  # type: ignore[attr-defined]
        with pytest.raises(InvalidArgumentError, match="max_blocks") as too_large:
            r.service.create("w", [f"c{n}" for n in range(5)], range(5))
        assert too_large.value.needed == 5  # type: ignore[attr-defined]
        r.service.run()
        assert r.service.create("w", ["c"], [2]).wait(WAIT)
        assert all(task.state() == [State.Finished] * 2 for task in tasks)


def test_room_comes_back_while_the_user_keeps_every_task(tmp_path: Path) -> None:
    with rig(tmp_path, max_blocks=4, slots=128) as r:
        r.write(["stored"], [0])
        kept = []
        for n in range(60):
            r.fill(f"k{n}", [1])
            kept.append(r.service.create("w", [f"k{n}", "stored"], [1, 2]))
            if n % 3 == 0:
                assert kept[-1].wait(WAIT)  # others nobody asks
            else:
                wait_until(kept[-1].data_safe)
        assert all(task.wait(WAIT) for task in kept)
        assert all(task.state() == [State.Finished] * 2 for task in kept)
        assert all(task.get_page_already_list() == [2] for task in kept)


def test_tasks_dropped_unread_do_their_work_and_free_their_room(tmp_path: Path) -> None:
    with rig(tmp_path, max_blocks=4, slots=128, pages=64) as r:
        for n in range(60):
            r.fill(f"k{n}", [n])
            r.service.create("w", [f"k{n}"], [n])
        wait_until(lambda: r.service.active_create_count("write") == 0)
        assert r.service.query([f"k{n}" for n in range(60)]) == [True] * 60


def test_a_copy_of_a_dropped_task_expires_when_its_row_is_used_again(tmp_path: Path) -> None:
    with rig(tmp_path, run=False, max_blocks=1) as r:
        task = r.service.create("w", ["a"], [0])
        copy, expiring = (pickle.loads(pickle.dumps(task)) for _ in range(2))
        assert copy.state() == [State.Initial]
        assert copy.wait(0.01) is False
        r.service.run()
        assert copy.wait(WAIT)
        late = pickle.loads(pickle.dumps(task))
        del task
        assert r.service.create("w", ["b"], [0]).wait(WAIT)
        # Those that saw or were told the end know their states for good.
        assert copy.state() == late.state() == [State.Finished]
        with pytest.raises(TaskExpiredError) as caught:
            expiring.ready()
        assert isinstance(caught.value, LookupError)
        for ask in (expiring.state, expiring.data_safe, expiring.wait):
            with pytest.raises(TaskExpiredError):
                ask()
        with pytest.raises(TaskExpiredError):
            asyncio.run(_awaited(expiring))
        assert "given to another" in repr(expiring)


def test_a_pickled_original_keeps_its_room(tmp_path: Path) -> None:
    with rig(tmp_path, max_blocks=1, run=False, create_timeout=0.1) as r:
        task = r.service.create("w", ["a"], [0])
        copy = pickle.loads(pickle.dumps(task))
        r.service.run()
        assert task.wait(WAIT)
        with pytest.raises(TaskTableFullError):
            r.service.create("w", ["b"], [0])
        assert copy.state() == [State.Finished]
        del task
        assert r.service.create("w", ["b"], [0]).wait(WAIT)


def test_a_read_is_never_done_as_the_write_that_had_its_cell(tmp_path: Path) -> None:
    # An aborted write leaves its entry in the ring of writes. Before the mode of a cell was looked
    # at, a read that got the cell was claimed with the writes, and was Finished without a copy.
    with rig(tmp_path, max_blocks=2, slots=128) as r:
        (worker,) = r.service.worker_pids
        for n in range(12):
            r.write([f"stored {n}"], [0])
            for _ in range(n % 4):  # every place in the workers' turns
                assert r.service.create("r", [f"stored {n}"], [5]).wait(WAIT)
            os.kill(worker, signal.SIGSTOP)
            try:
                first = r.service.create("w", [f"first {n}"], [1])
                r.service.abort(r.service.create("w", [f"aborted {n}"], [2]))
                r.blank([3])
                read = r.service.create("r", [f"stored {n}"], [3])
            finally:
                os.kill(worker, signal.SIGCONT)
            assert read.wait(WAIT)
            assert read.state() == [State.Finished]
            assert r.holds(f"stored {n}", [3])
            assert first.wait(WAIT)
            assert first.state() == [State.Finished]


def test_aborted_entries_never_push_a_waiting_block_out_of_the_queue(tmp_path: Path) -> None:
    with rig(tmp_path, run=False, max_blocks=2) as r:
        r.fill("waits", [0])
        waiting = r.service.create("w", ["waits"], [0])
        for n in range(2 * 2 * 64 + 10):  # the ring has two entries for each block of 64 lanes
            r.service.abort(r.service.create("w", [f"k{n}"], [1]))
        r.service.run()
        assert waiting.wait(WAIT)
        assert waiting.state() == [State.Finished]
        assert r.read(["waits"], [2]).state() == [State.Finished]
        assert r.holds("waits", [2])


def test_room_of_tasks_that_are_ready_is_found_without_waiting(tmp_path: Path) -> None:
    with rig(tmp_path, max_blocks=4, create_timeout=0, small_write_bytes=0) as r:
        tasks = [r.service.create("w", [f"a{n}"], [n]) for n in range(4)]
        wait_until(lambda: r.service.active_create_count("write") == 0)  # nobody asked the tasks
        assert r.service.create("w", ["b"], [5]).wait(WAIT)
        assert r.service.stats()["dropped_stores"] == 0
        assert all(task.state() == [State.Finished] for task in tasks)


def test_a_create_within_a_create_of_the_same_thread_is_refused_or_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a signal's handler may do it, after any instruction."""
    with rig(tmp_path, run=False, slots=256, max_blocks=4, create_timeout=0.2) as r:
        session = r.service._session
        place = session.place
        refused = 0
        for at in count(1):
            happened = True
            inner: list[CacheTask] = []

            def create() -> None:
                nonlocal refused
                try:
                    inner.append(r.service.create("w", ["inner"], [1]))  # noqa: B023
                except LockTimeoutError:
                    refused += 1

            def watched(*args: Any, at: int = at, create: Any = create) -> Any:
                nonlocal happened
                with monkeypatch.context() as once:
                    once.setattr(session, "place", place)
                    room, happened = interleave(lambda: place(*args), create, at)
                return room

            monkeypatch.setattr(session, "place", watched)
            outer = r.service.create("w", ["outer"], [0])
            monkeypatch.undo()
            for task in [outer, *inner]:
                assert task.state() == [State.Initial]
                r.service.abort(task)
            r.service.abort(r.service.create("w", list("cdef"), range(4)))  # no room is lost
            if not happened:
                break
        assert at > 100
        assert refused


class Interrupted(BaseException):
    """What a signal's handler raises."""


def interrupt() -> None:
    raise Interrupted


def test_a_create_that_is_interrupted_as_it_takes_room_costs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rig(tmp_path, run=False, max_blocks=4, create_timeout=0.2) as r:
        session = r.service._session
        place = session.place
        for at in count(1):
            happened = True

            def watched(*args: Any, at: int = at) -> Any:
                nonlocal happened
                room, happened = interleave(lambda: place(*args), interrupt, at)
                return room

            monkeypatch.setattr(session, "place", watched)
            with suppress(Interrupted):
                r.service.abort(r.service.create("w", ["a", "b"], [0, 1]))
            monkeypatch.undo()
            if session._guard._is_owned():  # at a `with`, where no signal is looked for
                session._guard.release()
            r.service.abort(r.service.create("w", list("cdef"), range(4)))
            if not happened:
                break
        assert at > 200  # it did look


@pytest.mark.parametrize("queued", [False, True])
def test_room_of_a_create_that_is_interrupted_is_its_own_for_as_long_as_it_is_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queued: bool
) -> None:
    with rig(tmp_path, run=False, max_blocks=4, create_timeout=0.2) as r:
        session = r.service._session
        submit = session.submit

        def interrupted(*args: Any) -> None:
            if queued:
                submit(*args)
            raise Interrupted

        r.fill("a", [0])
        with monkeypatch.context() as patch:
            patch.setattr(session, "submit", interrupted)
            with pytest.raises(Interrupted) as kept:  # the traceback, and so the task
                r.service.create("w", ["a"], [0])
        if queued:
            with pytest.raises(TaskTableFullError):
                r.service.create("w", list("cdef"), range(4))
        else:
            r.service.abort(r.service.create("w", list("cdef"), range(4)))
        r.service.run()
        assert r.service.create("w", list("cdef"), range(4)).wait(WAIT)
        assert r.service.query(["a"]) == [queued]
        assert r.service.active_create_count("write") == 0
        assert kept.tb


def test_a_task_that_only_a_traceback_has_does_not_fail_a_create_that_waits_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rig(tmp_path, run=False, max_blocks=1, create_timeout=0.1) as r:
        session = r.service._session
        submit = session.submit

        def interrupted(*args: Any) -> None:
            submit(*args)
            raise Interrupted

        with monkeypatch.context() as patch:
            patch.setattr(session, "submit", interrupted)
            with pytest.raises(Interrupted) as kept:
                r.service.create("w", ["a"], [0])
        session.queue.abort_waiting()
        task = r.service.create("w", ["b"], [0])  # has the row and the cell of the first
        assert task.state() == [State.Initial]
        with pytest.raises(TaskTableFullError):
            r.service.create("w", ["c"], [0])
        assert kept.tb


def test_a_signal_that_raises_as_the_queue_is_taken_leaves_it_free_for_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = RangeLock.lock

    def interrupted(self: RangeLock, at: int, timeout: float) -> None:
        lock(self, at, timeout)
        raise Interrupted

    with rig(tmp_path, run=False) as r:
        monkeypatch.setattr(RangeLock, "lock", interrupted)
        with pytest.raises(Interrupted):
            r.service.create("w", ["a"], [0])
        monkeypatch.undo()
        other = RangeLock(r.service._session.table.lock_path())
        assert not other.locked_by_another(QUEUE_BYTE)
        other.close()


def test_a_copy_whose_cells_another_task_has_does_not_say_its_states(tmp_path: Path) -> None:
    """Cells are used again last in first out, rows first in first out."""
    with rig(tmp_path, run=False, max_blocks=8, small_write_bytes=0) as r:
        task = r.service.create("write", ["a"], [0])
        copy = pickle.loads(pickle.dumps(task))
        r.service.abort(task)
        del task
        other = r.service.create("write", ["b"], [1])
        assert (other._start, other._row != copy._row) == (copy._start, True)
        with pytest.raises(TaskExpiredError):
            copy.state()
