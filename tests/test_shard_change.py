"""Whatever goes wrong where a change of a shard begins or ends: nothing of it stays held."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from light_mem.engine.fence import Fence
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.shard_file import ShardFile
from light_mem.errors import LockTimeoutError, ServiceClosedError
from light_mem.index.change import ShardChange
from light_mem.index.locks import PathLock
from light_mem.index.shard import ShardIndex
from tests.engine_helpers import Block, Rig, lent, open_local


class Around:
    """What a change is made within; notes what happens."""

    def __init__(self, steps: list[str], fails: str) -> None:
        self._steps, self._fails = steps, fails

    def _step(self, name: str) -> None:
        self._steps.append(name)
        if name == self._fails:
            self._fails = ""
            raise KeyError(name)

    def enter(self, change: int) -> None:
        self._step("enter")

    def begin(self) -> bool:
        self._step("begin")
        return True

    def end(self, is_whole: bool) -> None:
        self._step("end whole" if is_whole else "end broken")

    def leave(self, change: int) -> None:
        self._step("leave")


@pytest.mark.parametrize(
    ("fails", "steps"),
    [
        ("", ["enter", "begin", "body", "end whole", "leave"]),
        ("enter", ["enter", "leave"]),
        ("begin", ["enter", "begin", "leave"]),
        ("body", ["enter", "begin", "body", "end broken", "leave"]),
        ("end whole", ["enter", "begin", "body", "end whole", "leave"]),
        ("leave", ["enter", "begin", "body", "end whole", "leave", "leave"]),
    ],
)
def test_the_lock_is_free_whatever_fails(tmp_path: Path, fails: str, steps: list[str]) -> None:
    lock, seen = PathLock(tmp_path / "lock"), []
    around = Around(seen, fails)

    def change() -> None:
        with ShardChange(lock, around.begin, around.end, 1, around) as recovered:
            assert recovered
            with pytest.raises(LockTimeoutError):
                lock.acquire(0, 0)
            around._step("body")

    if fails:
        with pytest.raises(KeyError, match=fails):
            change()  # what was cut short is done again, once the traceback is dropped
    else:
        change()
    assert seen == steps
    with lock.hold(timeout=0):
        pass


def test_who_comes_too_late_to_a_fence_holds_it_not() -> None:
    fence = Fence()
    fence.enter(1)
    assert fence.is_held
    fence.leave(1)
    assert fence.shut(0)
    with pytest.raises(ServiceClosedError):
        fence.enter(2)
    fence.leave(2)
    assert not fence.is_held


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LocalStorageEngine]:
    engine = open_local(tmp_path / "store", 8)
    Rig(engine).write(Block(1))
    yield from lent(engine)


def test_what_fails_where_a_shard_was_put_in_order_leaves_it_to_the_next(
    engine: LocalStorageEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no device")

    with pytest.raises(KeyError), engine.change(0):
        raise KeyError  # as a death
    with monkeypatch.context() as patch:
        patch.setattr(ShardFile, "follow_keeps", fail)
        with pytest.raises(OSError, match="no device"), engine.change(0):
            pass
    index = engine._open.index(0)
    with index.change(timeout=0) as recovered:
        assert recovered


def test_an_engine_that_is_closed_where_a_change_fails_to_begin_closes_its_files(
    engine: LocalStorageEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def close_and_fail(_: ShardIndex) -> bool:
        engine.close()
        assert engine._open.files  # a change of this very thread is under way
        raise KeyError

    with monkeypatch.context() as patch:
        patch.setattr(ShardIndex, "_begin", close_and_fail)
        with pytest.raises(KeyError), engine.change(0):
            pass
    assert not engine._open.files
