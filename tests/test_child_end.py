"""How a child ended is said as it was, or that nobody of us can know."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from light_mem.engine.child_end import how_it_ended
from light_mem.engine.queue import TaskQueue
from light_mem.errors import LockTimeoutError
from tests.conftest import wait_until
from tests.service_rig import rig

TAKEN = "died (its exit status was taken by another part of the server)"


class Child:
    """A process that waits for a line, and its pidfd."""

    def __init__(self, code: str = "") -> None:
        command = [sys.executable, "-S", "-c", f"input(); {code}"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE)
        self.pidfd = os.pidfd_open(self.process.pid)

    def end(self, number: int = 0) -> None:
        """By this signal, or of itself; returns when it has ended. Its status is not taken."""
        if number:
            self.process.send_signal(number)
        else:
            assert self.process.stdin is not None
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        assert poll.poll(20_000)


@pytest.fixture
def start() -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def begin(code: str = "") -> Child:
        children.append(Child(code))
        return children[-1]

    yield begin
    for child in children:
        child.process.kill()
        child.process.communicate()
        os.close(child.pidfd)


@pytest.fixture
def children_ignored() -> Iterator[None]:
    """This process does not want to hear of its children: the kernel keeps no status."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("by_pidfd", [True, False])
def test_a_child_ends_by_a_signal_or_with_a_status(
    start: Callable[..., Child], by_pidfd: bool
) -> None:
    killed, left, crashed, lives = start(), start("import sys; sys.exit(3)"), start(), start()
    killed.end(signal.SIGKILL)
    left.end()
    crashed.end(signal.SIGSEGV)  # with a core dump, where they are made

    def how(child: Child) -> str | None:
        return how_it_ended(child.process, child.pidfd if by_pidfd else -1)

    assert how(killed) == "was killed by SIGKILL (out of memory? see the kernel's log)"
    assert how(left) == "died with status 3"
    assert how(crashed) == "was killed by SIGSEGV"
    assert how(lives) is None
    assert killed.process.returncode == -signal.SIGKILL  # no zombie


@pytest.mark.parametrize("by_pidfd", [True, False])
def test_a_status_that_others_took_is_not_known(
    start: Callable[..., Child], by_pidfd: bool
) -> None:
    child = start()
    child.end(signal.SIGKILL)
    os.waitpid(child.process.pid, 0)
    assert how_it_ended(child.process, child.pidfd if by_pidfd else -1) == TAKEN


def test_where_the_system_cannot_look_it_is_as_python_says(
    start: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    child = start()
    monkeypatch.delattr(os, "waitid")
    assert how_it_ended(child.process, child.pidfd) is None
    child.end(signal.SIGTERM)
    assert how_it_ended(child.process, child.pidfd) == "was killed by SIGTERM"


@pytest.mark.usefixtures("children_ignored")
def test_a_server_that_ignores_its_children_is_not_told_a_wrong_status(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with rig(tmp_path) as r:
        (pid,) = r.service.worker_pids
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: "it is replaced" in caplog.text)
        r.write(["a"], [0])
    assert f"worker 1 (pid {pid}) {TAKEN}; it is replaced" in caplog.messages


def test_how_a_worker_ended_is_still_known_when_it_is_met_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its blocks cannot be settled at first: who holds the queue is stopped."""
    recover, held = TaskQueue.recover, []

    def recover_later(self: TaskQueue, *arguments: Any) -> int:
        if not held:
            held.append(True)
            raise LockTimeoutError("held")
        return recover(self, *arguments)

    with rig(tmp_path) as r:
        monkeypatch.setattr(TaskQueue, "recover", recover_later)
        (pid,) = r.service.worker_pids
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: "it is replaced" in caplog.text)
        assert held
    assert f"worker 1 (pid {pid}) was killed by SIGKILL" in caplog.text
