"""A close that is interrupted, that interrupts, or that two make: no worker is left after any."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import light_mem
from light_mem import LocalCacheService, ServiceClosedError, State
from light_mem.closing import Ending
from light_mem.engine.pool import WorkerPool
from light_mem.engine.queue import TaskQueue
from light_mem.engine.worker_processes import WorkerProcesses
from light_mem.index.file import IndexFile
from light_mem.index.leases import Leases
from light_mem.index.owners import Owners
from light_mem.maintenance.owners import Ownership
from tests.conftest import wait_until
from tests.service_rig import WAIT, rig

LOOK = 0.2  # s that a thread has to do what it should not
FINAL = {State.Finished, State.Aborted}


@pytest.fixture
def on_sigterm() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Sets what a SIGTERM does, as servers do."""
    before = signal.getsignal(signal.SIGTERM)

    def set_(handle: Callable[[], object]) -> None:
        signal.signal(signal.SIGTERM, lambda *_: handle())

    yield set_
    signal.signal(signal.SIGTERM, before)


OnSigterm = Callable[[Callable[[], object]], None]


def first(
    monkeypatch: pytest.MonkeyPatch,
    where: type,
    name: str,
    step: Callable[[], object],
    after: bool = False,
) -> list[int]:
    """Make a step before the first call of a method, or after it; the list says how often it was
    called."""
    real, calls = getattr(where, name), []

    def patched(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        is_first = len(calls) == 1
        if is_first and not after:
            step()
        result = real(*arguments, **named)
        if is_first and after:
            step()
        return result

    monkeypatch.setattr(where, name, patched)
    return calls


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


def ctrl_c() -> None:
    raise KeyboardInterrupt


def assert_gone(service: LocalCacheService, workers: list[int], store: Path) -> None:
    assert not any(psutil.pid_exists(pid) for pid in workers)  # nor a zombie
    assert service.worker_pids == []
    assert not Ownership(store).alive


def test_a_handler_that_closes_while_workers_start_ends_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_sigterm: OnSigterm
) -> None:
    kv = light_mem.allocate_kvcache(4, 4096)
    service = LocalCacheService(tmp_path / "store", 1 << 20, 1, kv, 3)
    closing = threading.Event()
    workers: list[int] = []

    def close() -> None:
        closing.set()
        service.close()
        assert_gone(service, workers, tmp_path / "store")

    def signal_comes() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        assert closing.wait(WAIT)

    on_sigterm(close)
    spawned = first(monkeypatch, WorkerPool, "_spawn", signal_comes)
    real = WorkerProcesses.start

    def start(self: WorkerProcesses, number: int) -> None:
        real(self, number)
        workers.extend(self.pids)

    monkeypatch.setattr(WorkerProcesses, "start", start)
    with pytest.raises(ServiceClosedError):
        service.run()
    assert len(spawned) == 1  # no more once it closes
    assert len(workers) == 1


@pytest.mark.parametrize("step", ["_append", "tell_ready"])
def test_a_handler_that_closes_in_the_middle_of_a_hold_of_the_queue(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    on_sigterm: OnSigterm,
    step: str,
) -> None:
    with rig(tmp_path) as r:
        r.write(["a"], [0])
        workers = r.service.worker_pids
        on_sigterm(r.service.close)
        first(monkeypatch, TaskQueue, step, terminate)
        if step == "tell_ready":  # of the close: the handler comes in the middle of that
            r.service.close()
        else:
            task = r.service.create("w", ["b"], [1])
            assert task.state() == [State.Aborted]
        assert_gone(r.service, workers, tmp_path / "store")
        with pytest.raises(ServiceClosedError):
            r.service.create("w", ["c"], [2])
    assert [m for m in caplog.messages if "not free" in m or "killed" in m] == []
    with rig(tmp_path, run=False) as r:
        assert r.service.query(["a", "b"]) == [True, False]


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize(
    ("where", "name"), [(WorkerProcesses, "end"), (IndexFile, "mark_clean"), (Owners, "close")]
)
def test_a_handler_that_closes_what_its_thread_closes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    on_sigterm: OnSigterm,
    where: type,
    name: str,
    leaves: bool,
) -> None:
    with rig(tmp_path) as r:
        task = r.service.create("w", ["a", "b"], [0, 1])
        workers, states = r.service.worker_pids, []

        def close() -> None:
            r.service.close()
            states.append((r.service.worker_pids, set(task.state()) <= FINAL))
            if leaves:
                sys.exit(3)

        on_sigterm(close)
        first(monkeypatch, where, name, terminate)
        if leaves:
            with pytest.raises(SystemExit):
                r.service.close()
            r.service._ending()  # as at the interpreter's end
        else:
            r.service.close()
        assert states == [([], True)]
        assert_gone(r.service, workers, tmp_path / "store")


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (TaskQueue, "abort_waiting"),
        (WorkerProcesses, "wake"),
        (WorkerProcesses, "end"),
        (WorkerProcesses, "close"),
        (TaskQueue, "abort_all"),
        (TaskQueue, "close"),
        (Leases, "close"),
        (Ending, "__init__"),
        (IndexFile, "mark_clean"),
        (Owners, "close"),
    ],
)
@pytest.mark.parametrize("after", [False, True])
def test_a_close_that_a_ctrl_c_broke_off_is_ended_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: type, name: str, after: bool
) -> None:
    with rig(tmp_path) as r:
        workers = r.service.worker_pids
        task = r.service.create("w", [f"{n}" for n in range(32)], range(32))
        calls = first(monkeypatch, where, name, ctrl_c, after)
        with pytest.raises(KeyboardInterrupt):
            r.service.close()
        r.service.close()
        assert_gone(r.service, workers, tmp_path / "store")
        assert set(task.state()) <= FINAL
        calls.clear()
        r.service.close()
        assert calls == []


def test_end_workers_that_a_ctrl_c_broke_off_is_ended_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rig(tmp_path) as r:
        workers = r.service.worker_pids
        task = r.service.create("w", [f"{n}" for n in range(32)], range(32))
        first(monkeypatch, WorkerProcesses, "end", ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            r.service.end_workers()
        r.service.end_workers()
        assert not any(psutil.pid_exists(pid) for pid in workers)
        assert set(task.state()) <= FINAL


@pytest.mark.parametrize("call", ["close", "end_workers"])
def test_a_second_thread_returns_when_the_workers_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    with rig(tmp_path) as r:
        workers, ending, go_on = r.service.worker_pids, threading.Event(), threading.Event()

        def wait() -> None:
            ending.set()
            assert go_on.wait(WAIT)

        first(monkeypatch, WorkerProcesses, "end", wait)
        left: list[bool] = []

        def end() -> None:
            getattr(r.service, call)()
            left.append(any(psutil.pid_exists(pid) for pid in workers))

        threads = [threading.Thread(target=end) for _ in range(2)]
        threads[0].start()
        assert ending.wait(WAIT)
        threads[1].start()
        threads[1].join(LOOK)
        assert left == []
        go_on.set()
        for thread in threads:
            thread.join(WAIT)
        assert left == [False, False]


def test_a_run_that_a_ctrl_c_broke_off_is_ended_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(psutil.Process().children())
    with rig(tmp_path, run=False, workers=2) as r:
        with monkeypatch.context() as patch:
            patch.setattr(type(r.service._session.table.futex), "wait", lambda *_: ctrl_c())
            with pytest.raises(KeyboardInterrupt):
                r.service.run()
        r.service.run()
        assert len(r.service.worker_pids) == 2
        assert len(psutil.Process().children()) == before + 2
        r.write(["a"], [0])


def test_a_service_that_its_own_thread_collects_is_closed_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Holder:
        """In a cycle, as servers' own objects often are."""

    holder: Any = Holder()
    holder.me = holder
    kv = light_mem.allocate_kvcache(4, 4096)
    holder.service = LocalCacheService(tmp_path / "store", 1 << 20, 1, kv, 1)
    holder.service.run()
    (worker,) = holder.service.worker_pids
    collected: list[str] = []

    def collect() -> None:
        gc.collect()
        collected.append(threading.current_thread().name)

    gc.disable()
    try:
        del holder
        first(monkeypatch, Owners, "_reclaim", collect)
        os.kill(worker, signal.SIGKILL)  # its replacement begins with the slots of the dead
        wait_until(lambda: "lightmem-pool" not in {t.name for t in threading.enumerate()})
    finally:
        gc.enable()
    assert collected == ["lightmem-pool"]
    assert not psutil.pid_exists(worker)
    assert not Ownership(tmp_path / "store").alive
