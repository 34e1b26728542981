"""Room in the task table: it is bounded, waited for, and used again without mixing tasks up."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import time
from pathlib import Path

import pytest

from light_mem import CacheTask, InvalidArgumentError, State, TaskExpiredError, TaskTableFullError
from tests.conftest import wait_until
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
