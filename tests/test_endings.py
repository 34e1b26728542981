"""The parts that an end is made of: steps, a thread, a queue's lock, when interrupted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from light_mem.closing import Ending
from light_mem.engine.one_thread import OneThread
from light_mem.engine.queue_lock import QUEUE_BYTE, QueueLock
from light_mem.errors import LockTimeoutError, ServiceClosedError
from light_mem.index.locks import RangeLock
from tests.service_rig import WAIT

LOOK = 0.2  # s that a thread has to do what it should not


class Steps:
    """Steps that note that they were made; the first one also does what it is given."""

    def __init__(self, *first: Callable[[], object]) -> None:
        self.made: list[str] = []
        self._first = list(first)
        self.end = Ending(self.a, self.b)

    def a(self) -> None:
        self.made.append("a")
        if self._first:
            self._first.pop(0)()

    def b(self) -> None:
        self.made.append("b")


def raises(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def test_steps_are_made_once_and_in_their_order() -> None:
    steps = Steps()
    steps.end()
    steps.end()
    assert steps.made == ["a", "b"]


def test_a_step_that_fails_keeps_no_other_from_being_made() -> None:
    steps = Steps(raises(OSError("no")))
    with pytest.raises(OSError, match="no"):
        steps.end()
    steps.end()
    assert steps.made == ["a", "b"]


def test_what_a_ctrl_c_breaks_off_is_taken_up_from_there() -> None:
    steps = Steps(raises(KeyboardInterrupt()), raises(KeyboardInterrupt()))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            steps.end()
    assert steps.made == ["a", "a"]
    steps.end()
    assert steps.made == ["a", "a", "a", "b"]


def test_one_in_the_middle_of_a_step_reaches_the_end() -> None:
    reached: list[list[str]] = []

    def further_in() -> None:
        steps.end()
        reached.append(list(steps.made))

    steps = Steps(further_in)
    steps.end()
    assert reached == [["a", "a", "b"]]
    assert steps.made == ["a", "a", "b"]


def test_a_step_that_is_broken_off_after_one_in_its_middle_is_made_again() -> None:
    def further_in() -> None:
        steps.end()
        raise SystemExit

    steps = Steps(further_in)
    with pytest.raises(SystemExit):
        steps.end()
    steps.end()  # at the interpreter's end, say
    assert steps.made == ["a", "a", "b", "a"]


def test_another_thread_returns_when_the_end_is_reached() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert go_on.wait(WAIT)

    steps = Steps(wait)
    threads = [threading.Thread(target=steps.end) for _ in range(2)]
    threads[0].start()
    assert begun.wait(WAIT)
    threads[1].start()
    threads[1].join(LOOK)
    assert threads[1].is_alive()
    go_on.set()
    for thread in threads:
        thread.join(WAIT)
    assert steps.made == ["a", "b"]


def test_a_thread_that_is_ended_before_it_began_never_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = OneThread("one")
    ran: list[int] = []
    started: list[threading.Thread] = []
    with monkeypatch.context() as patch:  # one that is there later
        patch.setattr(threading.Thread, "start", lambda thread: started.append(thread))
        one.start(lambda: ran.append(1))
    one.end(lambda: ran.append(2))
    started[0].start()
    started[0].join(WAIT)
    assert ran == []


def test_a_thread_runs_once_and_may_end_itself() -> None:
    one, go_on = OneThread("one"), threading.Event()
    ran: list[int] = []

    def run() -> None:
        one.end(go_on.set)  # in itself: there is nothing to wait for
        assert not go_on.is_set()
        assert go_on.wait(WAIT)
        ran.append(1)

    one.start(run)
    one.start(run)
    one.end(go_on.set)
    one.end(go_on.set)
    assert ran == [1]


class Held:
    """The lock of a queue, and another opening of its file."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self.table = SimpleNamespace(shutdown=0)
        table: Any = self.table
        self.other = RangeLock(path)
        self.queue = QueueLock(table, RangeLock(path))

    def is_free(self) -> bool:
        """Whether another process could have the queue."""
        return not self.other.locked_by_another(QUEUE_BYTE)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    held = Held(tmp_path / "file")
    yield held
    held.queue.close()
    held.other.close()


def test_a_thread_that_has_the_queue_does_not_wait_for_itself(held: Held) -> None:
    with held.queue.held():
        with pytest.raises(LockTimeoutError, match="this very thread"), held.queue.held():
            pass
        assert not held.is_free()
    assert held.is_free()
    with held.queue.held(0):
        assert not held.is_free()


def test_what_is_done_in_the_middle_of_a_hold_is_done_again_at_its_end(held: Held) -> None:
    done: list[bool] = []
    with held.queue.held():
        held.queue.do(lambda: done.append(held.is_free()))
        assert done == [False]
    assert done == [False, False]
    with held.queue.held():
        pass
    assert len(done) == 2


def test_what_found_the_queue_taken_in_the_middle_of_a_wait_is_not_done_without_it(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped worker has it, and may be in the middle of a claim."""
    done: list[bool] = []
    real, calls = held.queue._lock.lock, []

    def lock(at: int, timeout: float = 0.0) -> None:
        calls.append(at)
        if len(calls) == 1:  # a signal's handler, in the middle of the wait
            with pytest.raises(LockTimeoutError):
                held.queue.do(lambda: done.append(held.is_free()))
        real(at, timeout)

    monkeypatch.setattr(held.queue._lock, "lock", lock)
    held.other.lock(QUEUE_BYTE)
    with pytest.raises(LockTimeoutError, match="its holder is stopped"), held.queue.held(0.01):
        pass
    held.other.unlock(QUEUE_BYTE)
    with held.queue.held():
        pass
    assert done == []


def test_once_it_is_shut_down_workers_do_not_wait_for_who_is_in_the_middle(held: Held) -> None:
    with held.queue.held():
        held.table.shutdown = 1
        held.queue.do(lambda: None)
        assert held.is_free()


def test_closing_waits_for_nobody_who_has_the_queue(held: Held) -> None:
    has_it, go_on = threading.Event(), threading.Event()
    after: list[bool] = []

    def hold() -> None:
        with held.queue.held():
            has_it.set()
            assert go_on.wait(WAIT)
            after.append(held.is_free())

    thread = threading.Thread(target=hold)
    thread.start()
    assert has_it.wait(WAIT)
    held.queue.close()
    go_on.set()
    thread.join(WAIT)
    assert after == [False]  # it kept the lock to its end
    assert held.is_free()
    assert held.queue._lock._fd == -1
    with pytest.raises(ServiceClosedError), held.queue.held():
        pass
    held.queue.do(lambda: after.append(True))
    assert after == [False]


def test_closing_in_the_middle_of_a_hold_leaves_the_lock_to_its_end(held: Held) -> None:
    with held.queue.held():
        held.queue.close()
        assert not held.is_free()
    assert held.queue._lock._fd == -1
