"""What a worker claims: its own blocks first, others' where it has none, and reads ahead."""

from __future__ import annotations

import numpy as np
import pytest

from light_mem.engine.claiming import AHEAD_BLOCKS, BATCH_BLOCKS, BATCH_BYTES, LEAST_BYTES
from light_mem.engine.queue import WRITE_TURN
from light_mem.engine.table_layout import ABORTED, FINISHED, READ, WORKING, WRITE
from tests.queue_rig import MIB, WORKERS, Queued, queued

__all__ = ["queued"]  # fixtures

LEAST = LEAST_BYTES[WRITE] // MIB  # blocks of 1 MiB
WRITE_BATCH = BATCH_BYTES[WRITE] // MIB


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
    assert len(queued.queue.claim(1)) == WRITE_BATCH  # of 1 MiB
    cells = queued.push([1, 1], first=1000)
    queued.table.cells["nbytes"][cells] = 100 * MIB
    while (batch := queued.queue.claim(1)) and cells[0] not in batch:
        pass
    assert len(batch) <= WRITE_BATCH


# --- ahead ----------------------------------------------------------------------------------------

READ_BATCH = BATCH_BYTES[READ] // MIB  # blocks of 1 MiB


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
    assert queued.queue.claim(1) == writes[: 100 // WORKERS]
    assert min(queued.queue.claim_ahead(1)) >= 1000


def test_what_was_aborted_is_no_reason_to_claim_ahead(queued: Queued) -> None:
    aborted = queued.push([0] * 500, READ)
    queued.table.states[aborted] = ABORTED
    cells = queued.push([0] * 3, READ, first=500)
    assert queued.queue.claim_ahead(1) == []
    assert queued.queue.claim(1) == cells[:2]
