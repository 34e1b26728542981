"""Worker processes: cheap, without a trace of the server's program, replaced when they die."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import spawn
from pathlib import Path

import psutil
import pytest
import torch

import light_mem
from light_mem import LocalCacheService, ServiceClosedError, State, WorkerStartError
from tests.conftest import wait_until
from tests.payload import page_bytes_of
from tests.service_child import ROOT, Child
from tests.service_rig import WAIT, rig

PAGE = 64 << 10
BLOCK = 64  # pages: 4 MiB
FINAL = {State.Finished, State.Aborted}


@pytest.fixture
def executable() -> Iterator[None]:
    """What multiprocessing starts, put back after the test."""
    before = spawn.get_executable()
    yield
    spawn.set_executable(before)


def alive(pids: list[int]) -> list[int]:
    """Those that run; the dead that nobody waited for do not."""
    return [
        pid
        for pid in pids
        if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    ]


@pytest.mark.parametrize("how_many", [1, 2])
def test_blocks_of_killed_workers_are_done_again_or_aborted(tmp_path: Path, how_many: int) -> None:
    with rig(tmp_path, pages=8 * BLOCK, page_bytes=PAGE, slots=40 * BLOCK, workers=2) as r:
        pages = range(8 * BLOCK)
        killed = 0

        def all_replaced() -> bool:
            stats = r.service.stats()
            return stats["restarts"] == killed and stats["workers"] == 2

        for turn in range(5):
            keys = [f"{turn} {n}" for n in range(8)]
            for n in range(8):
                r.kv[n * BLOCK : (n + 1) * BLOCK] = 8 * turn + n + 1
            workers = r.service.worker_pids
            task = r.service.create("w", keys, pages)
            wait_until(lambda: State.Initial not in task.state()[: turn + 1])  # noqa: B023
            for pid in workers[:how_many]:
                os.kill(pid, signal.SIGKILL)
                killed += 1
            assert task.wait(WAIT)
            written = task.state()
            assert set(written) <= FINAL
            assert r.service.query(keys) == [state is State.Finished for state in written]

            r.kv[:] = 0
            wait_until(all_replaced)
            assert len(set(r.service.worker_pids) - set(workers)) == how_many
            task = r.service.create("r", keys, pages)
            if turn % 2:
                os.kill(r.service.worker_pids[0], signal.SIGKILL)
                killed += 1
            assert task.wait(WAIT)
            for n, state in enumerate(task.state()):
                part = r.kv[n * BLOCK : (n + 1) * BLOCK]
                if state is State.Finished:
                    assert written[n] is State.Finished
                    assert bool((part == 8 * turn + n + 1).all())
            wait_until(all_replaced)
        stats = r.service.stats()
        assert stats["used_slots"] == BLOCK * stats["blocks"]  # what the dead were filling is free
        assert len(alive(r.service.worker_pids)) == 2


def test_an_idle_worker_that_dies_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with rig(tmp_path) as r:
        (before,) = r.service.worker_pids
        os.kill(before, signal.SIGKILL)
        wait_until(lambda: r.service.stats()["restarts"] == 1)
        r.write(["a"], [0])
        (after,) = r.service.worker_pids
        assert after != before
    assert f"pid {before}" in caplog.text


def test_a_block_that_kills_every_worker_is_aborted_in_the_end(tmp_path: Path) -> None:
    with rig(tmp_path, pages=BLOCK, page_bytes=1 << 20, slots=BLOCK) as r:
        r.kv[:] = 1
        task = r.service.create("w", ["poison"], range(BLOCK))
        kills = 0
        while not task.ready():
            if task.state() == [State.Working]:
                os.kill(r.service.worker_pids[0], signal.SIGKILL)
                kills += 1
                wait_until(lambda: r.service.stats()["restarts"] == kills or task.ready())  # noqa: B023
        assert kills <= 3
        if task.state() == [State.Aborted]:
            assert kills == 3
        wait_until(lambda: r.service.stats()["workers"] == 1)
        assert r.service.query("poison") is (task.state() == [State.Finished])
        r.service.clear()
        again = r.service.create("w", ["harmless"], range(BLOCK))
        assert again.wait(WAIT)
        assert again.state() == [State.Finished]


def test_a_ctrl_c_in_the_terminal_does_not_end_workers(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        workers = r.service.worker_pids
        for pid in workers:
            os.kill(pid, signal.SIGINT)
        r.write(["a"], [0])
        assert r.service.worker_pids == workers
        assert r.service.stats()["restarts"] == 0


def test_workers_neither_import_torch_nor_run_the_program_again(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "with open(sys.argv[1], 'a') as file: file.write('ran\\n')\n"
        "import light_mem\n"
        "kv = light_mem.allocate_kvcache(4, 4096)\n"
        "service = light_mem.LocalCacheService(sys.argv[2], 1 << 20, 1, kv, 2)\n"
        "service.run()\n"
        "assert service.create('w', ['a'], [0]).wait(20)\n"
        "for pid in service.worker_pids:\n"
        "    print(pid, 'torch' in open(f'/proc/{pid}/maps').read())\n"
        "assert 'torch' in open('/proc/self/maps').read()\n"
        "service.close()\n"
    )
    answer = subprocess.run(
        [sys.executable, program, tmp_path / "marks", tmp_path / "store"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = answer.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.endswith(" False") for line in lines)
    assert (tmp_path / "marks").read_text() == "ran\n"
    assert answer.stderr == ""


def test_eight_workers_are_small_and_cost_nothing_while_idle(tmp_path: Path) -> None:
    with rig(tmp_path, pages=64, slots=4096, shards=4, workers=8) as r:
        for n in range(8):
            keys = [f"{n} {page}" for page in range(64)]
            assert r.service.create("w", keys, range(64)).wait(WAIT)
            assert r.service.create("r", keys, range(64)).wait(WAIT)
        workers = [psutil.Process(pid) for pid in r.service.worker_pids]
        assert len(workers) == 8
        for worker in workers:
            assert worker.memory_full_info().uss <= 60 << 20

        def used() -> float:
            return sum(sum(worker.cpu_times()[:2]) for worker in workers)

        before = used()
        time.sleep(1)  # the second that is measured
        assert used() - before <= 0.05


SERVER = """
import light_mem, torch
from tests.payload import page_bytes_of
kv = torch.zeros((64, 65536), dtype=torch.uint8)  # moved to /dev/shm
service = light_mem.LocalCacheService(sys.argv[1], 512 * 65536, 2, kv, 2)
service.run()
for page in range(64):
    kv[page] = torch.from_numpy(page_bytes_of(sys.argv[2], page, 65536))
say(service.worker_pids)
before = []
for done in range(1000):
    tasks = [service.create("w", [f"{sys.argv[2]} {done} {page}"], [page]) for page in range(64)]
    for task in before: task.wait()
    say(done)
    before = tasks
"""


def test_a_killed_server_takes_its_workers_along_and_leaves_a_sound_store(tmp_path: Path) -> None:
    found = 0
    for turn in range(2):
        with Child(SERVER, tmp_path / "store", turn) as server:
            (workers,) = server.hear()
            while server.hear() != [2 * turn + 1]:  # the tasks of one turn are done, others not
                pass
            os.kill(server.pid, signal.SIGKILL)
            killed = time.monotonic()
            wait_until(lambda: not alive(workers), 10)  # noqa: B023
            assert time.monotonic() - killed < 10
        with rig(tmp_path, pages=64, page_bytes=PAGE, slots=512, shards=2, workers=2) as r:
            for old in range(turn + 1):
                for done in range(2 * old + 3):
                    keys = [f"{old} {done} {page}" for page in range(64)]
                    stored = r.service.query(keys)
                    task = r.read(keys, range(64))
                    for page, state in enumerate(task.state()):
                        assert (state is State.Finished) is stored[page]
                        if state is State.Finished:
                            expected = torch.from_numpy(page_bytes_of(str(old), page, PAGE))
                            assert torch.equal(r.kv[page], expected)
                            found += 1
            r.service._engine.reclaim()
            stats = r.service.stats()
            assert stats["damaged"] == 0
            assert stats["used_slots"] == stats["blocks"]  # nothing in flight is left
    assert found >= 64


@pytest.mark.parametrize("program", ["/bin/false", "/nowhere/python", os.devnull])
def test_workers_that_cannot_start_are_an_error_and_leave_nothing(
    tmp_path: Path, executable: None, program: str
) -> None:
    spawn.set_executable(program)
    with rig(tmp_path, run=False) as r:
        task = r.service.create("w", ["a"], [0])
        with pytest.raises(WorkerStartError, match="did not start"):
            r.service.run()
        assert task.state() == [State.Aborted]
        with pytest.raises(WorkerStartError):
            r.service.create("w", ["b"], [0])
        with pytest.raises(WorkerStartError):
            r.service.run()
        assert r.service.worker_pids == []
    spawn.set_executable(sys.executable)
    with rig(tmp_path) as r:
        r.write(["a"], [0])


def test_workers_that_cannot_be_replaced_end_the_service_with_every_task_final(
    tmp_path: Path, executable: None
) -> None:
    with rig(tmp_path, pages=8 * BLOCK, page_bytes=PAGE, slots=40 * BLOCK, workers=2) as r:
        workers = r.service.worker_pids
        spawn.set_executable("/bin/false")
        tasks = [
            r.service.create("w", [f"{turn} {n}" for n in range(8)], range(8 * BLOCK))
            for turn in range(4)
        ]
        os.kill(workers[0], signal.SIGKILL)
        for task in tasks:
            assert task.wait(WAIT)
            assert set(task.state()) <= FINAL
        wait_until(lambda: r.service.stats()["workers"] == 0)  # the other one leaves by itself
        assert not alive(workers)
        with pytest.raises(WorkerStartError, match="no workers any more"):
            r.service.create("w", ["more"], [0])


def test_a_program_that_is_no_python_is_not_waited_for_forever(
    tmp_path: Path, executable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 1000\n")
    sleeper.chmod(0o755)
    spawn.set_executable(str(sleeper))
    monkeypatch.setattr("light_mem.engine.pool.START_SECONDS", 0.3)
    monkeypatch.setattr("light_mem.engine.pool.STOP_SECONDS", 0.1)
    with (
        rig(tmp_path, run=False) as r,
        pytest.raises(WorkerStartError, match="not ready within"),
    ):
        r.service.run()


def test_a_stopped_worker_does_not_hold_up_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("light_mem.engine.pool.STOP_SECONDS", 0.3)
    with rig(tmp_path, workers=2) as r:
        workers = r.service.worker_pids
        os.kill(workers[0], signal.SIGSTOP)
        with caplog.at_level(logging.WARNING, "light_mem"):
            r.service.close()
        assert not alive(workers)
    assert "killed" in caplog.text


def test_close_while_workers_start_is_a_clean_end(tmp_path: Path) -> None:
    kv = light_mem.allocate_kvcache(4, 4096)
    service = LocalCacheService(tmp_path / "store", 1 << 20, 1, kv, 4)
    outcome: list[BaseException | None] = []

    def run() -> None:
        try:
            service.run()
            outcome.append(None)
        except ServiceClosedError as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: service.worker_pids)
    service.close()
    thread.join(WAIT)
    assert len(outcome) == 1
    assert isinstance(service, LocalCacheService)
    assert service.worker_pids == []
