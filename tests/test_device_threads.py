"""Threads that wait for a device, when the system has none to give."""

from __future__ import annotations

import threading
from collections.abc import Callable
from unittest import mock

import pytest

from light_mem.engine.device_threads import DeviceThreads, give_up


def after(started: int, no_more: Callable[[], None]) -> Callable[[threading.Thread], None]:
    """A `Thread.start` that works so many times, then calls `no_more` and fails."""
    start = threading.Thread.start
    left = started

    def maybe(thread: threading.Thread) -> None:
        nonlocal left
        if not left:
            no_more()
            raise RuntimeError("can't start new thread")
        left -= 1
        start(thread)

    return maybe


def test_without_a_thread_the_caller_makes_the_call() -> None:
    threads = DeviceThreads("test")
    with mock.patch.object(threading.Thread, "start", after(0, lambda: None)):
        assert threads.submit(threading.current_thread).result() is threading.current_thread()
        failing = threads.submit(int, "seven")
    with pytest.raises(ValueError, match="seven"):
        failing.result()
    give_up(failing)
    there = threads.submit(threading.current_thread).result()  # there are threads again
    assert there is not threading.current_thread()
    threads.close()


def test_no_call_is_made_after_its_caller_went_on() -> None:
    go_on = threading.Event()
    made: list[str] = []

    def slow() -> None:
        go_on.wait(60)
        made.append("slow")

    threads = DeviceThreads("test")
    # The one thread is busy while the second call is queued for it, and free right after.
    with mock.patch.object(threading.Thread, "start", after(1, go_on.set)):
        first = threads.submit(slow)
        second = threads.submit(made.append, "quick")
        assert second.done()
        assert first.done()
        so_far = list(made)
    threads.close()
    assert made == so_far
    assert set(made) == {"slow", "quick"}
