"""An engine that leaves its store while other threads change it, look at it, or drop views."""

from __future__ import annotations

import errno
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from light_mem import LeaseLimitError, ServiceClosedError, maintenance
from light_mem.engine import fence, member, pool
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.shard_file import ShardFile
from light_mem.errors import LockTimeoutError
from light_mem.index import keys as keymath
from light_mem.index.leases import Leases
from light_mem.index.locks import PathLock, lock_path
from light_mem.index.owners import Owners
from light_mem.views import BlockView, open_view
from tests.conftest import wait_until
from tests.engine_helpers import Block, Rig, let_go, open_local
from tests.retention_helpers import keys_of
from tests.service_rig import rig

A, B, C, D = (Block(key) for key in range(1, 5))
Change = tuple[int, float, int]  # shard, timeout, thread


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LocalStorageEngine]:
    """On a store of two shards with blocks in both."""
    engine = open_local(tmp_path / "store", 16, shards=2)
    Rig(engine).write(*(Block(key) for key in range(1, 17)))
    yield engine
    engine.close()
    let_go(engine)
    assert maintenance.verify(tmp_path / "store").clean


def in_shard(shard: int) -> list[Block]:
    """Blocks of the fixture's store that are in one of its shards."""
    found = [
        Block(key)
        for key in range(1, 17)
        if keymath.shard_of(keymath.mix_one(*keymath.as_key(key)), 2) == shard
    ]
    assert len(found) > 3
    return found


def view(engine: LocalStorageEngine, block: Block) -> BlockView:
    found = open_view(engine, *keymath.as_key(block.key))
    assert found is not None
    return found


def lock_of(engine: LocalStorageEngine, shard: int) -> PathLock:
    return PathLock(lock_path(engine.directory, f"shard-{shard:03}"))


@contextmanager
def running(call: Callable[[], object]) -> Iterator[list[object]]:
    """A thread that makes a call; at the end it is joined, and its result or error in the list."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield results
    finally:
        thread.join()


def changes(engine: LocalStorageEngine, patch: pytest.MonkeyPatch) -> list[Change]:
    """The changes that an engine begins from now on."""
    seen: list[Change] = []
    real = engine.change

    def change(shard: int, timeout: float = 10.0) -> AbstractContextManager[object]:
        seen.append((shard, timeout, threading.get_ident()))
        return real(shard, timeout)

    patch.setattr(engine, "change", change)
    return seen


# --- threads that come too late -------------------------------------------------------------------


@pytest.mark.parametrize("what", ["lease", "delete", "pin", "clear"])
def test_who_waited_for_a_shard_while_the_store_was_left_changes_nothing(
    engine: LocalStorageEngine, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    block = in_shard(0)[0]
    low, high = keymath.as_key(block.key)
    calls: dict[str, Callable[[], object]] = {
        "lease": lambda: engine.lease(low, high),
        "delete": lambda: engine.delete(keys_of(block)),
        "pin": lambda: engine.pin(keys_of(block)),
        "clear": engine.clear,
    }
    files = [engine.directory / name for name in ("index", "owners", "shard-000.slots")]
    waits = threading.Event()
    lock = engine._open.index(0)._lock
    real = lock.acquire

    def acquire(timeout: float) -> None:
        waits.set()
        real(timeout)

    held = ExitStack()
    held.enter_context(lock_of(engine, 0).hold())
    monkeypatch.setattr(lock, "acquire", acquire)
    with running(calls[what]) as results, held:
        assert waits.wait(20)
        engine.close()
        assert int(engine._index.header["clean"][0]) == 1
        left = [file.read_bytes() for file in files]
    [error] = results
    assert isinstance(error, ServiceClosedError)
    assert [file.read_bytes() for file in files] == left
    assert not engine._open.files


def test_who_leaves_waits_for_changes_that_have_begun_and_lets_them_lease_nothing(
    engine: LocalStorageEngine,
) -> None:
    slot = engine.lookup.find_one(*keymath.as_key(in_shard(0)[0].key))
    order: list[object] = []

    def change() -> None:
        with engine.change(0) as (index, _):
            begun.set()
            wait_until(lambda: engine._open._fence.is_shut)
            order.append(engine.leases.take(0, slot))
            index.control["removals"] += 7
            go_on.wait(20)
            order.append("changed")

    begun, go_on = threading.Event(), threading.Event()
    with running(change):
        assert begun.wait(20)
        with running(lambda: (engine.close(), order.append("left"))):
            wait_until(lambda: order)
            assert int(engine._index.header["clean"][0]) == 0
            go_on.set()
    assert order == [False, "changed", "left"]
    assert int(engine._index.header["clean"][0]) == 1
    assert int(engine._index.control["dirty"].sum()) == 0
    assert engine.leases.open == 0


def test_an_engine_that_is_closed_in_the_middle_of_its_own_change_does_not_wait_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the collector finds a service in there."""
    engine = open_local(tmp_path / "store", 8)
    Rig(engine).write(A)
    other = open_local(tmp_path / "store", 8)
    monkeypatch.setattr(fence.time, "sleep", lambda _: pytest.fail("waited"))
    with engine.change(0):
        engine.close()
    assert other.owners() == []
    assert other.reclaim() == 1  # it left as the dead do
    other.close()
    assert int(other._index.header["clean"][0]) == 1
    let_go(engine, other)


def test_leases_are_closed_once_and_only_when_none_is_left(tmp_path: Path) -> None:
    owners = Owners(tmp_path)
    leases = Leases(owners, owners.join("test").number)
    assert leases.take(0, 1)
    assert not leases.close()
    assert leases.take(0, 2)
    for slot in (1, 2):
        leases.ends(0, slot)
        leases.forget_own(0, slot)
    assert [leases.close(), leases.close()] == [True, False]
    assert not leases.take(0, 1)
    assert not owners.records["leases"].any()
    owners.close()
    let_go(leases, owners)


def test_a_closed_file_of_a_shard_shows_nothing(engine: LocalStorageEngine) -> None:
    file = engine.file(0)
    file.read_only(0, 1)
    engine.close()
    with pytest.raises(ServiceClosedError):
        file.read_only(0, 1)
    with pytest.raises(ServiceClosedError):
        engine.file(0)


# --- errors after the lease was taken -------------------------------------------------------------


def failing(patch: pytest.MonkeyPatch, at: int, before: Callable[[], object]) -> None:
    """The map of a view fails at the n-th call: for the checksum, for the view itself."""
    real, calls = ShardFile.read_only, iter(range(1, 100))

    def read_only(self: ShardFile, start: int, length: int) -> npt.NDArray[np.uint8]:
        if next(calls) == at:
            before()
            raise OSError(errno.EMFILE, "too many open files")
        return real(self, start, length)

    patch.setattr(ShardFile, "read_only", read_only)


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("closes", [False, True])
def test_a_view_that_fails_leaves_no_lease_behind(
    engine: LocalStorageEngine, at: int, closes: bool
) -> None:
    block = in_shard(0)[0]
    other = open_local(engine.directory, 16, shards=2)
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, at, engine.close if closes else lambda: None)
        with pytest.raises(OSError, match="too many open files"):
            view(engine, block)
    assert (engine.leases.open, len(engine.leases.dropped)) == (0, 0)
    assert len(other.owners()) == (0 if closes else 1)
    assert not other._owners.records["leases"].any()
    assert Rig(other).delete(block) == 1
    assert other.stats()["used_slots"] == 15
    other.close()
    let_go(other)


# --- views that were dropped ----------------------------------------------------------------------


def drop(engine: LocalStorageEngine, blocks: list[Block]) -> None:
    views = [view(engine, block) for block in blocks]
    del views
    gc.collect()


def test_dropped_views_of_a_shard_whose_holder_is_stopped_delay_nobody(
    engine: LocalStorageEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, free = in_shard(0), in_shard(1)
    drop(engine, stuck[:3])
    assert len(engine.leases.dropped) == 3
    seen = changes(engine, monkeypatch)
    with lock_of(engine, 0).hold():
        view(engine, free[0]).close()
        assert [each[:2] for each in seen] == [(0, 0), (1, 10), (1, 10)]
        assert len(engine.leases.dropped) == 3
        seen.clear()
        engine.close()
        assert [each[:2] for each in seen] == [(0, 1)]
    monkeypatch.undo()


def test_dropped_views_of_a_shard_end_in_one_change(
    engine: LocalStorageEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, gone = in_shard(0)[:2]
    drop(engine, [block, block, gone])
    Rig(engine).delete(gone)
    seen = changes(engine, monkeypatch)
    assert engine.leases.open == 3
    engine.end_dropped()
    assert [each[:2] for each in seen] == [(0, 0)]
    assert engine.leases.open == 0
    assert not engine._owners.records["leases"].any()
    assert engine.stats()["used_slots"] == 15
    engine.end_dropped()
    assert len(seen) == 1
    monkeypatch.undo()


def test_dropped_views_that_wait_are_no_reason_to_refuse_one(
    engine: LocalStorageEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a shard may be leased; somebody has it for the moment when the next view comes."""
    drop(engine, in_shard(0)[:2])
    real = engine.change

    def change(shard: int, timeout: float = 10.0) -> AbstractContextManager[object]:
        if not timeout:
            raise LockTimeoutError("busy for a moment")
        return real(shard, timeout)

    monkeypatch.setattr(engine, "change", change)
    monkeypatch.setattr(engine._open.index(0).retention, "limit", 2)
    one, another = (view(engine, block) for block in in_shard(0)[2:4])
    with pytest.raises(LeaseLimitError):
        view(engine, in_shard(0)[0])
    one.close()
    another.close()
    assert (engine.leases.open, len(engine.leases.dropped)) == (0, 0)
    monkeypatch.undo()


def test_the_last_view_of_a_closed_engine_may_go_while_its_shard_is_held(
    engine: LocalStorageEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the very thread that holds it: the collector may run anywhere."""
    block = in_shard(0)[0]
    last = view(engine, block)
    other = open_local(engine.directory, 16, shards=2)
    engine.close()
    assert len(other.owners()) == 1
    Rig(other).delete(block)
    seen = changes(engine, monkeypatch)
    with other.change(0):
        del last
        gc.collect()
        wait_until(lambda: seen)
        assert len(other.owners()) == 1
    wait_until(lambda: not other.owners())
    assert [each[0] for each in seen] == [0]
    assert seen[0][2] != threading.get_ident()
    wait_until(lambda: not engine._open.files)
    assert other.stats()["used_slots"] == 15
    assert not other._owners.records["leases"].any()
    other.close()
    monkeypatch.undo()
    let_go(other)


def test_views_of_a_closed_engine_end_though_there_are_no_more_threads(
    engine: LocalStorageEngine,
) -> None:
    first, second = (view(engine, block) for block in in_shard(0)[:2])
    other = open_local(engine.directory, 16, shards=2)
    engine.close()

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(member._thread, "start_new_thread", refuse)
        del first
        gc.collect()
    assert len(engine.leases.dropped) == 1
    del second
    gc.collect()
    wait_until(lambda: not other.owners())
    assert not other._owners.records["leases"].any()
    wait_until(lambda: not engine._open.files)
    other.close()
    let_go(other)


def test_a_server_that_drops_a_view_and_views_no_more_gives_its_slots_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_ROUND_SECONDS", 0.02)
    with rig(tmp_path) as r:
        r.write(["a"], [0])
        last = r.service.view("a")
        assert last is not None
        r.service.delete("a")
        assert r.service.stats()["used_slots"] == 1
        del last
        gc.collect()
        wait_until(lambda: r.service.stats()["used_slots"] == 0)
