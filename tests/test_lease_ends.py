"""Leases begin and end rightly, whatever others do meanwhile, whoever has the shard or dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from light_mem import maintenance
from light_mem.engine import keeping, writing
from light_mem.errors import LockTimeoutError
from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.index.locks import PathLock, lock_path
from tests.children import child, line
from tests.deaths import interleave
from tests.engine_helpers import Block, assert_consistent
from tests.retention_helpers import A, B, C, D, Store, Two, holds, lease, two

__all__ = ["two"]  # fixtures


def test_a_lease_whose_shard_is_not_to_be_had_ends_later(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    viewer, other = two
    leased = lease(viewer, A)
    other.rig.delete(A)

    def busy(*_: object, **__: object) -> None:
        raise LockTimeoutError("busy")

    with monkeypatch.context() as patch:
        patch.setattr(viewer.engine, "change", busy)
        viewer.engine.end_lease(leased)
    assert viewer.engine.leases.open == 1
    assert holds(viewer, leased, A)
    viewer.engine.end_lease(lease(viewer, B))
    assert viewer.engine.leases.open == 0
    assert other.states()[fmt.HELD - 1] == 0


def test_a_process_that_leaves_with_a_lease_it_cannot_end_leaves_as_the_dead_do(
    tmp_path: Path,
) -> None:
    viewer, other = Store(tmp_path / "store", 8), Store(tmp_path / "store", 8)
    viewer.write(A, B)
    leased = lease(viewer, A)
    other.rig.delete(A)
    lock = PathLock(lock_path(tmp_path / "store", "shard-000"))
    with lock.hold(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeping, "LOCK_TIMEOUT_SECONDS", 0)
        viewer.engine.end_lease(leased)
        viewer.engine.close()
    viewer.close()
    assert other.states()[fmt.HELD - 1] == 1
    assert other.engine.reclaim() == 1
    assert other.states()[fmt.HELD - 1] == 0
    other.close()


@pytest.mark.parametrize("change", ["evict", "delete and write", "view as well"])
def test_a_lease_is_of_the_right_bytes_whatever_happens_while_it_is_taken(
    two: Two, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process acts after each opcode of taking, and of ending, a lease; not while the
    shard is locked, when it would have to wait."""
    monkeypatch.setattr(writing, "ROOM_SECONDS", 0.01)  # a write beside leased blocks finds none
    viewer, other = two
    lock = PathLock(lock_path(viewer.engine.directory, "shard-000"))
    fresh, count = Block(9, 8), 0

    def act() -> None:
        nonlocal count
        try:
            with lock.hold(timeout=0):
                pass
        except LockTimeoutError:
            return
        count += 1
        if change == "evict":
            other.write(fresh)
        elif change == "delete and write":
            other.rig.delete(A)
            other.write(Block(7), Block(8), A)
        else:
            leased = other.engine.lease(*keymath.as_key(A.key))
            if leased is not None:
                other.engine.end_lease(leased)

    def take_and_end() -> bool:
        leased = viewer.engine.lease(*keymath.as_key(A.key))
        if leased is None:
            return False
        good = holds(viewer, leased, A)
        viewer.engine.end_lease(leased)
        assert good
        return True

    at, reached, results = 1, True, []
    while reached:
        other.engine.clear()
        other.write(A, B, C, D)
        result, reached = interleave(take_and_end, act, at)
        results.append(result)
        assert viewer.engine.leases.open == other.engine.leases.open == 0
        assert other.states()[fmt.HELD - 1] == 0
        assert_consistent(other.engine._index)
        at += 9
    assert count > 10
    assert True in results
    assert (False in results) == (change == "evict")


VIEWER = """
from light_mem.engine.local import LocalStorageEngine
from light_mem.index import keys as keymath
engine = LocalStorageEngine(path / "store", kind="client")
leased = [engine.lease(*keymath.as_key(key)) for key in (1, 2)]
say('leased')
time.sleep(60)
"""


def test_the_blocks_of_a_leaseholder_killed_with_sigkill_can_be_evicted(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", 8)
    store.write(A, B, C, D)
    with child(VIEWER, tmp_path) as process:
        assert line(process) == "leased"
        store.rig.find(C, D, touch=True)
        assert store.write(Block(5, 4)) == ["STORED"]
        assert store.stored(A, B, C, D) == [1, 2]
        store.rig.delete(B)
        assert store.states()[fmt.HELD - 1] == 1
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert store.write(Block(6, 2)) == ["STORED"]
    assert store.stored(A, Block(5), Block(6)) == [5, 6]  # A went at once, B's slots not yet
    assert store.write(Block(7, 8)) == ["STORED"]  # for want of room the dead are reclaimed
    assert store.states() == [0, 1, 0, 0]
    store.close()
    assert maintenance.verify(tmp_path / "store").clean
