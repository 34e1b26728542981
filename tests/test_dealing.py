"""Who writes which blocks: shards have homes, others help where there is nothing else to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from light_mem.engine.claiming import AHEAD_BLOCKS, BATCH_BLOCKS, BATCH_BYTES, LEAST_BYTES
from light_mem.engine.dealing import deal
from light_mem.engine.queue import WRITE_TURN, TaskQueue
from light_mem.engine.table_layout import ABORTED, CELL, FINISHED, INITIAL, READ, WORKING, WRITE
from light_mem.engine.table_memory import Sizes
from light_mem.engine.task_table import TaskTable
from light_mem.index import keys as keymath
from light_mem.index.locks import RangeLock
from tests.conftest import wait_until
from tests.service_rig import rig

MIB = 1 << 20
LEAST = LEAST_BYTES[WRITE] // MIB  # blocks of 1 MiB
WORKERS = 2


@dataclass
class Queued:
    """A queue with nobody at it."""

    table: TaskTable
    queue: TaskQueue

    def push(self, homes: list[int], mode: int = WRITE, first: int = 0) -> list[int]:
        """Queue a block of 1 MiB for each of these homes; their cells."""
        cells = np.arange(first, first + len(homes), dtype=np.uint32)
        records = np.zeros(len(homes), CELL)
        records["mode"], records["nbytes"], records["home"] = mode, MIB, homes
        self.table.cells[cells] = records

        def publish() -> None:
            self.table.states[cells] = INITIAL

        self.queue.push(cells, mode, publish)
        return list(cells.tolist())


@pytest.fixture
def queued() -> Iterator[Queued]:
    table = TaskTable.create(
        Sizes(1, 64, 4096, 4096),
        store="",
        page_bytes=MIB,
        num_pages=1,
        pages_per_block=1,
        workers=WORKERS,
    )
    queue = TaskQueue(table, RangeLock(table.lock_path()))
    one = Queued(table, queue)
    del table, queue
    yield one
    one.queue.close()
    one.table.close()
    vars(one).clear()  # pytest keeps the object a while, and with it a mapping


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
    _, homes = dealt(np.arange(64) % 2, 2, 2, nbytes=16 * MIB)  # two blocks are a batch
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


# --- the queue ------------------------------------------------------------------------------------


def test_a_worker_takes_its_own_blocks_first_and_in_order(queued: Queued) -> None:
    cells = queued.push([1, 2] * (2 * LEAST))
    of_one, of_two = cells[::2], cells[1::2]
    claimed = queued.queue.claim(2)
    assert claimed
    assert claimed == of_two[: len(claimed)]
    assert queued.table.states[claimed].tolist() == [1] * len(claimed)
    assert queued.table.cells["worker"][claimed].tolist() == [2] * len(claimed)
    others = queued.queue.claim(1)
    assert others
    assert others == of_one[: len(others)]


def test_blocks_without_a_home_are_anybodys(queued: Queued) -> None:
    cells = queued.push([0, 1, 0, 2, 0], mode=READ)
    assert queued.queue.claim(1) == cells[:3]  # a fair share
    assert queued.queue.claim(1) == [cells[4]]
    assert queued.queue.claim(1) == [cells[3]]


def test_who_has_nothing_of_its_own_helps(queued: Queued) -> None:
    cells = queued.push([1] * 20)
    assert queued.queue.claim(2) == cells[:10]  # its fair share
    assert queued.queue.claim(1) == cells[10 : 10 + 5]
    assert queued.queue.claim(2) == cells[15 : 15 + LEAST]
    assert queued.queue.claim(2) == cells[15 + LEAST :]
    assert queued.queue.claim(1) == []
    assert queued.table.depth(WRITE) == 0


def test_every_block_is_claimed_once_whoever_asks(queued: Queued) -> None:
    rng = np.random.default_rng(3)
    cells = queued.push(rng.integers(0, 4, 2000).tolist())  # 3: of a worker that there is not
    claimed: list[int] = []
    while batch := queued.queue.claim(int(rng.integers(1, 3))):
        assert len(batch) <= BATCH_BLOCKS
        claimed += batch
        assert queued.table.waiting(WRITE) == 2000 - len(claimed)
    assert sorted(claimed) == cells
    assert queued.table.depth(WRITE) == 0


def test_the_blocks_of_a_stopped_worker_are_not_passed_over_for_good(queued: Queued) -> None:
    """However much another worker has of its own."""
    [old] = queued.push([1])
    room = WORKERS * AHEAD_BLOCKS
    passed = 0
    for turn in range(40):
        queued.push([1] * 16 + [2] * 16, first=1 + 32 * turn)
        batch = queued.queue.claim(2)
        queued.table.states[batch] = FINISHED
        if old in batch:
            break
        passed += len(batch)
    assert old in batch, "nobody ever did it"
    assert 0 < passed <= room


def test_what_was_aborted_is_passed_over_and_its_cell_may_come_again(queued: Queued) -> None:
    cells = queued.push([1, 1, 2, 2])
    queued.table.states[cells[0]] = ABORTED
    assert queued.queue.claim(1) == [cells[1]]
    queued.table.states[cells[1]] = FINISHED
    queued.push([1, 1])  # the same cells, while the head is still before those of worker 2
    assert queued.table.waiting(WRITE) == 4
    assert queued.queue.claim(1) == cells[:2]
    assert queued.queue.claim(2) == cells[2:]
    assert queued.table.depth(WRITE) == 0


@pytest.mark.parametrize("mode", [READ, WRITE])
@pytest.mark.parametrize("count", [1, AHEAD_BLOCKS * WORKERS, 3000])
def test_what_waits_behind_much_that_was_aborted_is_claimed_at_once(
    queued: Queued, mode: int, count: int
) -> None:
    """Who gets nothing goes to sleep until something more is queued."""
    aborted = queued.push([1] * count, mode)
    queued.table.states[aborted] = ABORTED
    cells = queued.push([2], mode, first=count)
    assert queued.queue.claim(1) == cells
    assert queued.queue.claim(1) == []
    assert queued.table.depth(mode) == 0


def test_a_batch_is_of_one_mode_whatever_old_entries_say(queued: Queued) -> None:
    """An entry stays when its block is aborted, and the cell may be another task's by then."""
    queued.table.header["workers"] = 1  # who may claim all of it
    old = queued.push([0, 0], READ)
    queued.table.states[old] = ABORTED
    writes = queued.push([0, 0], WRITE)  # the same cells
    reads = queued.push([0, 0], READ, first=2)
    assert queued.queue.claim(1) == reads
    assert queued.queue.claim(1) == writes
    assert queued.queue.claim(1) == []


def test_the_ring_may_go_round(queued: Queued) -> None:
    length = queued.table.ring_length
    done = 0
    for turn in range(2 * length // 1000 + 2):
        cells = queued.push([1 + turn % 2] * 1000)
        while batch := queued.queue.claim(1):
            queued.table.states[batch] = FINISHED
            done += len(batch)
        assert queued.table.states[cells].tolist() == [FINISHED] * 1000
    assert done > 2 * length


def test_no_more_than_a_batch_of_bytes_beyond_the_first_block(queued: Queued) -> None:
    queued.push([1] * 200)
    assert len(queued.queue.claim(1)) == 32  # of 1 MiB
    cells = queued.push([1, 1], first=1000)
    queued.table.cells["nbytes"][cells] = 100 * MIB
    while (batch := queued.queue.claim(1)) and cells[0] not in batch:
        pass
    assert len(batch) <= 32


# --- ahead ----------------------------------------------------------------------------------------

READ_BATCH = BATCH_BYTES // MIB  # blocks of 1 MiB


def test_reads_are_claimed_ahead_where_as_many_wait_for_each_worker(queued: Queued) -> None:
    cells = queued.push([0] * (2 * READ_BATCH), READ)
    assert queued.queue.claim_ahead(1) == cells[:READ_BATCH]
    assert queued.table.states[cells[:READ_BATCH]].tolist() == [WORKING] * READ_BATCH
    assert queued.queue.claim_ahead(1) == []
    assert queued.queue.claim_ahead(2) == []
    assert queued.queue.claim(2) == cells[READ_BATCH : READ_BATCH + READ_BATCH // 2]
    assert queued.table.waiting(READ) == READ_BATCH // 2


def test_of_short_blocks_a_batch_is_claimed_ahead_by_their_number(queued: Queued) -> None:
    cells = queued.push([0] * (WORKERS * BATCH_BLOCKS - 1), READ)
    queued.table.cells["nbytes"][cells] = 64
    assert queued.queue.claim_ahead(1) == []
    more = queued.push([0], READ, first=len(cells))
    queued.table.cells["nbytes"][more] = 64
    assert queued.queue.claim_ahead(1) == cells[:BATCH_BLOCKS]
    assert queued.queue.claim_ahead(2) == []


def test_a_long_block_is_not_claimed_ahead_where_it_is_the_only_one(queued: Queued) -> None:
    """It alone is a batch: the other worker, with nothing to do, is to read it."""
    cells = queued.push([0, 0], READ)
    queued.table.cells["nbytes"][cells] = 64 * MIB
    assert queued.queue.claim(1) == cells[:1]
    assert queued.queue.claim_ahead(1) == []
    assert queued.queue.claim(2) == cells[1:]


def test_no_write_is_claimed_ahead_nor_does_it_wait_for_good(queued: Queued) -> None:
    writes = queued.push([0] * 100)
    assert queued.queue.claim_ahead(1) == []
    queued.push([0] * 1000, READ, first=1000)
    claimed = 0
    while ahead := queued.queue.claim_ahead(1):
        assert min(ahead) >= 1000
        claimed += 1
    assert claimed == WRITE_TURN - 1
    assert queued.queue.claim(1) == writes[:32]
    assert min(queued.queue.claim_ahead(1)) >= 1000


def test_what_was_aborted_is_no_reason_to_claim_ahead(queued: Queued) -> None:
    aborted = queued.push([0] * 500, READ)
    queued.table.states[aborted] = ABORTED
    cells = queued.push([0] * 3, READ, first=500)
    assert queued.queue.claim_ahead(1) == []
    assert queued.queue.claim(1) == cells[:2]


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
