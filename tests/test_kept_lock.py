"""KeptFileLock excludes whoever locks the file that its path names now."""

from __future__ import annotations

import os
from pathlib import Path

import filelock
import pytest

from light_mem.index.kept_lock import KeptFileLock


def is_free(path: Path) -> bool:
    """Whether another object, as another process would have it, gets the lock."""
    other = filelock.FileLock(path, thread_local=False)
    try:
        other.acquire(timeout=0)
    except filelock.Timeout:
        return False
    other.release()
    return True


def test_it_excludes_filelock_objects_and_keeps_its_file_open(tmp_path: Path) -> None:
    lock = KeptFileLock(str(tmp_path / "lock"))
    with lock:
        assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600
    for _ in range(3):
        with lock:
            assert lock.is_locked
            assert not is_free(tmp_path / "lock")
        assert not lock.is_locked
        assert is_free(tmp_path / "lock")
    other = filelock.FileLock(tmp_path / "lock", thread_local=False)
    with other, pytest.raises(filelock.Timeout):
        lock.acquire(timeout=0)


@pytest.mark.parametrize("again", [True, False])
def test_a_file_that_was_replaced_is_noticed(tmp_path: Path, again: bool) -> None:
    path = tmp_path / "lock"
    lock = KeptFileLock(str(path))
    with lock:
        pass
    path.unlink()
    if again:
        path.touch()
    with lock:
        assert not is_free(path)
    assert is_free(path)


def test_whoever_waits_for_a_file_that_is_gone_gets_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = KeptFileLock(str(path))
    with lock:
        pass
    with filelock.FileLock(path, thread_local=False):
        os.rename(path, tmp_path / "old")
        path.touch()
        with lock:
            assert not is_free(path)


def test_its_descriptor_goes_with_it(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    lock = KeptFileLock(str(tmp_path / "lock"))
    with lock:
        pass
    del lock
    if before:
        assert len(os.listdir("/proc/self/fd")) == before
    assert is_free(tmp_path / "lock")
