"""Whether a process lives: pid and start time together; the dead that nobody waited for do not."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from light_mem.engine.process import DeathWatch, is_alive
from light_mem.index.owners import process_start
from tests.conftest import wait_until


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until it is killed."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.fixture(params=["pidfd", "no pidfd"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """This system, and one where nothing but looking again and again helps."""
    if request.param == "no pidfd":
        monkeypatch.delattr(os, "pidfd_open")
        monkeypatch.setattr("light_mem.engine.process._LOOK_SECONDS", 0.01)
    return str(request.param)


def test_a_pid_lives_only_with_its_start_time(child: subprocess.Popen[bytes]) -> None:
    started = process_start(child.pid)
    assert is_alive(child.pid, started)
    assert not is_alive(child.pid, started + 10)  # another process had this pid before
    assert not is_alive(child.pid, started - 10)
    assert is_alive(os.getpid(), process_start(os.getpid()))


def test_want_of_descriptors_is_no_death(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = process_start(child.pid)

    def fail(*_: object) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        patch.setattr(os, "pidfd_open", fail, raising=False)
        assert is_alive(child.pid, started)
    child.kill()
    child.wait()
    assert not is_alive(child.pid, started)


def test_a_zombie_does_not_live(child: subprocess.Popen[bytes]) -> None:
    started = process_start(child.pid)
    child.kill()
    wait_until(lambda: not is_alive(child.pid, started))
    assert child.returncode is None  # not waited for yet
    assert process_start(child.pid) == started  # /proc still knows it
    child.wait()
    assert not is_alive(child.pid, started)


def test_a_watch_tells_of_the_death(child: subprocess.Popen[bytes], system: str) -> None:
    watch = DeathWatch(child.pid, process_start(child.pid))
    assert not watch.dead
    child.kill()
    if system == "no pidfd":
        child.wait()
    wait_until(lambda: watch.dead)


@pytest.mark.parametrize("wrong", ["start time", "pid"])
def test_a_watch_over_nobody_tells_at_once(
    child: subprocess.Popen[bytes], system: str, wrong: str
) -> None:
    started = process_start(child.pid)
    if wrong == "pid":
        child.kill()
        child.wait()
    watch = DeathWatch(child.pid, started - 10 * (wrong == "start time"))
    wait_until(lambda: watch.dead, seconds=5)


@pytest.mark.skipif(not hasattr(os, "eventfd"), reason="no eventfd")
@pytest.mark.parametrize("where", ["eventfd", "start"])
def test_a_watch_that_cannot_begin_leaves_no_descriptor(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*_: object) -> int:
        if where == "eventfd":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        raise RuntimeError("can't start new thread")

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(*((os, where) if where == "eventfd" else (threading.Thread, where)), fail)
        with pytest.raises((OSError, RuntimeError)):
            DeathWatch(child.pid, process_start(child.pid))
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_thread_of_a_watch_ends_with_it(child: subprocess.Popen[bytes], system: str) -> None:
    def threads() -> int:
        return sum(t.name == "lightmem-watch" for t in threading.enumerate())

    descriptors = len(os.listdir("/proc/self/fd"))
    started = process_start(child.pid)
    watches = [DeathWatch(child.pid, started) for _ in range(3)]
    assert threads() == 3
    watches.pop()
    gc.collect()
    wait_until(lambda: threads() == 2)
    child.kill()
    if system == "pidfd":  # the other thread waits for its end still
        for watch in watches:
            wait_until(lambda: watch.dead)  # noqa: B023
        del watch
    watches.clear()
    gc.collect()
    wait_until(lambda: threads() == 0)
    assert len(os.listdir("/proc/self/fd")) <= descriptors
