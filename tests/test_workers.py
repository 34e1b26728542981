"""Worker processes: cheap, without a trace of the server's program, replaced when they die."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import spawn
from pathlib import Path
from typing import Any

import psutil
import pytest

import light_mem
from light_mem import (
    LocalCacheService,
    ServiceClosedError,
    State,
    WorkerStartError,
)
from light_mem.maintenance import inspect
from tests.conftest import wait_until
from tests.service_child import ROOT
from tests.service_rig import WAIT, alive, rig

PAGE = 64 << 10
BLOCK = 64  # pages: 4 MiB
FINAL = {State.Finished, State.Aborted}


@pytest.fixture
def executable() -> Iterator[None]:
    """What multiprocessing starts, put back after the test."""
    before = spawn.get_executable()
    yield
    spawn.set_executable(before)


@pytest.mark.parametrize("verify", [True, False])
def test_damage_that_a_worker_finds_is_in_the_servers_log_and_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, verify: bool
) -> None:
    with rig(tmp_path, verify=verify) as r:
        r.write(["a", "b"], [0, 1])
        data = tmp_path / "store" / "shard-000.data"
        raw = bytearray(data.read_bytes())
        at = raw.index(r.kv[0].numpy().tobytes())
        with data.open("r+b") as file:
            file.seek(at + 100)
            file.write(bytes([raw[at + 100] ^ 1]))
        task = r.read(["a", "b"], [5, 6])
        assert r.holds("b", [6])
        if verify:
            assert task.state() == [State.Aborted, State.Finished]
            assert r.service.stats()["damaged"] >= 1
            assert r.service.query(["a", "b"]) == [False, True]
            wait_until(lambda: "damaged" in caplog.text)
        else:
            assert task.state() == [State.Finished] * 2


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

        # What they prepare meanwhile (shards to open, memory to map) comes to an end.
        deadline = time.monotonic() + WAIT
        spent = 1.0
        while spent > 0.05 and time.monotonic() < deadline:
            before = used()
            time.sleep(1)  # the second that is measured
            spent = used() - before
        assert spent <= 0.05


@pytest.mark.parametrize("program", ["/bin/false", "/nowhere/python", os.devnull])
def test_workers_that_cannot_start_are_an_error_and_leave_nothing(
    tmp_path: Path, executable: None, program: str
) -> None:
    spawn.set_executable(program)
    with rig(tmp_path, run=False) as r:
        task = r.service.create("w", ["a"], [0])
        with pytest.raises(WorkerStartError, match="did not start") as caught:
            r.service.run()
        assert caught.value.values.keys() == {"reason", "log"}
        assert task.state() == [State.Aborted]
        with pytest.raises(WorkerStartError):
            r.service.create("w", ["b"], [0])
        with pytest.raises(WorkerStartError):
            r.service.run()
        assert r.service.worker_pids == []
    spawn.set_executable(sys.executable)
    with rig(tmp_path) as r:
        r.write(["a"], [0])


def test_workers_that_cannot_be_replaced_end_the_service_when_none_is_left(
    tmp_path: Path, executable: None, caplog: pytest.LogCaptureFixture
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
        with caplog.at_level(logging.WARNING, "light_mem"):  # tried again, later and later
            wait_until(lambda: "the next one starts in" in caplog.text)
        assert r.service.create("w", ["of the other one"], [0]).wait(WAIT)
        assert alive(workers) == [workers[1]]
        os.kill(workers[1], signal.SIGKILL)  # now none is well
        wait_until(lambda: r.service._pool.failure)
        assert not alive(workers)
        with pytest.raises(WorkerStartError, match="no workers any more") as caught:
            r.service.create("w", ["more"], [0])
        assert caught.value.values["reason"] in str(caught.value)


def test_workers_that_cannot_open_the_store_say_why_in_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with rig(tmp_path, run=False) as r:
        shutil.rmtree(tmp_path / "store")
        no_store = f"{tmp_path / 'store'} holds no store: it does not exist"
        why = f"worker 1 cannot open the store: {no_store}"
        with pytest.raises(WorkerStartError) as first:
            r.service.run()
        with pytest.raises(WorkerStartError) as then:
            r.service.create("w", ["a"], [0])
    for error in (first.value, then.value):
        assert str(error).endswith(f"said: {why}; restart the server")
        assert "\n" not in str(error)
        assert vars(error)["log"] == why
    assert caplog.messages.count(why) == 3
    assert "Traceback" not in caplog.text


def test_a_worker_is_known_by_its_name_and_its_death_by_the_signal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with rig(tmp_path, workers=2) as r:
        one, two = r.service.worker_pids
        assert psutil.Process(one).name() == "lightmem-worker"
        shown = {owner.pid: owner.command for owner in inspect(tmp_path / "store").owners}
        assert shown[one] == shown[two] == "lightmem-worker"
        for pid, number in ((one, signal.SIGKILL), (two, signal.SIGSEGV)):
            os.kill(pid, number)
            wait_until(lambda pid=pid: f"(pid {pid}) was killed" in caplog.text)
    hint = " (out of memory? see the kernel's log)"
    assert f"worker 1 (pid {one}) was killed by SIGKILL{hint}; it is replaced" in caplog.messages
    assert f"worker 2 (pid {two}) was killed by SIGSEGV; it is replaced" in caplog.messages


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


def test_a_worker_that_is_started_while_a_close_waits_no_longer_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its program comes from a disk that hangs."""
    monkeypatch.setattr("light_mem.engine.pool.STOP_SECONDS", 0.3)
    begun, goes_on = threading.Event(), threading.Event()
    before = psutil.Process().children()

    class Slow(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            begun.set()
            assert goes_on.wait(WAIT)

    with rig(tmp_path) as r:
        workers = r.service._pool._workers
        close = workers.close

        def close_late() -> None:
            """Between the end of the others and that of all."""
            goes_on.set()
            wait_until(lambda: "lightmem-pool" not in [t.name for t in threading.enumerate()])
            close()

        monkeypatch.setattr(subprocess, "Popen", Slow)
        monkeypatch.setattr(workers, "close", close_late)
        os.kill(r.service.worker_pids[0], signal.SIGKILL)
        assert begun.wait(WAIT)
        r.service.close()
        assert workers.pids == []
        assert psutil.Process().children() == before  # nor one that nobody has waited for


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
