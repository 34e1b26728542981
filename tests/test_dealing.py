"""Who is to write which blocks, and who is woken: shards have homes, a worker wakes others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from light_mem.engine.claiming import BATCH_BLOCKS
from light_mem.engine.dealing import deal
from light_mem.engine.queue import TaskQueue
from light_mem.index import keys as keymath
from light_mem.index.locks import RangeLock
from tests.conftest import wait_until
from tests.queue_rig import MIB, WORKERS, Queued, queued
from tests.service_rig import rig

__all__ = ["queued"]  # fixtures


# --- the order ------------------------------------------------------------------------------------


def dealt(
    shards: npt.NDArray[np.int64], num_shards: int, workers: int, nbytes: int = 4096
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    order, homes = deal(shards, np.full(len(shards), nbytes), num_shards, workers)
    assert sorted(order.tolist()) == list(range(len(shards)))  # each block once
    assert set(homes.tolist()) <= set(range(1, workers + 1))
    return shards[order], homes


@pytest.mark.parametrize(("num_shards", "workers"), [(1, 1), (2, 2), (4, 2), (4, 3), (64, 5)])
def test_a_shard_has_one_home_whatever_else_is_written(num_shards: int, workers: int) -> None:
    rng = np.random.default_rng(1)
    home: dict[int, int] = {}
    for count in (1, 2, 7, 300):
        shards, homes = dealt(rng.integers(0, num_shards, count), num_shards, workers)
        for shard, its_home in zip(shards.tolist(), homes.tolist(), strict=True):
            assert home.setdefault(shard, its_home) == its_home
    assert set(home.values()) == set(range(1, workers + 1))
    assert set(home) == set(range(num_shards))


@pytest.mark.parametrize(("num_shards", "workers"), [(1, 2), (3, 8), (1, 127)])
def test_workers_share_the_shards_evenly_where_there_are_fewer(
    num_shards: int, workers: int
) -> None:
    count = 1000
    _, homes = dealt(np.random.default_rng(2).integers(0, num_shards, count), num_shards, workers)
    of_each = np.bincount(homes, minlength=workers + 1)[1:]
    assert of_each.min() >= count // workers
    assert of_each.max() <= -(-count // workers)


def test_batches_of_the_workers_come_in_turn_and_are_of_one_shard() -> None:
    shards = np.arange(8 * BATCH_BLOCKS) % 4  # each twice as long as a batch
    dealt_shards, homes = dealt(shards, 4, 2)
    batches = dealt_shards.reshape(-1, BATCH_BLOCKS)
    assert (batches == batches[:, :1]).all()
    assert homes.reshape(-1, BATCH_BLOCKS)[:, 0].tolist() == [1, 2] * 4


def test_long_blocks_are_dealt_by_their_bytes() -> None:
    _, homes = dealt(np.arange(64) % 2, 2, 2, nbytes=32 * MIB)  # two blocks are a batch
    assert homes.tolist() == [1, 1, 2, 2] * 16


def test_a_task_is_queued_by_the_homes_of_its_shards(tmp_path: Path) -> None:
    with rig(tmp_path, pages=64, page_bytes=64, slots=1024, shards=4, workers=2, run=False) as r:
        r.service.create("write", [f"old {n}" for n in range(5)], range(5))  # cells begin later
        task = r.service.create("write", [f"key {n}" for n in range(50)], range(50))
        reading = r.service.create("read", ["key 1"], [60])
        assert not task.ready()
        assert reading.ready()
        table = r.service._session.table
        cells = table.cells[5:55]
        keys = np.stack([cells["low"], cells["high"]], axis=1)
        shards = keymath.shards_of(keymath.mix(keys), 4)
        assert cells["home"].tolist() == (1 + shards // 2).tolist()
        assert set(cells["home"].tolist()) == {1, 2}


# --- who is woken ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("cores", "woken", "left"), [(WORKERS, 1, 4), (WORKERS + 1, 5, 0)])
def test_a_caller_with_no_core_to_spare_wakes_one_worker(
    queued: Queued, monkeypatch: pytest.MonkeyPatch, cores: int, woken: int, left: int
) -> None:
    """Who wakes the others: else one of them would run on the caller's core."""
    monkeypatch.setattr("light_mem.engine.queue._cores", lambda: cores)
    queue = TaskQueue(queued.table, RangeLock(queued.table.lock_path()))
    mine = Queued(queued.table, queue)
    counts: list[int] = []
    monkeypatch.setattr(queued.table.futex, "wake", lambda _, count=-1: counts.append(count))
    mine.push([0] * 5)
    assert counts == [woken]
    mine.push([0], first=5)
    assert counts == [woken, 1]
    queue.wake_others()
    queue.wake_others()  # the one that was woken by the first
    assert counts == [woken, 1] + [left] * bool(left)
    counts.clear()
    queue.wake_all()
    assert counts == [-1]
    while queue.claim(1):
        pass
    queue.wake_all()
    assert counts == [-1]  # nothing waits
    queue.close()


def asleep(pid: int) -> bool:
    """Whether a worker waits for work."""
    return "futex" in Path(f"/proc/{pid}/wchan").read_text()


def test_a_worker_that_was_woken_wakes_the_others(tmp_path: Path) -> None:
    """Both have a part of a task that one was woken for."""
    with rig(tmp_path, pages=4096, slots=8192, workers=2, shards=2) as r:
        written = r.service._session.table.workers["blocks_written"][1:3]
        r.service._session.queue._has_cores = False
        try:
            wait_until(lambda: all(map(asleep, r.service.worker_pids)))
        except (OSError, AssertionError):
            pytest.skip("the kernel does not tell what a process waits for")
        for attempt in range(3):
            wait_until(lambda: all(map(asleep, r.service.worker_pids)))
            before = written.copy()
            first = 100_000 * attempt
            task = r.service.create("write", list(range(first, first + 4096)), range(4096))
            assert task.wait(60)
            if (written > before).all():
                return
        pytest.fail("one worker did all of three tasks")
