"""What a batch does to a shard at once is what the same changes do one by one."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from light_mem.index import keys as keymath
from light_mem.index.shard import Allocation, ShardIndex
from tests.engine_helpers import PAGE, assert_consistent, new_index, publish, replica, stored_keys

SLOTS = 64


def store(index: ShardIndex, keys: list[int], lengths: list[int], now: int) -> list[Allocation]:
    """Write a batch as a worker does; returns where it went."""
    with index.change():
        where = index.allocate_many(lengths, [])
        index.mark_many(where, owner=1)
    with index.change():
        publish(index, where, [(key, 0) for key in keys[: len(where)]], now)
    return where


@pytest.mark.parametrize("length", [1, 3])
def test_blocks_of_a_batch_lie_next_to_each_other(tmp_path: Path, length: int) -> None:
    file = new_index(tmp_path, SLOTS)
    where = store(replica(tmp_path, file), list(range(8)), [length] * 8, now=1)
    assert [w.runs for w in where] == [[(n * length, length)] for n in range(8)]
    assert_consistent(file)


def test_a_full_shard_gives_the_slots_of_the_oldest_blocks_in_their_order(tmp_path: Path) -> None:
    file = new_index(tmp_path, SLOTS)
    index = replica(tmp_path, file)
    first = store(index, list(range(16)), [4] * 16, now=100)
    for age, at in enumerate(np.random.default_rng(1).permutation(16).tolist()):
        index.uses[first[at].slot] = 1000 + age
    oldest = np.argsort([int(index.uses[w.slot]) for w in first])[:6]
    where = store(index, list(range(100, 106)), [4] * 6, now=5000)
    assert [w.slot for w in where] == [first[n].slot for n in oldest.tolist()]
    assert stored_keys(file) == {*range(16), *range(100, 106)} - set(oldest.tolist())
    assert_consistent(file)


def test_a_batch_that_finds_too_little_room_gets_what_there_is_in_its_order(
    tmp_path: Path,
) -> None:
    file = new_index(tmp_path, SLOTS)
    index = replica(tmp_path, file)
    with index.change():
        busy = index.allocate(SLOTS - 10, [])
        assert busy is not None
        index.mark(busy.runs, owner=2)
    where = store(index, list(range(6)), [3] * 6, now=1)
    assert [sum(n for _, n in w.runs) for w in where] == [3, 3, 3]
    with index.change():
        assert index.allocate_many([2, 2], [], evict=False) == []
    assert_consistent(file)


def test_a_batch_in_one_bucket_is_chained_and_cut_whole(tmp_path: Path) -> None:
    file = new_index(tmp_path, SLOTS)
    index = replica(tmp_path, file)
    by_bucket: dict[int, list[int]] = {}
    for key in range(5000):
        by_bucket.setdefault(keymath.mix_one(key, 0) & (file.buckets - 1), []).append(key)
    alike = next(keys for keys in by_bucket.values() if len(keys) >= 32)[:32]
    store(index, alike[:16], [4] * 16, now=1)
    assert_consistent(file)
    store(index, alike[16:], [4] * 16, now=2)  # evicts the whole chain, and makes it anew
    assert stored_keys(file) == set(alike[16:])
    assert_consistent(file)


def test_random_batches_of_two_processes_stay_consistent(tmp_path: Path) -> None:
    file = new_index(tmp_path, SLOTS)
    both = [replica(tmp_path, file), replica(tmp_path, file)]
    rng = np.random.default_rng(3)
    key = 0
    for now in range(1, 120):
        count = int(rng.integers(1, 9))
        uniform = rng.random() < 0.7
        lengths = (
            [int(rng.integers(1, 5))] * count if uniform else rng.integers(1, 5, count).tolist()
        )
        keys = list(range(key, key + count))
        key += count
        where = store(both[int(rng.integers(2))], keys, lengths, now)
        assert len(where) == count  # eviction finds room for all: they fit the shard together
        runs = sorted(run for w in where for run in w.runs)
        assert all(a + n <= b for (a, n), (b, _) in pairwise(runs))
        assert_consistent(file)
        assert set(keys) <= stored_keys(file)


def test_an_entry_that_is_no_plain_block_is_evicted_one_by_one(
    tmp_path: Path,
) -> None:
    file = new_index(tmp_path, SLOTS)
    index = replica(tmp_path, file)
    store(index, [1, 2, 3, 4], [2, 2, 2, 2], now=1)
    store(index, [5], [SLOTS - 8], now=2)
    index.entries["nbytes"][0] = 7 * PAGE  # says more pages than its run has
    where = store(index, [11, 12, 13, 14], [2] * 4, now=3)
    assert len(where) == 4
    assert {11, 12, 13, 14} <= stored_keys(file)
    assert_consistent(file)


def test_only_slots_that_this_owner_fills_are_marked_by_it(tmp_path: Path) -> None:
    file = new_index(tmp_path, SLOTS)
    index = replica(tmp_path, file)
    with index.change():
        where = index.allocate_many([2] * 6, [])
        for at, place in enumerate(where):
            index.mark(place.runs, owner=1 + at % 2)
        slots = [place.slot for place in where]
        index.give_back(slots[4])
        marked = [index.is_marked(slot, 1) for slot in slots]
        assert marked == [True, False, True, False, False, False]
        assert index.are_marked(slots, 1) == marked
        assert index.are_marked(slots[:2], 1) == marked[:2]
        for slot in slots[:4] + slots[5:]:
            index.give_back(slot)
    assert_consistent(file)


def test_a_control_page_that_says_too_little_raises_nothing(tmp_path: Path) -> None:
    file = new_index(tmp_path, SLOTS)
    index = replica(tmp_path, file)
    store(index, list(range(8)), [1] * 8, now=1)
    for name in ("blocks", "used_slots", "unlinks", "inserts"):
        file.control[name][0] = 0
    with index.change():
        for slot in index.find_many([(key, 0) for key in range(8)]):
            index.remove(slot)
    assert int(file.control["blocks"][0]) == 2**64 - 8
    with index.change():
        index.put_in_order()
    assert_consistent(file)
