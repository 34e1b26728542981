"""In which order a shard is changed, where only a death or an exception between two stores shows
it: to those who look meanwhile, to the next holder, to an index made anew."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.slot_records import SlotRecords
from light_mem.index import description
from light_mem.index import file as index_file
from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.index.file import IndexFile
from light_mem.index.locks import PathLock, lock_path
from light_mem.index.lookup import SCALAR_LIMIT, Lookup
from light_mem.index.replica import free_runs
from light_mem.index.runs import Run
from light_mem.index.shard import ShardIndex
from light_mem.index.written import Written
from tests.deaths import interleave, moments, restore
from tests.engine_helpers import (
    PAGE,
    Block,
    Rig,
    assert_consistent,
    let_go,
    new_index,
    open_local,
    put,
    replica,
    stored_keys,
)
from tests.opcodes import interrupt

SLOTS = 16


def alike(buckets: int, count: int) -> list[int]:
    """Keys of one bucket."""
    of_bucket = (n for n in itertools.count() if keymath.mix_one(n, 0) & (buckets - 1) == 3)
    return list(itertools.islice(of_bucket, count))


# --- taking out -----------------------------------------------------------------------------------


def remove(index: ShardIndex, slots: list[int]) -> None:
    for at in (1, 4, 0):
        index.remove(slots[at])


def evict(index: ShardIndex, slots: list[int]) -> None:
    where = index.allocate_many([2, 2, 2], [])
    assert {each.slot for each in where} == set(slots[:3])
    index.mark_many(where, owner=1)


def clear(index: ShardIndex, slots: list[int]) -> None:
    assert len(index.clear()) == len(slots)


@pytest.mark.parametrize("leased", [False, True])
@pytest.mark.parametrize("how", [remove, evict, clear])
def test_a_block_that_look_ups_no_longer_find_does_not_come_back_when_its_remover_has_died(
    tmp_path: Path, how: Callable[[ShardIndex, list[int]], None], leased: bool
) -> None:
    (tmp_path / "live").mkdir()
    file = new_index(tmp_path / "live", SLOTS)
    index = replica(tmp_path / "live", file)
    keys = alike(file.buckets, 8)
    with index.change():
        slots = [put(index, key, 2, now=1 + at) for at, key in enumerate(keys)]
    if leased:  # the fifth, whose tag says HELD then
        lock = PathLock(lock_path(tmp_path / "live", "shard-000"))
        index = ShardIndex(file, 0, lock, Lookup(file), lambda: {slots[4]})
        file.control["leased"] = 1

    def change() -> None:
        with index.change():
            how(index, slots)

    gone = set()
    for at, files in enumerate(moments(tmp_path / "live", change)):
        directory = restore(files, tmp_path / "live", tmp_path / str(at))
        left = IndexFile(directory / index_file.NAME, file.geometry)
        lookup = Lookup(left)
        found = {key for key in keys if lookup.find_one(key, 0, touch=False) >= 0}
        with replica(directory, left).change():
            pass
        assert stored_keys(left) <= found, f"at moment {at}"
        gone |= set(keys) - found
    assert len(gone) >= 3


# --- publishing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, SCALAR_LIMIT + 2], ids=["scalar", "vectorised"])
def test_a_block_is_not_found_before_its_tag_says_that_it_is_stored(tmp_path: Path, n: int) -> None:
    """At each opcode of a look-up that has begun at the block before it, in the same slot and
    chain: whoever was to publish the new one has died when its key was in the entry."""
    file = new_index(tmp_path, SLOTS)
    old, new = alike(file.buckets, 2)
    first = replica(tmp_path, file)
    with first.change():
        slot = put(first, old, SLOTS)
    saved = file.map[:]

    def replace() -> None:
        index = replica(tmp_path, file)
        with index.change():
            index.remove(slot)
            where = index.allocate(SLOTS, [])
            assert where is not None
            assert where.slot == slot
            index.mark(where.runs, owner=1)
        file.entries["low"][slot] = new

    lookup = Lookup(file)
    keys = keymath.as_keys([new] * n)
    for at in itertools.count(1):
        file.map[:] = saved
        found, reached = interleave(partial(lookup.find, keys, touch=False), replace, at)
        assert found.tolist() == [-1] * n, f"at opcode {at}"
        if not reached:
            break
    assert at > 30


# --- putting in order -----------------------------------------------------------------------------


def test_a_death_as_a_shard_is_put_in_order_hides_no_block_from_those_who_open_next(
    tmp_path: Path,
) -> None:
    """Chains that are made anew have another order than those of a batch: in between, look-ups lose
    their way, and where nobody writes they would for good. Who opens does not wait for more."""
    engine = open_local(tmp_path / "store", SLOTS)
    file = engine._index
    blocks = [Block(key) for key in alike(file.buckets, 6)]
    Rig(engine).write(*blocks)  # at one time
    file.control["dirty"] = fmt.CHANGING  # its holder died

    def change() -> None:
        with engine.change(0):
            pass

    keys = keymath.as_keys([block.key for block in blocks])
    lost = 0
    for at, files in enumerate(moments(tmp_path / "store", change)):
        directory = restore(files, tmp_path / "store", tmp_path / str(at))
        left = IndexFile(directory / index_file.NAME, engine.geometry)
        lost += not (Lookup(left).find(keys, touch=False) >= 0).all()
        again = LocalStorageEngine.open_store(
            directory,
            page_bytes=PAGE,
            num_of_shard=1,
            storage_size=SLOTS * PAGE,
            block_pages=1,
            recover=False,
        )
        assert again.find(keys).all(), f"at moment {at}"
        assert_consistent(again._index)
        again.close()
        let_go(again, left)
    assert lost
    engine.close()
    let_go(engine, file)


def test_who_was_away_while_a_shard_was_put_in_order_does_not_trust_the_journal(
    tmp_path: Path,
) -> None:
    """What was freed then is not in it, and the record that comes next is an old one, which fits
    what the other process knows."""
    file = new_index(tmp_path, SLOTS)
    one, other = replica(tmp_path, file), replica(tmp_path, file)
    with other.change():
        damaged = put(other, 1, 3)
    with other.change():
        for key in range(2, 2 + fmt.JOURNAL_LENGTH // 2):
            other.remove(put(other, key, 2))
    file.entries["run"][damaged] = 0
    with one.change():
        one.put_in_order()
    with other.change():
        assert other._space.runs.runs() == free_runs(file.entries).runs() == [(0, SLOTS)]
        where = other.allocate(SLOTS, [], evict=False)
        assert where is not None
        other.mark(where.runs, owner=1)
    assert int(file.control["used_slots"][0]) == SLOTS


def test_an_exception_at_any_place_of_a_change_leaves_nothing_that_only_its_process_believes(
    tmp_path: Path,
) -> None:
    """It may have noted that it told others of slots, and not have told: what is in the journal
    next is old, and fits what it knows."""
    # Slot 0 is free, taken and freed again and again, and at last 2, 4 and 6 are.
    file = new_index(tmp_path, SLOTS)
    index = replica(tmp_path, file)
    with index.change():
        slots = [put(index, key, 1) for key in range(SLOTS)]
        index.remove(slots[0])
        for _ in range(fmt.JOURNAL_LENGTH):
            assert index.allocate(1, []) == (0, [(0, 1)])
            index.mark([(0, 1)], owner=1)
            index.give_back(0)
        for key in (2, 4, 6):
            index.remove(slots[key])
    saved = file.map[:]
    before_told = 0
    for at in itertools.count(1):
        file.map[:] = saved
        one, other = replica(tmp_path, file), replica(tmp_path, file)
        with one.change():
            pass
        epoch = int(file.control["epoch"][0])

        def allocate(index: ShardIndex = one) -> None:
            with index.change():
                where = index.allocate(3, [])
                assert where is not None
                assert where.runs == [(2, 1), (4, 1), (6, 1)]
                index.mark(where.runs, owner=1)

        reached = interrupt(allocate, at)
        before_told += one._space._epoch > int(file.control["epoch"][0]) == epoch
        for index in (other, one):
            with index.change():
                assert index._space.runs.runs() == free_runs(file.entries).runs(), f"place {at}"
        assert_consistent(file)
        if not reached:
            break
    assert before_told


# --- records --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "old",
    [[(0, 1), (5, 2)], [(0, 1), (8, 1), (5, 1)], [(0, 1), (5, 1), (9, 1)]],
    ids=["longer run", "other order", "other end"],
)
def test_no_record_tells_of_a_block_before_all_of_its_runs_are_described(
    tmp_path: Path, old: list[Run]
) -> None:
    """The block was stored before, with the same bytes, and some of its runs began where some of
    the new ones do: their records are still there."""
    store = tmp_path / "store"
    open_local(store, SLOTS).close()
    geometry = description.load(store)
    assert geometry is not None
    records = SlotRecords(store, geometry, 0)
    new: list[Run] = [(0, 1), (5, 1), (8, 1)]
    block = Written(1, 0, 77, 3 * PAGE, old, 10)
    records.write_records([block])
    records.clear_records([0])
    seen = moments(store, lambda: records.write_records([block._replace(runs=new, used=20)]))
    found = []
    for at, files in enumerate(seen):
        del files["index"]
        directory = restore(files, store, tmp_path / str(at))
        engine = open_local(directory, SLOTS)
        where = engine.lookup.locate(engine.lookup.find_one(1, 0), 1, 0)
        found.append(None if where is None else where.runs)
        engine.close()
        let_go(engine)
    assert found[-1] == new
    assert set(map(str, found)) == {"None", str(new)}
