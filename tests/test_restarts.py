"""Dead workers are replaced: at once, or, where they die of nothing again and again, later."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import psutil
import pytest

from light_mem.engine.restarts import (
    FIRST_SECONDS,
    FREE,
    LONG_SECONDS,
    MOST_SECONDS,
    WANT_SECONDS,
    Restarts,
)
from light_mem.engine.worker_processes import WorkerProcesses
from tests.conftest import wait_until
from tests.service_rig import rig


class Clock:
    """A clock that stands until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_first_are_replaced_at_once_and_those_after_them_later_and_later() -> None:
    clock = Clock()
    restarts = Restarts(clock)
    pauses = []
    for _ in range(40):
        restarts.started(1)
        pauses.append(restarts.died(1, was_of_use=False))
    assert pauses[:FREE] == [0.0] * FREE
    assert pauses[FREE : FREE + 3] == [FIRST_SECONDS, 2 * FIRST_SECONDS, 4 * FIRST_SECONDS]
    assert pauses == sorted(pauses)
    assert pauses[-1] == MOST_SECONDS


def test_a_worker_of_use_or_of_long_life_is_replaced_at_once_and_ends_the_row() -> None:
    clock = Clock()
    restarts = Restarts(clock)

    def useless() -> float:
        restarts.started(1)
        return restarts.died(1, was_of_use=False)

    for _ in range(FREE):
        useless()
    assert useless() == FIRST_SECONDS
    assert restarts.died(1, was_of_use=True) == 0
    assert [useless() for _ in range(FREE + 1)] == [0.0] * FREE + [FIRST_SECONDS]
    restarts.started(1)
    clock.now += LONG_SECONDS
    assert restarts.died(1, was_of_use=False) == 0
    assert [useless() for _ in range(FREE + 1)] == [0.0] * FREE + [FIRST_SECONDS]


def test_who_cannot_be_started_in_the_place_of_a_long_lived_one_is_tried_later_and_later() -> None:
    clock = Clock()
    restarts = Restarts(clock)
    restarts.started(1)
    clock.now += LONG_SECONDS
    pauses = [restarts.died(1, was_of_use=False) for _ in range(FREE + 3)]
    assert pauses == [0.0] * (1 + FREE) + [FIRST_SECONDS, 2 * FIRST_SECONDS]


def test_each_is_told_once_when_it_is_due_and_no_worker_waits_for_another() -> None:
    clock = Clock()
    restarts = Restarts(clock)
    assert restarts.take() == []
    assert restarts.wait(30) == 30
    for _ in range(FREE + 1):
        restarts.died(1, was_of_use=False)
    restarts.died(2, was_of_use=False)
    assert restarts.wait(30) == 0
    assert restarts.take() == [2]
    assert restarts.take() == []
    assert restarts.wait(30) == pytest.approx(FIRST_SECONDS)
    clock.now += FIRST_SECONDS
    assert restarts.wait(30) == 0
    assert restarts.take() == [1]
    assert restarts.wait(30) == 30


def test_workers_that_die_of_nothing_are_replaced_later_and_the_service_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "light_mem")
    with rig(tmp_path) as r:
        for deaths in range(1, FREE + 3):
            wait_until(lambda: r.service.stats()["workers"] == 1)
            os.kill(r.service.worker_pids[0], signal.SIGKILL)
            wait_until(lambda: r.service.stats()["restarts"] == deaths)  # noqa: B023
        said = [text for text in caplog.messages if "the next one starts in" in text]
        assert len(said) == 2
        assert said[0].endswith(f"in {FIRST_SECONDS:g} s")
        assert said[1].endswith(f"in {2 * FIRST_SECONDS:g} s")
        r.write(["a"], [0])
        os.kill(r.service.worker_pids[0], signal.SIGKILL)  # it was of use
        wait_until(lambda: r.service.stats()["restarts"] == FREE + 3)
        assert len([text for text in caplog.messages if "the next one" in text]) == 2
        r.write(["b"], [1])
        assert r.holds("a", [0])


def test_a_service_that_waits_to_replace_a_worker_closes_at_once(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        for deaths in range(1, FREE + 2):
            wait_until(lambda: r.service.stats()["workers"] == 1)
            os.kill(r.service.worker_pids[0], signal.SIGKILL)
            if deaths <= FREE:
                wait_until(lambda: r.service.stats()["restarts"] == deaths)  # noqa: B023
        task = r.service.create("w", ["a"], [0])
        r.service.close()
        assert task.ready()


def test_a_worker_that_nobody_could_watch_is_not_left_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with rig(tmp_path) as r:
        opened, refused = os.pidfd_open, []

        def refuse_one(pid: int) -> int:
            if not refused:
                refused.append(pid)
                raise OSError(24, "Too many open files")
            return opened(pid)

        before = r.service.worker_pids
        others = {child.pid for child in psutil.Process().children()}.difference(before)
        monkeypatch.setattr(os, "pidfd_open", refuse_one)
        os.kill(before[0], signal.SIGKILL)
        wait_until(lambda: r.service.worker_pids not in ([], before))
        (worker,) = r.service.worker_pids
        assert refused
        assert not psutil.pid_exists(refused[0])
        children = {child.pid for child in psutil.Process().children()}
        assert children == {worker, *others}
        r.write(["a"], [0])
    assert "cannot be started" in caplog.text


def test_want_of_descriptors_ends_no_service_that_has_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with rig(tmp_path, workers=2, small_write_bytes=0) as r:
        opened, refused = os.pidfd_open, []

        def refuse(pid: int) -> int:
            if len(refused) < 5:  # twice, once more, and again
                refused.append(pid)
                raise OSError(24, "Too many open files")
            return opened(pid)

        before = r.service.worker_pids
        monkeypatch.setattr(os, "pidfd_open", refuse)
        os.kill(before[0], signal.SIGKILL)
        r.write(["a"], [0])  # by the other one
        wait_until(lambda: len(refused) == 5 and r.service.stats()["workers"] == 2)
        r.write(["b"], [1])
        assert before[1] in r.service.worker_pids
    assert "the service stops" not in caplog.text


def test_where_no_worker_is_well_want_may_last_a_while_and_no_longer() -> None:
    clock = Clock()
    restarts = Restarts(clock)

    def lasts(alone: bool) -> float:
        """For how long it is tried, at most ten minutes."""
        begun = clock.now
        while clock.now - begun < 600:
            pause = restarts.failed(1, alone)
            if pause is None:
                break
            assert restarts.failed_last(1)
            clock.now += pause
        return clock.now - begun

    assert lasts(alone=False) >= 600
    assert WANT_SECONDS <= lasts(alone=True) <= WANT_SECONDS + MOST_SECONDS
    restarts.started(1)
    assert not restarts.failed_last(1)
    assert restarts.failed(1, alone=True) is not None


class Refusals:
    """Starts of a worker that fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.numbers: set[int] = set()
        self.left = 1_000_000
        self.made: list[int] = []
        start = WorkerProcesses.start

        def refuse(workers: WorkerProcesses, number: int) -> None:
            if number in self.numbers and self.left:
                self.left -= 1
                self.made.append(number)
                raise OSError(12, "Cannot allocate memory")
            start(workers, number)

        monkeypatch.setattr(WorkerProcesses, "start", refuse)


def test_no_place_waits_for_one_that_cannot_be_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rig(tmp_path, workers=2) as r:
        refusals = Refusals(monkeypatch)
        refusals.numbers.add(1)
        first, second = r.service.worker_pids
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: refusals.made)
        os.kill(second, signal.SIGKILL)
        r.write(["a"], [0])  # by the second's successor
        assert refusals.left
        refusals.left = 0
        wait_until(lambda: r.service.stats()["workers"] == 2)
        assert r.service.stats()["restarts"] == 2


def test_a_passing_want_of_memory_ends_no_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("light_mem.engine.restarts.FIRST_SECONDS", 0.0)
    with rig(tmp_path) as r:
        refusals = Refusals(monkeypatch)
        refusals.numbers, refusals.left = {1}, 8
        os.kill(r.service.worker_pids[0], signal.SIGKILL)
        r.write(["a"], [0])
        assert len(refusals.made) == 8
        assert r.service.stats()["restarts"] == 1
    assert "worker 1 cannot be started: [Errno 12] Cannot allocate memory; next try in" in (
        caplog.text
    )


def test_a_lasting_want_of_memory_ends_a_service_without_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("light_mem.engine.restarts.WANT_SECONDS", 0.0)
    with rig(tmp_path) as r:
        Refusals(monkeypatch).numbers.add(1)
        task = r.service.create("w", ["a"], [0])
        assert task.wait(20)
        os.kill(r.service.worker_pids[0], signal.SIGKILL)
        wait_until(lambda: r.service._pool.failure)
        assert "Cannot allocate memory" in r.service._pool.failure
    caplog.clear()  # the traceback in it keeps what the service had open
