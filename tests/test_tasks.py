"""States, waiting and the room of tasks, in the process that made them."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import threading
import time
from pathlib import Path

import pytest

from light_mem import (
    CacheTask,
    InvalidArgumentError,
    State,
    TaskExpiredError,
    TaskTableFullError,
)
from tests.conftest import wait_until
from tests.service_child import Child
from tests.service_rig import WAIT, Rig, rig


def test_data_is_safe_before_ready_and_never_after(tmp_path: Path) -> None:
    # flush: between the copy and the end lies a sync, long enough to be seen
    with rig(tmp_path, pages=64, slots=512, durability="flush") as r:
        seen_early = 0
        for n in range(8):
            keys = [f"{n} {page}" for page in range(16)]
            for page, key in enumerate(keys):
                r.fill(key, [page])
            task = r.service.create("w", keys, range(16))
            while not task.data_safe():
                assert not task.ready()
            if not task.ready():
                seen_early += 1
                assert set(task.state()) <= {State.Working, State.Finished}
            r.blank(range(16))  # they are ours again
            assert task.wait(WAIT)
            assert r.read(keys, range(20, 36)).state() == [State.Finished] * 16
            assert all(r.holds(key, [20 + page]) for page, key in enumerate(keys))
        assert seen_early


def test_a_read_is_safe_when_it_is_ready(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        r.write(["a"], [0])
        for _ in range(50):
            task = r.service.create("r", ["a"], [1])
            while not task.data_safe():
                pass
            assert task.ready()


def test_wait_says_whether_the_task_is_ready(tmp_path: Path) -> None:
    with rig(tmp_path, run=False) as r:
        task = r.service.create("w", ["a"], [0])
        assert task.state() == [State.Initial]
        assert not task.data_safe()
        started = time.monotonic()
        assert task.wait(0) is False
        assert task.wait(-1) is False
        assert task.wait(0.1) is False
        assert 0.1 <= time.monotonic() - started < 5
        threading.Timer(0.05, r.service.run).start()
        assert task.wait() is True
        assert task.wait(0) is True
        assert task.ready()
        assert task.data_safe()


def test_a_task_describes_itself(tmp_path: Path) -> None:
    with rig(tmp_path, run=False) as r:
        task = r.service.create("w", ["a", b"b"], [3, 4])
        assert len(task) == 2
        assert task.mode == "write"
        assert [(b.hash, b.pages, b.state) for b in task.blocks] == [
            ("a", (3,), State.Initial),
            (b"b", (4,), State.Initial),
        ]
        assert not task.blocks[0].ready()
        assert "2 Initial" in repr(task)
        r.service.run()
        assert task.wait(WAIT)
        assert all(block.ready() for block in task.blocks)
        assert "write" in repr(task)
        assert "2 Finished" in repr(task)
        assert r.service.create("r", ["a"], [3]).mode == "read"


def test_many_tasks_are_awaited_at_once(tmp_path: Path) -> None:
    async def all_of(r: Rig) -> None:
        for first in range(0, 320, 32):
            keys = [f"k{n}" for n in range(first, first + 32)]
            for page, key in enumerate(keys):
                r.fill(key, [page])
            tasks = [r.service.create("w", [key], [page]) for page, key in enumerate(keys)]
            done = await asyncio.gather(*tasks)
            assert done == tasks
            assert all(task.state() == [State.Finished] for task in tasks)
        assert await r.service.create("r", ["no"], [0])  # ready when it is made

    with rig(tmp_path, pages=32, slots=400, workers=2) as r:
        asyncio.run(all_of(r))
        assert sum(r.service.query([f"k{n}" for n in range(320)])) == 320


def test_a_cancelled_await_leaves_the_task_and_other_awaits_alone(tmp_path: Path) -> None:
    async def cancelled(r: Rig) -> None:
        task = r.service.create("w", ["a"], [0])
        other = asyncio.ensure_future(_awaited(task))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(_awaited(task), 0.05)
        assert not other.done()
        assert task.state() == [State.Initial]
        await asyncio.get_running_loop().run_in_executor(None, r.service.run)
        assert await asyncio.wait_for(other, WAIT) is task
        assert await task is task

    with rig(tmp_path, run=False) as r:
        asyncio.run(cancelled(r))


async def _awaited(task: CacheTask) -> CacheTask:
    return await task


def test_awaits_of_two_event_loops_do_not_disturb_each_other(tmp_path: Path) -> None:
    with rig(tmp_path, run=False, workers=2) as r:
        tasks = [r.service.create("w", [f"k{n}"], [n]) for n in range(16)]

        async def half(mine: list[CacheTask]) -> None:
            await asyncio.gather(*mine)

        loops = [
            threading.Thread(target=lambda n=n: asyncio.run(half(tasks[n::2]))) for n in (0, 1)
        ]
        for loop in loops:
            loop.start()
        r.service.run()
        for loop in loops:
            loop.join(WAIT)
            assert not loop.is_alive()
        assert all(task.ready() for task in tasks)


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
        assert too_large.value.need == 5  # type: ignore[attr-defined]
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


def test_polling_makes_no_system_call(tmp_path: Path) -> None:
    script = """
    import ctypes, gc
    import light_mem
    service = light_mem.LocalCacheService(
        sys.argv[1], 1 << 20, 1, light_mem.allocate_kvcache(4, 4096), 1)
    task = service.create("w", ["a"], [0])
    def poll(times):
        for _ in range(times):
            task.ready(); task.data_safe(); task.state()
    poll(100)
    gc.disable()
    prctl = ctypes.CDLL(None).prctl
    prctl(22, 99, 0, 0, 0)  # warms ctypes up; there is no mode 99
    say("ready")
    PR_SET_SECCOMP, STRICT = 22, 1  # from here on only read, write and _exit do not kill
    if prctl(PR_SET_SECCOMP, STRICT, 0, 0, 0):
        os.write(1, b'["no seccomp"]\\n')
    poll(2000)
    os.write(1, b'["still alive"]\\n')
    os.getppid()  # proof that a system call would have been noticed
    os.write(1, b'["nobody noticed"]\\n')
    """
    with Child(script, tmp_path / "store") as child:
        assert child.hear() == ["ready"]
        answer = child.hear()
        if answer == ["no seccomp"]:
            pytest.skip("this kernel has no seccomp")
        assert answer == ["still alive"]
        # Only the thread that asked for it is killed; others, torch's, may go on.
        main_thread = Path(f"/proc/{child.pid}/task/{child.pid}/stat")
        wait_until(lambda: main_thread.read_text().rpartition(")")[2].split()[0] in "ZX")
