"""States, waiting and the room of tasks, in the process that made them."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from light_mem import CacheTask, State, TaskTableFullError, waiting
from light_mem.engine.table_layout import FINISHED
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
            safe = False
            while not safe:
                ready = task.ready()
                safe = task.data_safe()  # asked later: ready implies safe
                assert safe or not ready
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


def test_who_waits_long_without_run_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def give_up(task: CacheTask) -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(_awaited(task), 0.2)

    why = "run() has not been called, or has not returned"
    with rig(tmp_path / "1", run=False, max_blocks=2, create_timeout=0) as r:
        task = r.service.create("w", ["a", "b"], [0, 1])
        with pytest.raises(TaskTableFullError, match=re.escape(f"in use; {why}")):
            r.service.create("w", ["c"], [2])
        assert task.wait(0.05) is False
        assert caplog.messages == []
        monkeypatch.setattr(waiting, "NO_RUN_SECONDS", 0.0)
        for _ in range(3):
            assert task.wait(0.05) is False
        assert caplog.messages == [f"a task has waited for 0 s: {why}"]
        r.service.run()
        assert task.wait(WAIT)
    with rig(tmp_path / "2", run=False) as r:
        asyncio.run(give_up(r.service.create("w", ["a"], [0])))
    assert caplog.messages[1:2] == caplog.messages[:1]


def test_a_signal_interrupts_a_wait(tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with rig(tmp_path, run=False) as r:
            task = r.service.create("w", ["a"], [0])
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            started = time.monotonic()
            with pytest.raises(Interrupted):
                task.wait()
            assert time.monotonic() - started < 5
            r.service.run()
            assert task.wait(WAIT)
    finally:
        signal.signal(signal.SIGUSR1, before)


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


def test_a_task_whose_cells_are_used_again_before_its_worker_tells_does_not_stay_active(
    tmp_path: Path,
) -> None:
    with rig(tmp_path, run=False) as r:
        service = r.service
        table, queue = service._session.table, service._session.queue
        first = service.create("write", ["a"], [0])
        [cell] = queue.claim(1)
        row = int(table.cells["row"][cell])
        table.states[cell] = FINISHED  # ... and here the worker loses its processor
        assert first.ready()
        second = service.create("write", ["b"], [1])
        assert queue.claim(1) == [cell], "the cell was not used again: this shows nothing"
        assert service.active_create_count("write") == 1
        table.finish(row, 1)
        assert not second.ready()
        assert service.active_create_count("write") == 1
        table.states[cell] = FINISHED
        table.finish(int(table.cells["row"][cell]), 1)
        assert service.active_create_count("write") == 0
