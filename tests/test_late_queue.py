"""What comes to the queue too late, or is broken off on the way to it, leaves nothing behind."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest

from light_mem import ServiceClosedError, State
from light_mem.engine.queue import TaskQueue
from light_mem.session import Session
from tests.service_rig import WAIT, rig


def test_nobody_takes_a_lane_of_a_closed_service(tmp_path: Path) -> None:
    """Its server's lane is free then, and the tasks there are still asked for."""
    with rig(tmp_path, run=False) as r:
        table = r.service._session.table
        table.header["shutdown"] = 1
        with pytest.raises(ServiceClosedError):
            Session.open(table, table.lock_path())


def test_what_is_queued_as_the_service_ends_is_aborted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who shuts down waits for a hold of the queue for some seconds only."""
    real = TaskQueue._append

    def append(self: TaskQueue, *arguments: Any) -> None:
        real(self, *arguments)
        self._table.header["shutdown"] = 1

    monkeypatch.setattr(TaskQueue, "_append", append)
    with rig(tmp_path, run=False, small_write_bytes=0) as r:
        task = r.service.create("write", ["a", "b"], [0, 1])
        assert task.state() == [State.Aborted] * 2


class Interrupted:
    """A lock whose first acquire is a KeyboardInterrupt right after it was taken."""

    def __init__(self) -> None:
        self._real: Any = threading.RLock()
        self._is_owned, self.release = self._real._is_owned, self._real.release
        self._calls = 0

    def acquire(self, *arguments: Any, **named: Any) -> bool:
        self._calls += 1
        taken: bool = self._real.acquire(*arguments, **named)
        if self._calls == 1:
            raise KeyboardInterrupt
        return taken


def test_an_interrupt_as_the_queue_is_taken_leaves_it_to_other_threads(tmp_path: Path) -> None:
    with rig(tmp_path, run=False, small_write_bytes=0) as r:
        r.service._session.queue._threads = Interrupted()
        with pytest.raises(KeyboardInterrupt):
            r.service.create("write", ["a"], [0])
        tasks = []
        thread = threading.Thread(
            target=lambda: tasks.append(r.service.create("write", ["b"], [1]))
        )
        thread.start()
        thread.join(WAIT)
        assert len(tasks) == 1


def test_a_client_that_closes_in_the_middle_of_a_create_keeps_its_lane_until_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rig(tmp_path, run=False) as r:
        client, real, closed = r.service.client(), Session.place, []
        client.query("a")

        def place(self: Session, *arguments: Any, **named: Any) -> Any:
            client.close()
            gc.collect()
            closed.append(self.queue._closed)
            return real(self, *arguments, **named)

        monkeypatch.setattr(Session, "place", place)
        task = client.create("write", ["a"], [0])
        assert closed == [False]
        assert len(task) == 1
