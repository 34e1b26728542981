"""An engine that leaves its store while other threads change it or look at it."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from light_mem import ServiceClosedError
from light_mem.engine import fence
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.shard_file import ShardFile
from light_mem.index import keys as keymath
from light_mem.index.leases import Leases
from light_mem.index.owners import Owners
from tests.conftest import wait_until
from tests.engine_helpers import Block, Rig, let_go, open_local
from tests.leaving_rig import engine, in_shard, lock_of, view
from tests.retention_helpers import keys_of

__all__ = ["engine"]  # fixtures

A, B, C, D = (Block(key) for key in range(1, 5))


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

    def acquire(by: object, timeout: float) -> None:
        waits.set()
        real(by, timeout)

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


def failing(patch: pytest.MonkeyPatch, step: str, before: Callable[[], object]) -> None:
    """A step of a view fails: `pieces` are read for its checksum, `read_only` is its map."""

    def fail(*_: object) -> None:
        before()
        raise OSError(errno.EMFILE, "too many open files")

    patch.setattr(ShardFile, step, fail)


@pytest.mark.parametrize("step", ["pieces", "read_only"])
@pytest.mark.parametrize("closes", [False, True])
def test_a_view_that_fails_leaves_no_lease_behind(
    engine: LocalStorageEngine, step: str, closes: bool
) -> None:
    block = in_shard(0)[0]
    other = open_local(engine.directory, 16, shards=2)
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, step, engine.close if closes else lambda: None)
        with pytest.raises(OSError, match="too many open files"):
            view(engine, block)
    assert (engine.leases.open, len(engine.leases.dropped)) == (0, 0)
    assert len(other.owners()) == (0 if closes else 1)
    assert not other._owners.records["leases"].any()
    assert Rig(other).delete(block) == 1
    assert other.stats()["used_slots"] == 15
    other.close()
    let_go(other)
