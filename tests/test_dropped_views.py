"""Views that were dropped and not closed: their leases end, and nobody waits for that."""

from __future__ import annotations

import gc
import threading
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from light_mem import LeaseLimitError
from light_mem.engine import member, pool
from light_mem.engine.local import LocalStorageEngine
from light_mem.errors import LockTimeoutError
from tests.conftest import wait_until
from tests.engine_helpers import Block, Rig, let_go, open_local
from tests.leaving_rig import engine, in_shard, lock_of, view
from tests.service_rig import rig

__all__ = ["engine"]  # fixtures

Change = tuple[int, float, int]  # shard, timeout, thread


def changes(engine: LocalStorageEngine, patch: pytest.MonkeyPatch) -> list[Change]:
    """The changes that an engine begins from now on."""
    seen: list[Change] = []
    real = engine.change

    def change(shard: int, timeout: float = 10.0) -> AbstractContextManager[object]:
        seen.append((shard, timeout, threading.get_ident()))
        return real(shard, timeout)

    patch.setattr(engine, "change", change)
    return seen


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
