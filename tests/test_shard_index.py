"""Changes of one shard: allocate, publish, remove, evict; replicas; damage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from light_mem.errors import LockTimeoutError
from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.index.allocation import MAX_PIECES
from light_mem.index.file import IndexFile
from light_mem.index.recovery import states_of
from light_mem.index.replica import SpaceReplica
from light_mem.index.shard import ShardIndex
from tests.engine_helpers import (
    assert_consistent,
    let_go,
    new_index,
    publish,
    put,
    replica,
    stored_keys,
)

SLOTS = 24


@pytest.fixture
def file(tmp_path: Path) -> Iterator[IndexFile]:
    file = new_index(tmp_path, SLOTS)
    yield file
    let_go(file)


@pytest.fixture
def index(tmp_path: Path, file: IndexFile) -> Iterator[ShardIndex]:
    index = replica(tmp_path, file)
    yield index
    let_go(index)


def find(index: ShardIndex, key: int) -> int | None:
    return index.find(*keymath.as_key(key))


def state(file: IndexFile, slot: int) -> int:
    return int(states_of(file.entries)[slot])


# --- one block ------------------------------------------------------------------------------------


def test_a_block_is_found_only_after_it_is_published(file: IndexFile, index: ShardIndex) -> None:
    with index.change():
        where = index.allocate(3, [])
        assert where is not None
        assert state(file, where.slot) == fmt.FREE
        index.mark(where.runs, owner=5)
        assert state(file, where.slot) == fmt.WRITING
        assert index.is_marked(where.slot, 5)
        assert not index.is_marked(where.slot, 6)
        assert find(index, 77) is None
        publish(index, [where], [(77, 0)], now=2)
        assert find(index, 77) == where.slot
        assert not index.is_marked(where.slot, 5)
    assert_consistent(file)
    assert int(file.control["inserts"][0]) == 1


def test_a_block_given_back_leaves_nothing(file: IndexFile, index: ShardIndex) -> None:
    with index.change():
        where = index.allocate(SLOTS, [])
        assert where is not None
        index.mark(where.runs, owner=1)
        assert index.allocate(1, []) is None
        index.give_back(where.slot)
        assert index.allocate(SLOTS, []) is not None
    with index.change():  # the last one was never marked: the entries never showed it
        pass
    assert not states_of(file.entries).any()


def test_every_change_of_a_slot_is_another_generation(file: IndexFile, index: ShardIndex) -> None:
    tags = [int(file.entries["tag"][0])]
    with index.change():
        for key in range(3):
            assert put(index, key, SLOTS) == 0
            tags.append(int(file.entries["tag"][0]))
            index.remove(0)
            tags.append(int(file.entries["tag"][0]))
    generations = [tag >> fmt.GENERATION_SHIFT for tag in tags]
    assert generations == sorted(set(generations))


def test_a_generation_wraps_without_touching_state_and_owner(
    file: IndexFile, index: ShardIndex
) -> None:
    file.entries["tag"][0] = fmt.make_tag(fmt.FREE, 0, fmt.GENERATION_MASK)
    with index.change():
        assert put(index, 1, SLOTS) == 0
        assert int(file.entries["tag"][0]) == fmt.make_tag(fmt.LIVE, 0, 0)
        index.remove(0)
    assert int(file.entries["tag"][0]) == fmt.make_tag(fmt.FREE, 0, 1)


# --- room -----------------------------------------------------------------------------------------


def test_a_block_lies_in_several_runs_when_free_space_is_in_pieces(
    file: IndexFile, index: ShardIndex
) -> None:
    with index.change():
        slots = [put(index, key, 2) for key in range(SLOTS // 2)]
        for key in (1, 3, 5):
            index.remove(slots[key])
        evicted: list[int] = []
        where = index.allocate(5, evicted)
        assert where is not None
        assert where.runs == [(2, 1), (6, 2), (10, 2)]
        assert not evicted
        index.mark(where.runs, owner=1)
        publish(index, [where], [(99, 0)], now=1)
    assert [state(file, slot) for slot in (2, 6, 10)] == [fmt.LIVE, fmt.EXTENT, fmt.EXTENT]
    assert_consistent(file)
    with index.change():
        index.remove(where.slot)
    assert_consistent(file)
    assert stored_keys(file) == {0, 2, 4, *range(6, SLOTS // 2)}


def test_a_block_in_too_many_pieces_evicts_until_it_fits_better(tmp_path: Path) -> None:
    file = new_index(tmp_path, 64)
    index = replica(tmp_path, file)
    with index.change():
        slots = [put(index, key, 1) for key in range(64)]
        for key in range(0, 64, 2):
            index.remove(slots[key])
        evicted: list[int] = []
        where = index.allocate(MAX_PIECES + 4, evicted)
        assert where is not None
        assert len(where.runs) <= MAX_PIECES
        # The oldest go, each of which joins two holes.
        assert evicted == slots[1 : 2 * len(evicted) : 2]
        assert evicted
        index.mark(where.runs, owner=1)
        index.give_back(where.slot)
    assert_consistent(file)


def test_the_least_recently_used_blocks_make_room(file: IndexFile, index: ShardIndex) -> None:
    with index.change():
        slots = [put(index, key, 2) for key in range(SLOTS // 2)]
    file.uses[slots[0]] = 2 * 10**18
    with index.change():
        evicted: list[int] = []
        where = index.allocate(4, evicted)
        assert where is not None
        assert evicted == [slots[1], slots[2]]
        index.mark(where.runs, owner=1)
    assert stored_keys(file) == {0, *range(3, SLOTS // 2)}
    assert int(file.control["evictions"][0]) == 2


def test_blocks_being_written_are_never_evicted(file: IndexFile, index: ShardIndex) -> None:
    with index.change():
        writing = index.allocate(SLOTS - 4, [])
        assert writing is not None
        index.mark(writing.runs, owner=1)
        put(index, 1, 2)
        put(index, 2, 2)
        evicted: list[int] = []
        assert index.allocate(5, evicted) is None
        assert len(evicted) == 2  # what could go has gone
        assert index.allocate(4, evicted) is not None
    assert index.is_marked(writing.slot, 1)


def test_a_block_larger_than_the_shard_evicts_nothing(file: IndexFile, index: ShardIndex) -> None:
    with index.change():
        for key in range(SLOTS):
            put(index, key, 1)
        evicted: list[int] = []
        assert index.allocate(SLOTS + 1, evicted) is None
    assert not evicted
    assert len(stored_keys(file)) == SLOTS


def test_clear_takes_out_what_is_stored_and_leaves_what_is_being_written(
    file: IndexFile, index: ShardIndex
) -> None:
    with index.change():
        gone = [put(index, 1, 3), put(index, 2, 1)]
        writing = index.allocate(5, [])
        assert writing is not None
        index.mark(writing.runs, owner=4)
        assert sorted(index.clear()) == sorted(gone)
        assert index.is_marked(writing.slot, 4)
        assert int(file.control["used_slots"][0]) == 5
        publish(index, [writing], [(3, 0)], now=1)
    assert stored_keys(file) == {3}
    assert int(file.control["removals"][0]) == 2
    assert_consistent(file)


# --- replicas -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_replicas_used_in_turns_see_one_shard(tmp_path: Path, file: IndexFile, seed: int) -> None:
    rng = np.random.default_rng(seed)
    replicas = [replica(tmp_path, file) for _ in range(3)]
    model: dict[int, int] = {}  # key -> slots
    for _ in range(250):
        index = replicas[int(rng.integers(0, 3))]
        with index.change():
            for _ in range(int(rng.integers(1, 6))):
                key = int(rng.integers(0, 30))
                slot = find(index, key)
                assert (slot is not None) == (key in model)
                if slot is not None:
                    index.remove(slot)
                    del model[key]
                else:
                    evicted: list[int] = []
                    where = index.allocate(key % 5 + 1, evicted)
                    assert where is not None
                    index.mark(where.runs, 1)
                    now = int(rng.integers(1, 10**6))
                    publish(index, [where], [(key, 0)], now)
                    model[key] = key % 5 + 1
                    if evicted:
                        model = {k: n for k, n in model.items() if find(index, k) is not None}
        assert stored_keys(file) == set(model)
        assert int(file.control["used_slots"][0]) == sum(model.values())
    assert_consistent(file)


@pytest.mark.parametrize("changes", [1, fmt.JOURNAL_LENGTH // 2, fmt.JOURNAL_LENGTH, 1000])
def test_a_replica_that_was_away_catches_up(
    tmp_path: Path, file: IndexFile, changes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    away, busy = replica(tmp_path, file), replica(tmp_path, file)
    with away.change():
        kept = put(away, 1000, 3)
    reads: list[int] = []
    real = SpaceReplica.read
    monkeypatch.setattr(SpaceReplica, "read", lambda s: (reads.append(1), real(s))[1])
    with busy.change():
        reads.clear()
        for key in range(changes):  # two records of the journal each
            busy.remove(put(busy, key, key % 4 + 1))
        last = put(busy, changes, 2)
    assert not reads
    with away.change():
        assert len(reads) == int(2 * changes + 1 > fmt.JOURNAL_LENGTH)
        free = away.allocate(SLOTS - 5, [])
        assert free is not None
        assert sorted(n for _, n in free.runs) == sorted(
            n for n in (last - kept - 3, SLOTS - last - 2) if n
        )
        away.mark(free.runs, 1)
        away.give_back(free.slot)
    assert_consistent(file)


def test_a_nonsensical_journal_is_not_believed(tmp_path: Path, file: IndexFile) -> None:
    for record in (0, 5, (SLOTS - 1) << 32 | 2, 2 << 32 | fmt.JOURNAL_FREED | 3, 2**64 - 1):
        one, other = replica(tmp_path, file), replica(tmp_path, file)
        with one.change():
            one.clear()
            put(one, 1, 4)
        with other.change():
            put(other, 2, 4)
        epoch = int(file.control["epoch"][0])
        file.control["journal"][0, (epoch - 1) % fmt.JOURNAL_LENGTH] = record
        with one.change():
            where = one.allocate(SLOTS - 8, [])
            assert where is not None
            assert all(start >= 8 for start, _ in where.runs)


def test_a_holder_that_does_not_come_back_is_a_timeout(tmp_path: Path, file: IndexFile) -> None:
    one, other = replica(tmp_path, file), replica(tmp_path, file)
    with one.change(), pytest.raises(LockTimeoutError), other.change(timeout=0.05):
        pass
    with other.change(timeout=0):
        pass
