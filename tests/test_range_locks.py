"""RangeLock between objects and processes, and what a death or a fork does to it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from light_mem.errors import LockTimeoutError
from light_mem.index.locks import RangeLock
from tests.children import child, line
from tests.conftest import wait_until


@pytest.fixture
def ranges(tmp_path: Path) -> Iterator[tuple[RangeLock, RangeLock]]:
    """Two objects on one file in one process."""
    (tmp_path / "ranges").touch()
    pair = RangeLock(tmp_path / "ranges"), RangeLock(tmp_path / "ranges")
    yield pair
    for lock in pair:
        lock.close()


Pair = tuple[RangeLock, RangeLock]
HOLD_BYTE = (
    "lock = RangeLock(path)\n"
    "assert lock.try_lock(5)\n"
    "say('held')\n"
    "sys.stdin.read()\n"
)  # fmt: skip


def test_two_objects_in_one_process_exclude_each_other(ranges: Pair) -> None:
    one, other = ranges
    assert one.try_lock(3)
    assert not other.try_lock(3)
    assert other.try_lock(4)
    one.unlock(3)
    assert other.try_lock(3)
    assert not one.try_lock(3)


def test_closing_another_object_keeps_the_lock(ranges: Pair, tmp_path: Path) -> None:
    one, other = ranges
    assert one.try_lock(3)
    RangeLock(tmp_path / "ranges").close()  # with classic POSIX locks this would free byte 3
    assert not other.try_lock(3)


def test_closing_frees_all_and_may_be_repeated(ranges: Pair) -> None:
    one, other = ranges
    assert one.try_lock(0)
    assert one.try_lock(2**40)
    one.close()
    one.close()
    assert other.try_lock(0)
    assert other.try_lock(2**40)


def test_only_the_locks_of_others_are_seen(ranges: Pair) -> None:
    one, other = ranges
    assert one.try_lock(10)
    assert not one.locked_by_another(10)
    assert not one.locked_by_another(0, 100)
    assert other.locked_by_another(10)
    assert other.locked_by_another(0, 11)
    assert not other.locked_by_another(0, 10)
    assert not other.locked_by_another(11, 100)
    assert other.try_lock(20)
    assert one.locked_by_another(0, 100)


def test_waiting_ends_with_an_error_or_with_the_lock(ranges: Pair, tmp_path: Path) -> None:
    one, other = ranges
    one.lock(1)
    started = time.monotonic()
    with pytest.raises(LockTimeoutError, match=f"byte 1 of {tmp_path / 'ranges'}") as caught:
        other.lock(1, timeout=0.1)
    assert caught.value.values == {"path": str(tmp_path / "ranges"), "byte": 1, "timeout": 0.1}
    assert 0.1 <= time.monotonic() - started < 5
    timer = threading.Timer(0.05, one.unlock, [1])
    timer.start()
    other.lock(1, timeout=20)
    timer.join()
    assert not one.try_lock(1)


def test_a_process_killed_with_sigkill_frees_its_bytes(ranges: Pair, tmp_path: Path) -> None:
    one, _ = ranges
    with child(HOLD_BYTE, tmp_path / "ranges") as process:
        assert line(process) == "held"
        assert not one.try_lock(5)
        assert one.locked_by_another(5)
        process.kill()
        process.wait()
        assert not one.locked_by_another(5)
        assert one.try_lock(5)


def test_a_forked_child_does_not_have_the_lock(ranges: Pair, tmp_path: Path) -> None:
    one, _ = ranges
    code = (
        "lock = RangeLock(path)\n"
        "assert lock.try_lock(5)\n"
        "pid = os.fork()\n"
        "if not pid:\n"
        "    say(RangeLock(path).try_lock(5))\n"
        "    os._exit(0)\n"
        "os.waitpid(pid, 0)\n"
        "say('child gone')\n"
        "time.sleep(60)\n"
    )
    with child(code, tmp_path / "ranges") as process:
        assert line(process) == "False"
        assert line(process) == "child gone"
        assert not one.try_lock(5)


def test_a_forked_child_of_a_dead_owner_does_not_keep_the_lock(
    ranges: Pair, tmp_path: Path
) -> None:
    one, _ = ranges
    code = (
        "lock = RangeLock(path)\n"
        "assert lock.try_lock(5)\n"
        "pid = os.fork()\n"
        "if not pid: time.sleep(60)\n"
        "say(pid)\n"
        "time.sleep(60)\n"
    )
    with child(code, tmp_path / "ranges") as process:
        orphan = int(line(process))
        try:
            assert not one.try_lock(5)
            process.kill()
            process.wait()
            wait_until(lambda: one.try_lock(5), 2, "the byte to be free")
            os.kill(orphan, 0)
        finally:
            os.kill(orphan, signal.SIGKILL)
