"""One shard's index after a death or an exception at any store, and with damaged entries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from light_mem.index import file as index_file
from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.index.file import IndexFile
from light_mem.index.recovery import states_of
from light_mem.index.shard import ShardIndex
from tests.deaths import Files, moments, restore
from tests.engine_helpers import (
    PAGE,
    assert_consistent,
    new_index,
    publish,
    put,
    replica,
    stored_keys,
)

SLOTS = 16
KEPT = {1, 3, 5}  # stored before, and untouched by every scenario


def fill(index: ShardIndex) -> dict[int, int]:
    """Blocks 0 to 6 of two slots each, 0 the oldest; block 7 in two runs; returns their slots."""
    with index.change():
        slots = {key: put(index, key, 2, now=10 if key in (0, 2) else 0) for key in range(8)}
        index.remove(slots[4])
        index.remove(slots.pop(7))
        slots[7] = put(index, 7, 3)
        del slots[4]
        assert index._lookup.runs(0, slots[7]) == [(8, 1), (14, 2)]
    return slots


def write(index: ShardIndex, slots: dict[int, int]) -> None:
    with index.change():  # evicts 0 and 2, and takes three runs
        where = index.allocate(5, [])
        assert where is not None
        assert len(where.runs) == 3
        index.mark(where.runs, owner=1)
    with index.change():
        publish(index, [where], [(100, 0)], now=1)


def remove(index: ShardIndex, slots: dict[int, int]) -> None:
    with index.change():
        for key in (0, 7, 2):
            index.remove(slots[key])


def write_many(index: ShardIndex, slots: dict[int, int]) -> None:
    """A batch: two blocks find room, the next two take that of the evicted 0 and 2."""
    with index.change():
        index.remove(slots[7])
        where = index.allocate_many([2, 2, 2, 2], [])
        assert [len(w.runs) for w in where] == [1] * 4
        index.mark_many(where, owner=1)
    with index.change():
        assert index.find_many([(key, 0) for key in (100, 101, 102, 103)]) == [-1] * 4
        publish(index, where, [(key, 0) for key in (100, 101, 102, 103)], now=1)


def evict_many(index: ShardIndex, slots: dict[int, int]) -> None:
    """A batch of a full shard: all its blocks take the slots of evicted ones."""
    with index.change():
        index.remove(slots[7])
        index.remove(slots[6])
        for key in (20, 21, 22, 23):
            put(index, key, 2, now=11)
    evicted: list[int] = []
    with index.change():
        where = index.allocate_many([2] * 4, evicted)
        assert len(evicted) == 4
        assert {w.slot for w in where} == set(evicted)
        index.mark_many(where, owner=1)
    with index.change():
        publish(index, where, [(key, 0) for key in (100, 101, 102, 103)], now=1)


def write_in_vain(index: ShardIndex, slots: dict[int, int]) -> None:
    with index.change():
        where = index.allocate(5, [])
        assert where is not None
        index.mark(where.runs, owner=1)
    with index.change():
        index.give_back(where.slot)


def clear(index: ShardIndex, slots: dict[int, int]) -> None:
    with index.change():
        index.clear()


Scenario = Callable[[ShardIndex, dict[int, int]], None]


def at_every_moment(tmp_path: Path, scenario: Scenario) -> tuple[IndexFile, list[Files]]:
    (tmp_path / "live").mkdir()
    file = new_index(tmp_path / "live", SLOTS)
    index = replica(tmp_path / "live", file)
    slots = fill(index)
    seen = moments(tmp_path / "live", lambda: scenario(index, slots))
    assert len(seen) > 15
    return file, seen


def opened(files: Files, tmp_path: Path, name: str, like: IndexFile) -> tuple[Path, IndexFile]:
    directory = restore(files, tmp_path, tmp_path / name)
    return directory, IndexFile(directory / index_file.NAME, like.geometry)


def recover(directory: Path, file: IndexFile) -> bool:
    with replica(directory, file).change() as recovered:
        pass
    assert not file.control["dirty"][0]
    assert_consistent(file)
    return recovered


@pytest.mark.parametrize("scenario", [write, write_many, evict_many, remove, write_in_vain, clear])
def test_a_death_at_any_store_costs_no_block_that_was_not_touched(
    tmp_path: Path, scenario: Scenario
) -> None:
    live, seen = at_every_moment(tmp_path, scenario)
    kept = set() if scenario is clear else KEPT
    recoveries = 0
    for at, files in enumerate(seen):
        directory, file = opened(files, tmp_path, str(at), live)
        assert kept <= stored_keys(file) <= {*range(8), *range(20, 24), *range(100, 104)}
        recoveries += recover(directory, file)
        assert kept <= stored_keys(file) <= {*range(8), *range(20, 24), *range(100, 104)}
    assert 0 < recoveries < len(seen)


@pytest.mark.parametrize("scenario", [write, write_many, evict_many, remove, write_in_vain])
def test_look_ups_find_untouched_blocks_at_every_moment_of_a_change(
    tmp_path: Path, scenario: Scenario
) -> None:
    live, seen = at_every_moment(tmp_path, scenario)
    keys = keymath.as_keys(sorted(KEPT) * 3)
    for at, files in enumerate(seen):
        directory, file = opened(files, tmp_path, str(at), live)
        lookup = replica(directory, file)._lookup
        assert (lookup.find(keys, touch=False) >= 0).all()
        assert all(lookup.find_one(key, 0, touch=False) >= 0 for key in KEPT)


def test_a_death_during_recovery_is_recovered_from(tmp_path: Path) -> None:
    live, seen = at_every_moment(tmp_path, write)
    for at in range(0, len(seen), 6):
        directory, file = opened(seen[at], tmp_path, str(at), live)

        def change(directory: Path = directory, file: IndexFile = file) -> None:
            with replica(directory, file).change():
                pass

        for step, files in enumerate(moments(directory, change)):
            again, copy = opened(files, tmp_path, f"{at}-{step}", live)
            recover(again, copy)
            assert stored_keys(copy) >= KEPT


def test_an_exception_in_a_change_is_put_in_order_by_the_next_holder(tmp_path: Path) -> None:
    file = new_index(tmp_path, SLOTS)
    one, other = replica(tmp_path, file), replica(tmp_path, file)
    slots = fill(one)

    def stop_while_allocating() -> None:
        one.allocate(1, [])  # its space knows of it, nothing else does
        raise KeyboardInterrupt

    def stop_while_removing() -> None:
        one._taking.free_tags([slots[3]])  # torn: freed, and still counted and chained
        raise KeyboardInterrupt

    for holder in (other, one, other):
        with pytest.raises(KeyboardInterrupt), one.change():
            stop_while_allocating()
        assert file.control["dirty"][0] == 1
        with holder.change() as recovered:
            assert recovered
        with one.change() as recovered:
            assert not recovered
            where = one.allocate(1, [])
            assert where is not None
            one.mark(where.runs, 1)
            one.give_back(where.slot)
        assert_consistent(file)
    with pytest.raises(KeyboardInterrupt), one.change():
        stop_while_removing()
    with other.change():
        pass
    assert stored_keys(file) == {0, 1, 2, 5, 6, 7}
    assert_consistent(file)


def test_what_a_living_owner_is_writing_survives_a_recovery(tmp_path: Path) -> None:
    file = new_index(tmp_path, SLOTS)
    one, other = replica(tmp_path, file), replica(tmp_path, file)
    fill(one)
    with one.change():
        where = one.allocate(5, [])
        assert where is not None
        assert len(where.runs) == 3
        one.mark(where.runs, owner=9)
    file.control["dirty"] = 1
    with other.change() as recovered:
        assert recovered
        assert other.is_marked(where.slot, 9)
        assert int(file.control["used_slots"][0]) == 5 + 2 * 4 + 3
    with one.change():
        assert one.is_marked(where.slot, 9)
        publish(one, [where], [(100, 0)], now=1)
    assert 100 in stored_keys(file)


# --- damaged entries ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"), [("run", 0), ("run", 9), ("next_run", 3), ("next_run", 99), ("nbytes", 1)]
)
@pytest.mark.parametrize("how", ["remove", "evict", "clear"])
def test_a_damaged_block_goes_alone(tmp_path: Path, field: str, value: int, how: str) -> None:
    file = new_index(tmp_path, SLOTS)
    index = replica(tmp_path, file)
    slots = fill(index)
    file.entries[field][slots[7]] = value
    file.uses[slots[7]] = 1
    with index.change():
        reserved = index.allocate(1, [])  # not marked yet: the entries do not show it
        assert reserved is not None
        if how == "remove":
            index.remove(slots[7])
        elif how == "evict":
            evicted: list[int] = []
            where = index.allocate(3, evicted)
            assert where is not None
            assert evicted == [slots[7]]
            more = index.allocate(1, evicted)
            assert more is not None
            runs = [*where.runs, *more.runs]
            taken = {n for start, length in runs for n in range(start, start + length)}
            assert len(taken | {reserved.slot}) == 5
            for allocation in (where, more):
                index.mark(allocation.runs, 1)
                index.give_back(allocation.slot)
        else:
            index.clear()
        index.mark(reserved.runs, 1)
        index.give_back(reserved.slot)
    gone = {"clear": set(range(8)), "evict": {0, 7}, "remove": {7}}[how]
    assert stored_keys(file) == {0, 1, 2, 3, 5, 6, 7} - gone
    assert_consistent(file)
    assert not (states_of(file.entries) == fmt.EXTENT).any()


def test_of_two_blocks_in_the_same_slots_only_one_is_believed(tmp_path: Path) -> None:
    file = new_index(tmp_path, SLOTS)
    index = replica(tmp_path, file)
    with index.change():
        older, newer = put(index, 1, 4, now=1), put(index, 2, 4, now=2)
    assert (older, newer) == (0, 4)
    file.entries["run"][older] = 5  # reaches into the other
    file.entries["nbytes"][older] = 5 * PAGE
    file.control["dirty"] = 1
    recover(tmp_path, file)
    assert stored_keys(file) == {2}


def test_two_blocks_in_the_same_slots_do_not_free_them_twice(tmp_path: Path) -> None:
    file = new_index(tmp_path, SLOTS)
    index = replica(tmp_path, file)
    with index.change():
        one, other = put(index, 1, 4), put(index, 2, 2)
        assert (one, other) == (0, 4)
        file.entries["run"][other] = 1
        file.entries["nbytes"][other] = PAGE
        file.entries["run"][one] = 5
        file.entries["nbytes"][one] = 5 * PAGE
        index.remove(one)
        index.remove(other)
        everything = index.allocate(SLOTS, [])
        assert everything is not None
        assert everything.runs == [(0, SLOTS)]
        assert index.allocate(1, []) is None


@pytest.mark.parametrize("what", ["bits", "states"])
@pytest.mark.parametrize("seed", range(30))
def test_changes_go_on_in_a_damaged_shard(tmp_path: Path, seed: int, what: str) -> None:
    rng = np.random.default_rng(seed)
    file = new_index(tmp_path, SLOTS)
    index = replica(tmp_path, file)
    fill(index)
    if what == "bits":
        raw = file.entries.view(np.uint8)
        for at in rng.integers(0, raw.size, 40).tolist():
            raw[at] ^= 1 << int(rng.integers(0, 8))
    else:
        for slot in np.flatnonzero(rng.random(SLOTS) < 0.4).tolist():
            file.entries["tag"][slot] = fmt.make_tag(int(rng.integers(0, 5)), 0, slot)
    for round_ in range(30):
        key = int(rng.integers(0, 12))
        with index.change():
            slot = index.find(key, 0)
            if slot is not None:
                index.remove(slot)
            elif round_ % 7 == 0:
                index.clear()
            else:
                where = index.allocate(key % 3 + 1, [])
                if where is not None:
                    index.mark(where.runs, 1)
                    publish(index, [where], [(key, 0)], 10**9 + round_)
    file.control["dirty"] = 1
    recover(tmp_path, file)
