"""A KeyboardInterrupt in any place where a lock is taken, held or given up leaves nothing held."""

from __future__ import annotations

import fcntl
import itertools
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType

import filelock
import pytest

from light_mem.engine import keeping
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.open_shards import _Change
from light_mem.errors import LockTimeoutError
from light_mem.index import keys as keymath
from light_mem.index.kept_lock import KeptFileLock
from light_mem.index.locks import PathLock
from tests.engine_helpers import Block, Rig, assert_consistent, lent, open_local
from tests.opcodes import LIBRARY, interrupt

# What comes as it is entered, nothing can give up before the traceback is dropped.
EXIT = (_Change.__exit__.__code__,)


def assert_free(path: Path) -> None:
    """Another process, and another thread of this one, gets the lock at once."""
    with path.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    failed: list[LockTimeoutError] = []

    def take() -> None:
        try:
            with PathLock(path).hold(timeout=0):
                pass
        except LockTimeoutError as error:
            failed.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    assert not failed


def interrupted_everywhere(
    call: Callable[[], object],
    check: Callable[[], object],
    where: tuple[str, ...] = (LIBRARY,),
    may_keep: tuple[CodeType, ...] = (),
) -> int:
    """Interrupts a call in one place after the other; how many. Checks each time, also while the
    traceback is kept, unless that comes from one of these functions."""

    def kept(error: BaseException) -> None:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        while not frame.f_code.co_filename.startswith(where):
            assert frame.f_back is not None
            frame = frame.f_back
        if frame.f_code not in may_keep:
            check()

    for at in itertools.count(1):
        hit = interrupt(call, at, kept, where)
        check()
        if not hit:
            return at - 1
    raise AssertionError


def test_a_lock_is_free_wherever_its_holder_was_interrupted(tmp_path: Path) -> None:
    path, lock = tmp_path / "lock", PathLock(tmp_path / "lock")

    def hold() -> None:
        with lock.hold(timeout=0):
            pass

    hold()
    assert interrupted_everywhere(hold, lambda: assert_free(path)) > 20


def test_a_lock_that_was_waited_for_is_free_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lock = tmp_path / "lock", PathLock(tmp_path / "lock")

    def hold() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(KeptFileLock, "try_now", lambda _: False)
            with lock.hold(5), path.open("r+") as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    hold()
    where = (LIBRARY, str(Path(filelock.__file__).parent))
    assert interrupted_everywhere(hold, lambda: assert_free(path), where) > 30


@pytest.mark.parametrize("timeout", [0, 0.002])
def test_a_lock_is_free_wherever_who_did_not_get_it_was_interrupted(
    tmp_path: Path, timeout: float
) -> None:
    path, lock = tmp_path / "lock", PathLock(tmp_path / "lock")
    path.touch()

    def wait() -> None:
        # Another description: as another process would have it.
        with path.open("r+") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            by = object()
            try:
                lock.acquire(by, timeout)
            except LockTimeoutError:
                pass
            else:
                raise AssertionError("it was another's")
            finally:
                lock.release(by)

    assert interrupted_everywhere(wait, lambda: assert_free(path)) > 20


def test_who_has_a_lock_is_refused_at_once_and_has_it_still(tmp_path: Path) -> None:
    lock = PathLock(tmp_path / "lock")
    lock.acquire("outer")
    with pytest.raises(LockTimeoutError):
        lock.acquire("inner", 60)
    lock.release("inner")
    assert lock.is_held("outer")
    with (tmp_path / "lock").open("r+") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.release("outer")
    lock.release("outer")
    assert_free(tmp_path / "lock")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LocalStorageEngine]:
    engine = open_local(tmp_path / "store", 8)
    Rig(engine).write(Block(1))
    yield from lent(engine)


@pytest.fixture
def check(engine: LocalStorageEngine) -> Callable[[], None]:
    """Nothing of an interrupted change is left, and the next one works."""

    def check() -> None:
        assert not engine._open._fence.is_held
        assert_free(engine.directory / "shard-000.lock")
        with engine.change(0, timeout=0) as (index, _):
            assert index.find_many([keymath.as_key(1)]) == [0]
        assert_consistent(engine._index)

    return check


@pytest.mark.parametrize("dirty", [False, True])
def test_a_shard_is_free_wherever_a_change_was_interrupted(
    engine: LocalStorageEngine, check: Callable[[], None], dirty: bool
) -> None:
    def change() -> None:
        if dirty:
            engine._index.control["dirty"] = 1
        with engine.change(0, timeout=0):
            pass

    assert interrupted_everywhere(change, check, may_keep=EXIT) > 60


def test_a_change_that_fails_may_be_interrupted_as_well(
    engine: LocalStorageEngine, check: Callable[[], None]
) -> None:
    def change() -> None:
        with pytest.raises(KeyError), engine.change(0, timeout=0):
            raise KeyError

    assert interrupted_everywhere(change, check, may_keep=EXIT) > 60


def test_a_lease_ends_wherever_its_taker_was_interrupted(
    engine: LocalStorageEngine, check: Callable[[], None]
) -> None:
    got: list[keeping.Leased | None] = []
    low, high = keymath.as_key(1)

    def none_left() -> None:
        for leased in got:
            assert leased is not None
            keeping.end_lease(engine, leased.shard, leased.slot)
        got.clear()
        assert keeping.end_dropped(engine, 0)
        assert engine.leases.open == 0
        check()

    def take() -> None:
        leased = keeping.lease(engine, low, high)
        got.append(leased)

    assert interrupted_everywhere(take, none_left, may_keep=EXIT) > 100
