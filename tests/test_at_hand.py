"""What mutants of short writes in large shards, and of `create` of few blocks, survived."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from light_mem.engine.base import Outcome
from light_mem.engine.dealing import deal, deal_few
from light_mem.engine.open_store import OpenStore
from light_mem.engine.table_layout import ABORTED, CELL, INITIAL, WRITE
from light_mem.engine.task_table import TaskTable
from light_mem.errors import TaskTableFullError
from light_mem.index.replica import SpaceReplica
from tests.engine_helpers import Block
from tests.queue_rig import Queued, queued
from tests.service_rig import rig
from tests.test_order_ahead import drained, filled
from tests.test_scans_ahead import Scans
from tests.test_write_now_large import another, now, opened

__all__ = ["queued"]  # a fixture


def test_candidates_of_a_shard_of_several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("light_mem.index.runs.PIECE", 16)
    shard = filled(50)
    assert shard.order.sort_out(frozenset(), shard.clock + 1)
    assert drained(shard) == list(range(50))
    shard = filled(50)
    assert shard.order.oldest_many(50) == list(range(50))


def test_older_candidates_that_come_late_bring_their_own_horizon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("light_mem.index.order.MIN_BATCH", 4)
    shard = filled(16)
    assert shard.order.sort_out(frozenset(), shard.clock + 1)  # 0 to 3
    shard.use(1)
    monkeypatch.setattr("light_mem.index.order.MIN_BATCH", 16)
    assert shard.order.oldest() == 0  # by a scan of all
    shard.drop(0)
    assert drained(shard) == [2, 3]  # 1 is younger than what these do not say


def test_how_much_is_sorted_out_follows_from_all_that_may_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("light_mem.index.order.MIN_BATCH", 2)
    shard = filled(64)
    moment = shard.clock + 1
    for slot in range(32, 64):
        shard.use(slot)
    assert shard.order.sort_out(frozenset(), moment)
    assert drained(shard) == list(range(8))


def test_a_shard_that_is_no_longer_near_under_its_lock_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, r, ahead = opened(tmp_path, 8)
    with monkeypatch.context() as patch:
        patch.setattr(OpenStore, "is_near", lambda *_: True)
        assert now(r, Block(1), ahead) is None
    assert ahead.refusals == 1
    assert not engine._index.control["dirty"].any()
    engine.prepare_shard(0)
    assert now(r, Block(1), ahead) is Outcome.STORED
    engine._index.control["epoch"] -= 1  # made anew meanwhile
    assert now(r, Block(2), ahead) is None
    assert not engine._index.control["dirty"].any()
    engine.close()


def test_a_shard_that_is_not_near_is_not_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, r, ahead = opened(tmp_path, 8)

    def change(*_: object) -> None:
        raise AssertionError("its lock was asked for")

    monkeypatch.setattr(OpenStore, "change_at_hand", change)
    assert not SpaceReplica.is_near.fget(engine._open.index(0)._space)  # type: ignore[attr-defined]
    assert now(r, Block(1), ahead) is None
    engine.close()


def test_a_shard_without_candidates_is_no_reason_for_many_pieces(tmp_path: Path) -> None:
    """The free space is in more pieces than a block should have: the workers evict for it."""
    engine, r, ahead = opened(tmp_path, 64, block_pages=16)
    r.write(*[Block(n) for n in range(64)])
    other, others = another(tmp_path)
    others.delete(*[Block(n) for n in range(0, 64, 2)])
    engine.prepare_shard(0)
    engine._open.index(0)._order._ahead = None
    assert now(r, Block(100, 16), ahead) is None
    assert ahead.scan is not None
    other.close()
    engine.close()


def test_a_scan_nobody_wrote_after_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    scans = Scans(monkeypatch)
    scans.ahead.start()
    scans.ahead.wrote(0)
    pauses = []
    for _ in range(3):
        scans.ahead.refused(0)
        assert scans.settle() == [0]
        pauses.append(scans.ahead._pauses[0])
        scans.clock.now += pauses[-1]
    assert pauses == [10, 20, 40]
    scans.ahead.close()


class Active:
    """In place of a table's marks of active rows: notes what else is there when one is set."""

    def __init__(self, table: TaskTable) -> None:
        self.states, self.rows = table.states[8:10], table.rows[3:4]
        self.seen: list[tuple[int, int, bytes, tuple[int, ...]]] = []

    def __setitem__(self, row: int, mode: int) -> None:
        self.seen.append((row, mode, bytes(self.states), self.rows[0].tolist()[2:5]))


def test_a_task_is_in_the_table_before_it_counts_as_active(queued: Queued) -> None:
    table = queued.table
    table.fill(3, 12345, 8, np.ones(2, CELL).tobytes(), 4, np.array([7, 9], np.uint32))
    assert int(table.rows["created"][3]) == 12345
    assert table.pages[3:7].tolist() == [0, 7, 9, 0]
    assert table.cells["low"][7:11].tolist() == [0, 1, 1, 0]
    active = Active(table)
    real, table._active_bytes = table._active_bytes, active  # type: ignore[assignment]
    table.begin(3, 8, bytes([ABORTED, INITIAL]), WRITE)
    table._active_bytes = real
    assert active.seen == [(3, WRITE, bytes([ABORTED, INITIAL]), (0, 8, 2))]
    del table, active.states, active.rows  # what pytest keeps of this would keep the memory


def test_who_queues_wakes_the_workers_also_when_a_signal_raises(
    queued: Queued, monkeypatch: pytest.MonkeyPatch
) -> None:
    woken: list[int] = []
    monkeypatch.setattr(queued.table.futex, "wake", lambda at, count: woken.append(count))

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        queued.queue.push([1, 2], WRITE, interrupted)
    assert len(woken) == 1
    monkeypatch.undo()


def test_the_number_of_work_begins_anew(queued: Queued) -> None:
    queued.table.header["work_seq"] = 2**32 - 1
    queued.table.count_work()
    assert queued.table.work_seq == 0


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_as_many_shards_as_workers(workers: int) -> None:
    shards, nbytes = [0] * 5 + [workers - 1] * 2, [100] * 7
    order, homes = deal(np.array(shards), np.array(nbytes), workers, workers)
    assert deal_few(shards, nbytes, workers, workers) == (order.tolist(), homes.tolist())


def test_a_read_that_finds_no_room_dropped_nothing(tmp_path: Path) -> None:
    options = {"max_blocks": 2, "create_timeout": 0.0, "small_read_bytes": 0}
    with rig(tmp_path, run=False, small_write_bytes=0, **options) as r:
        kept = r.service.create("write", [1, 2], [0, 1])
        with pytest.raises(TaskTableFullError):
            r.service.create("write", [3, 4], [2, 3])
        assert r.service.stats()["dropped_stores"] == 2
        r.service._engine.lookup.find_mixed = lambda keys, nbytes=None: [0] * len(keys.pairs)
        with pytest.raises(TaskTableFullError):
            r.service.create("read", [5, 6], [2, 3])
        assert r.service.stats()["dropped_stores"] == 2
        del kept
