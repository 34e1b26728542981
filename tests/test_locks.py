"""PathLock between threads, objects and processes, and what a death or a fork does to it."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from light_mem.errors import LockTimeoutError
from light_mem.index.lock_holder import holder_of
from light_mem.index.locks import PathLock
from tests.children import child, line

HOLD_PATH = "with PathLock(path).hold():\n    say('held')\n    sys.stdin.read()\nsay('freed')\n"


def test_threads_take_turns_even_with_objects_of_their_own(tmp_path: Path) -> None:
    inside, worst, rounds = 0, 0, []

    def work() -> None:
        nonlocal inside, worst
        lock = PathLock(tmp_path / "lock")
        for _ in range(20):
            with lock.hold():
                inside += 1
                worst = max(worst, inside)
                time.sleep(0)
                inside -= 1
                rounds.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (worst, len(rounds)) == (1, 80)


def test_two_names_of_one_file_are_one_lock(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    one = PathLock(tmp_path / "lock")
    other = PathLock(tmp_path / "link" / ".." / tmp_path.name / "lock")
    with one.hold(), pytest.raises(LockTimeoutError), other.hold(timeout=0.05):
        pass


def test_another_process_keeps_us_out_until_it_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with child(HOLD_PATH, path) as process:
        assert line(process) == "held"
        with pytest.raises(LockTimeoutError) as caught, PathLock(path).hold(timeout=0.05):
            pass
        assert isinstance(caught.value, TimeoutError)
        assert (caught.value.path, caught.value.timeout) == (os.path.realpath(path), 0.05)  # type: ignore[attr-defined]
        assert process.stdin is not None
        process.stdin.close()
        assert line(process) == "freed"
        with PathLock(path).hold(timeout=0):
            pass
        process.stdin = None


def test_who_waits_in_vain_is_told_who_holds_the_lock_and_whether_that_is_stopped(
    tmp_path: Path,
) -> None:
    path = tmp_path / "lock"
    with child(HOLD_PATH, path) as process:
        assert line(process) == "held"
        if holder_of(str(path)) == (None, ""):
            pytest.skip("this file system or container does not tell")
        lock = PathLock(path)
        with pytest.raises(LockTimeoutError, match=rf"held by pid {process.pid}, ") as caught:
            lock.acquire("me", timeout=0.15)
        assert caught.value.holder == process.pid
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(LockTimeoutError, match=rf"held by pid {process.pid}, which is stopped"):
            lock.acquire("me", timeout=0.15)
        with pytest.raises(LockTimeoutError, match="its holder is stopped or very slow") as caught:
            lock.acquire("me", timeout=0)  # a try looks no further
        assert caught.value.holder is None
    with lock.hold(), pytest.raises(LockTimeoutError, match=f"by pid {os.getpid()}, this process"):
        PathLock(path).acquire("me", timeout=0.15)
    assert holder_of(str(path)) == holder_of(str(tmp_path / "none")) == (None, "")


def test_a_holder_killed_with_sigkill_frees_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with child(HOLD_PATH, path) as process:
        assert line(process) == "held"
        process.kill()
        process.wait()
        with PathLock(path).hold(timeout=0):
            pass


def test_a_waiter_gets_the_lock_when_the_holder_dies(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with child(HOLD_PATH, path) as process:
        assert line(process) == "held"
        threading.Timer(0.1, process.kill).start()
        with PathLock(path).hold(timeout=20):
            process.wait()


def test_a_timeout_and_an_exception_leave_the_lock_usable(tmp_path: Path) -> None:
    lock = PathLock(tmp_path / "lock")
    with pytest.raises(KeyError), lock.hold():
        raise KeyError
    # Not reentrant: a timeout instead of a deadlock.
    with lock.hold(timeout=0), pytest.raises(LockTimeoutError), lock.hold(timeout=0.02):
        pass
    with lock.hold(timeout=0):
        pass


def test_the_lock_file_stays_is_empty_and_is_the_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    before = os.umask(0)
    try:
        with PathLock(path).hold():
            inode = path.stat().st_ino
    finally:
        os.umask(before)
    # A lock file that is deleted and made again splits waiters over two inodes.
    assert (path.stat().st_ino, path.stat().st_size) == (inode, 0)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_forked_child_neither_has_nor_frees_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = (
        "from light_mem.errors import LockTimeoutError\n"
        "with PathLock(path).hold():\n"
        "    pid = os.fork()\n"
        "    if not pid:\n"
        "        try:\n"
        "            with PathLock(path).hold(timeout=0.05): say('got it')\n"
        "        except LockTimeoutError: say('busy')\n"
        "    else:\n"
        "        os.waitpid(pid, 0)\n"
        "        say('child gone')\n"
        "        time.sleep(60)\n"
    )
    with child(code, path) as process:
        assert line(process) == "busy"
        assert line(process) == "child gone"  # and it has left its `with`
        with pytest.raises(LockTimeoutError), PathLock(path).hold(timeout=0.05):
            pass
        process.kill()
        process.wait()
        with PathLock(path).hold(timeout=0):
            pass


def test_a_forked_child_does_not_keep_the_lock_of_a_dead_parent(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = (
        "import threading\n"
        "def hold():\n"
        "    with PathLock(path).hold():\n"
        "        say('held')\n"
        "        time.sleep(60)\n"
        "threading.Thread(target=hold, daemon=True).start()\n"
        "while not path.exists(): time.sleep(0.001)\n"
        "sys.stdin.readline()\n"
        "pid = os.fork()\n"
        "if not pid: time.sleep(60)\n"
        "say(pid)\n"
        "time.sleep(60)\n"
    )
    with child(code, path) as process:
        assert line(process) == "held"
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        orphan = int(line(process))
        try:
            with pytest.raises(LockTimeoutError), PathLock(path).hold(timeout=0.05):
                pass
            process.kill()
            process.wait()
            with PathLock(path).hold(timeout=0.2):
                os.kill(orphan, 0)  # the child lives, and does not hold it
        finally:
            os.kill(orphan, signal.SIGKILL)
