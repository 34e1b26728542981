"""The life of a service: it ends in order however it ends, and says so to whoever comes later."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import light_mem
from light_mem import (
    CacheService,
    CacheTask,
    InvalidArgumentError,
    LocalCacheService,
    PyLocalCacheService,
    ServiceClosedError,
    State,
)
from light_mem.engine.table_layout import WRITE
from tests.conftest import wait_until
from tests.service_child import Child
from tests.service_rig import WAIT, rig

CALLS: dict[str, Callable[[CacheService], Any]] = {
    "query": lambda s: s.query("a"),
    "query of many": lambda s: s.query(["a", "b"]),
    "match_prefix": lambda s: s.match_prefix(["a"]),
    "create": lambda s: s.create("w", ["a"], [0]),
    "delete": lambda s: s.delete("a"),
    "clear": lambda s: s.clear(),
    "stats": lambda s: s.stats(),
    "active_create_count": lambda s: s.active_create_count("read"),
}


def test_what_is_stored_can_be_deleted_when_the_workers_have_ended(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        r.write(["a", "b"], [0, 1])
        workers = r.service.worker_pids
        r.service.end_workers()
        r.service.end_workers()
        assert not any(psutil.pid_exists(pid) for pid in workers)
        with pytest.raises(ServiceClosedError):
            r.service.create("w", ["c"], [0])
        assert r.service.delete(["a", "c"]) == 1
        assert r.service.stats()["blocks"] == 1
    with rig(tmp_path) as r:
        assert r.service.query(["a", "b"]) == [False, True]
        r.service.end_workers()
        assert r.service.clear() == 1


def test_closing_twice_is_closing_once_and_later_calls_say_it(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        task = r.write(["a", "b"], [0, 1])
        workers = r.service.worker_pids
        r.service.close()
        r.service.close()
        assert not any(psutil.pid_exists(pid) for pid in workers)
        for call in CALLS.values():
            with pytest.raises(ServiceClosedError):
                call(r.service)
        for call in (r.service.run, r.service.client, lambda: r.service.abort(task)):
            with pytest.raises(ServiceClosedError):
                call()
        assert r.service.page_size() == 4096
        assert task.state() == [State.Finished] * 2
    with rig(tmp_path) as r:  # the store is as it was left
        assert r.read(["a", "b"], [5, 6]).state() == [State.Finished] * 2
        assert r.holds("b", [6])


def test_with_closes_also_when_its_body_fails(tmp_path: Path) -> None:
    kv = light_mem.allocate_kvcache(4, 4096)
    service = LocalCacheService(tmp_path / "store", 1 << 20, 1, kv, 1)
    with pytest.raises(KeyError), service:  # noqa: PT012 - what is in the block is not at issue
        service.run()
        workers = service.worker_pids
        raise KeyError("body")
    assert not any(psutil.pid_exists(pid) for pid in workers)
    with pytest.raises(ServiceClosedError):
        service.query("a")


def test_what_is_closed_enters_no_with_block(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        r.write(["a"], [0])
        view, client = r.service.view("a"), r.service.client()
        assert repr(client) == f"<CacheClient of pid {os.getpid()}>"
        drop_in = PyLocalCacheService(r.kv, str(tmp_path / "other"), 1 << 20, 1, 1)
        assert view is not None
        for each in (view, client, drop_in, r.service):
            each.close()
            with pytest.raises(ServiceClosedError), each:
                pytest.fail("entered")
        assert repr(client).endswith(", closed>")
        with pytest.raises(AttributeError, match="'CacheClient' object has no attribute 'run'"):
            client.run()  # type: ignore[attr-defined]


def test_a_service_that_is_dropped_closes_itself(tmp_path: Path) -> None:
    kv = light_mem.allocate_kvcache(4, 4096)
    service = LocalCacheService(tmp_path / "store", 1 << 20, 1, kv, 1)
    service.run()
    (worker,) = service.worker_pids
    task = service.create("w", ["a"], [0])
    del service
    gc.collect()
    assert not psutil.pid_exists(worker)
    assert task.ready()


@pytest.mark.parametrize("run", [True, False])
def test_close_makes_every_task_final_and_wakes_its_waiters(tmp_path: Path, run: bool) -> None:
    with rig(tmp_path, pages=64, page_bytes=1 << 16, slots=512, run=run) as r:
        tasks = [
            r.service.create("w", [f"{n}-{m}" for m in range(64)], range(64)) for n in range(9)
        ]
        client = r.service.client()  # in another lane
        theirs = client.create("w", ["theirs"], [0])
        answers: list[bool] = []
        waiters = [
            threading.Thread(target=lambda t=t: answers.append(t.wait()))
            for t in (*tasks[-3:], theirs)
        ]
        for waiter in waiters:
            waiter.start()
        r.service.close()
        for waiter in waiters:
            waiter.join(WAIT)
        assert answers == [True] * 4
        states = {state for task in (*tasks, theirs) for state in task.state()}
        assert states <= {State.Finished, State.Aborted}
        assert State.Aborted in states
        with pytest.raises(ServiceClosedError):
            client.create("w", ["more"], [0])
        client.close()
        finished = sum(task.state().count(State.Finished) for task in (*tasks, theirs))
    with rig(tmp_path, page_bytes=1 << 16, slots=512, run=False) as r:
        assert r.service.stats()["blocks"] == finished


@pytest.mark.parametrize("attempt", range(4))
def test_tasks_made_while_the_service_closes_are_final_or_refused(
    tmp_path: Path, attempt: int
) -> None:
    made: list[CacheTask] = []
    failures: list[BaseException] = []

    def hammer(service: CacheService, name: int) -> None:
        try:
            for n in range(10**6):
                made.append(service.create("w", [f"{name} {n}"], [n % 32]))
        except ServiceClosedError:
            pass
        except BaseException as error:
            failures.append(error)

    with rig(tmp_path, slots=256, create_timeout=30) as r:
        client = r.service.client()
        threads = [
            threading.Thread(target=hammer, args=(service, n))
            for n, service in enumerate((r.service, r.service, client))
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(made) > 100 * attempt)
        r.service.close()
        for thread in threads:
            thread.join(WAIT)
            assert not thread.is_alive()
        client.close()
    assert failures == []
    assert all(task.ready() for task in made)


@pytest.mark.parametrize("from_client", [True, False])
def test_a_close_in_the_middle_of_create_leaves_no_task_that_nobody_does(
    tmp_path: Path, from_client: bool
) -> None:
    with rig(tmp_path, run=False) as r:
        service = r.service.client() if from_client else r.service
        service.query("connects")
        place = service._session.place

        def place_then_close(*arguments: Any) -> Any:
            placed = place(*arguments)
            r.service.close()
            return placed

        service._session.place = place_then_close  # type: ignore[method-assign]
        with pytest.raises(ServiceClosedError):
            service.create("w", ["a"], [0])
        assert service._session.table.active_tasks(WRITE) == 0
        service.close()


def test_run_is_done_once_however_many_call_it(tmp_path: Path) -> None:
    with rig(tmp_path, workers=2, run=False) as r:
        threads = [threading.Thread(target=r.service.run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        workers = r.service.worker_pids
        r.service.run()
        assert r.service.worker_pids == workers
        assert len(workers) == 2
        assert {p.pid for p in psutil.Process().children()} >= set(workers)


@pytest.mark.parametrize("step", ["TaskTable.create", "Session.open", "WorkerPool"])
def test_a_constructor_that_fails_late_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no")

    kv = light_mem.allocate_kvcache(4, 4096)
    descriptors = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(f"light_mem.local_service.{step}", fail)
        for _ in range(3):
            with pytest.raises(OSError, match="no"):
                LocalCacheService(tmp_path / "store", 1 << 20, 1, kv, 1)
            gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    with LocalCacheService(tmp_path / "store", 1 << 20, 1, kv, 1) as service:
        assert service._engine.owners() == []  # they have left the store as well


def test_a_table_that_does_not_fit_is_a_clear_error(tmp_path: Path) -> None:
    kv = light_mem.allocate_kvcache(4, 4096)
    for max_blocks in (0, -1, 1 << 40, 2.5, True, np.True_):
        with pytest.raises(InvalidArgumentError, match="max_blocks"):
            LocalCacheService(tmp_path / "s", 1 << 20, 1, kv, 1, max_blocks=max_blocks)  # type: ignore[arg-type]


def test_a_forked_child_is_refused_and_its_end_leaves_the_parent_alone(tmp_path: Path) -> None:
    script = """
    import light_mem
    from tests.test_service_life import CALLS
    kv = light_mem.allocate_kvcache(4, 4096)
    service = light_mem.LocalCacheService(sys.argv[1], 1 << 20, 1, kv, 1)
    service.run()
    client = service.client()
    client.query("a")
    task = service.create("w", ["a"], [0])
    task.wait()
    pack_of_client = pack(client)  # what a forked child is handed it may use
    pid = os.fork()
    if pid == 0:
        calls = {**CALLS, "run": lambda s: s.run(), "abort": lambda s: s.abort(task),
                 "client": lambda s: s.client()}
        for name, call in calls.items():
            for service_ in (service, client):
                if name == "run" and service_ is client: continue
                try:
                    call(service_)
                except light_mem.ForkedProcessError:
                    continue
                say("not refused", name)
        given = unpack(pack_of_client)
        t = given.create("w", ["b"], [2])
        say("child done", t.wait(10), t.state(), given.query("a"))
        service.close()
        sys.exit(0)  # with all that the interpreter does at its end
    os.waitpid(pid, 0)
    t = service.create("r", ["a"], [1])
    say(t.wait(10), t.state(), client.query("a"), service.query("a"))
    service.close()
    say("closed")
    """
    with Child(script, tmp_path / "store") as child:
        assert child.hear() == ["child done", True, [2], True]
        assert child.hear() == [True, [2], True, True]
        assert child.hear() == ["closed"]
        assert child.end() == 0


@pytest.mark.parametrize("ending", ["pass", "1 / 0"])
def test_a_program_that_just_ends_takes_its_workers_along(tmp_path: Path, ending: str) -> None:
    script = f"""
    import light_mem
    kv = light_mem.allocate_kvcache(4, 4096)
    service = light_mem.LocalCacheService(sys.argv[1], 1 << 20, 1, kv, 2)
    service.run()
    say(service.worker_pids)
    task = service.create("w", ["a"], [0])
    task.wait()
    sys.stderr = open(os.devnull, "w")
    {ending}
    """
    with Child(script, tmp_path / "store") as child:
        (workers,) = child.hear()
        assert child.end() == (1 if "/" in ending else 0)
        assert not any(psutil.pid_exists(pid) for pid in workers)
    with rig(tmp_path, run=False) as r:
        assert r.service.query("a") is True
