"""Callbacks of tasks, and who waits for any: each is told once and in time, whatever else fails."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from light_mem import CacheTask, InvalidArgumentError, State
from tests.conftest import wait_until
from tests.service_rig import WAIT, rig


def test_a_callback_comes_once_when_the_task_is_ready(tmp_path: Path) -> None:
    calls: list[tuple[int, bool, str]] = []
    done = threading.Event()

    def tell(n: int, task: CacheTask) -> None:
        calls.append((n, task.ready(), threading.current_thread().name))
        if len(calls) >= 16:
            done.set()

    with rig(tmp_path, run=False, workers=2) as r:
        for n in range(16):
            task = r.service.create("w", [f"k{n}"], [n])
            task.add_done_callback(lambda t, n=n: tell(n, t))
        del task  # the object may go: the callback comes all the same
        assert not calls
        r.service.run()
        assert done.wait(WAIT)
        assert sorted(n for n, _, _ in calls) == list(range(16))
        assert all(ready for _, ready, _ in calls)
        over = r.service.create("w", ["k0"], [0])
        assert over.wait(WAIT)
        over.add_done_callback(lambda t: tell(99, t))
        assert calls[16:] == [(99, True, threading.current_thread().name)]
        r.service.create("r", ["no"], [0]).add_done_callback(lambda t: tell(100, t))
        assert calls[17:] == [(100, True, threading.current_thread().name)]


def test_no_callback_is_late_for_a_task_that_gets_ready_as_it_is_added(tmp_path: Path) -> None:
    with rig(tmp_path, pages=32, slots=400, workers=1) as r:
        waits = []
        for n in range(200):
            told = threading.Event()
            began = time.monotonic()
            r.service.create("w", [f"k{n}"], [n % 32]).add_done_callback(lambda _, e=told: e.set())
            assert told.wait(WAIT)
            waits.append(time.monotonic() - began)
        # One that is missed is told of when the thread looks again, after 50 ms.
        assert sorted(waits)[len(waits) * 9 // 10] < 0.04


def test_a_callback_that_fails_is_logged_and_disturbs_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = threading.Event()
    with rig(tmp_path, run=False) as r:
        r.service.create("w", ["a"], [0]).add_done_callback(lambda _: 1 / 0)
        r.service.create("w", ["b"], [1]).add_done_callback(lambda _: told.set())
        r.service.run()
        assert told.wait(WAIT)
        assert "ZeroDivisionError" in caplog.text
        assert f'{__file__}", line' in caplog.text  # where


def test_what_cannot_be_called_is_no_callback(tmp_path: Path) -> None:
    with rig(tmp_path, run=False) as r:
        task = r.service.create("w", ["a"], [0])
        with pytest.raises(InvalidArgumentError, match="no callback: 3"):
            task.add_done_callback(3)  # type: ignore[arg-type]


def test_a_callback_that_exits_leaves_others_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def leave(_: object) -> None:
        raise SystemExit(3)

    with rig(tmp_path, run=False) as r:
        first = r.service.create("w", ["a"], [0])
        first.add_done_callback(leave)
        r.service.abort(first)
        wait_until(lambda: "SystemExit" in caplog.text)
        told = threading.Event()
        second = r.service.create("w", ["b"], [1])
        second.add_done_callback(lambda _: told.set())
        r.service.abort(second)
        assert told.wait(WAIT)


def test_closing_the_service_wakes_who_waits_for_any_task(tmp_path: Path) -> None:
    with rig(tmp_path, run=False) as r:
        mark = r.service.ready_mark()
        waiter = threading.Thread(target=r.service.wait_ready, args=(mark, 10 * WAIT))
        waiter.start()
        r.service.close()
        waiter.join(WAIT)
        assert not waiter.is_alive()


def test_closing_the_service_tells_those_who_wait(tmp_path: Path) -> None:
    told = threading.Event()
    with rig(tmp_path, run=False) as r:
        task = r.service.create("w", ["a"], [0])
        task.add_done_callback(lambda _: told.set())
        r.service.close()
        assert told.wait(WAIT)
        assert task.state() == [State.Aborted]


def test_a_thread_that_cannot_start_does_not_silence_later_callbacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rig(tmp_path, run=False) as r:
        task = r.service.create("w", ["a"], [0])
        with monkeypatch.context() as patch:

            def no_more(self: threading.Thread) -> None:
                raise RuntimeError("can't start new thread")

            patch.setattr(threading.Thread, "start", no_more)
            with pytest.raises(RuntimeError):
                task.add_done_callback(lambda _: None)
        told = threading.Event()
        task.add_done_callback(lambda _: told.set())
        r.service.abort(task)
        assert told.wait(30)
