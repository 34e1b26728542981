"""Look-ups without a lock: both ways to look agree, misses are looked at twice, damage holds
nobody."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import numpy as np
import pytest

from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.index import lookup as lookup_module
from light_mem.index.file import IndexFile
from light_mem.index.lookup import SCALAR_LIMIT, Lookup
from tests.deaths import interleave
from tests.engine_helpers import PAGE, new_index, put, replica


def find_each(lookup: Lookup, keys: np.ndarray, touch: bool = False) -> list[int]:
    return [lookup.find_one(low, high, touch) for low, high in keys.tolist()]


# --- both ways ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_scalar_and_vectorised_find_agree_on_random_tables(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    file = new_index(tmp_path, slots=80, shards=3)
    shards = [replica(tmp_path, file, shard) for shard in range(3)]
    lookup = Lookup(file)
    stored: dict[int, int] = {}  # key -> entry
    universe = [int(k) for k in rng.integers(0, 2**63, 60)] + list(range(60))
    for _ in range(10):
        for key in rng.choice(universe, 12).tolist():
            shard = keymath.shard_of(keymath.mix_one(*keymath.as_key(key)), 3)
            with shards[shard].change():
                if key in stored:
                    shards[shard].remove(stored.pop(key) - shard * file.slots)
                else:
                    stored[key] = shard * file.slots + put(shards[shard], key, int(key) % 3 + 1)
        keys = keymath.as_keys(universe)
        expected = [stored.get(key, -1) for key in universe]
        assert lookup.find(keys, touch=False).tolist() == expected
        assert find_each(lookup, keys) == expected
        few = keys[:SCALAR_LIMIT]
        assert lookup.find(few, touch=False).tolist() == expected[:SCALAR_LIMIT]


def test_no_keys_are_found_nowhere(tmp_path: Path) -> None:
    lookup = Lookup(new_index(tmp_path, slots=4))
    assert lookup.find(keymath.as_keys([])).tolist() == []


@pytest.mark.parametrize("n", [1, SCALAR_LIMIT + 2], ids=["scalar", "vectorised"])
def test_a_look_up_counts_as_use_only_when_it_touches(tmp_path: Path, n: int) -> None:
    file = new_index(tmp_path, slots=16)
    index = replica(tmp_path, file)
    with index.change():
        slots = [put(index, key, 1) for key in range(n)]
    lookup = Lookup(file)
    before, entries = file.uses.copy(), file.entries.copy()
    lookup.find(keymath.as_keys(range(n)), touch=False)
    assert np.array_equal(file.uses, before)
    started = time.time_ns()
    lookup.find(keymath.as_keys(range(n)))
    assert (file.uses[slots] >= started).all()
    others = np.setdiff1d(np.arange(16), slots)
    assert np.array_equal(file.uses[others], before[others])
    assert np.array_equal(file.entries, entries)  # their pages stay clean


def test_a_block_being_written_is_not_found(tmp_path: Path) -> None:
    file = new_index(tmp_path, slots=16)
    index = replica(tmp_path, file)
    with index.change():
        slot = put(index, 5, 2)
    file.entries["tag"][slot] = fmt.make_tag(fmt.WRITING, 1, 9)
    lookup = Lookup(file)
    assert find_each(lookup, keymath.as_keys([5])) == [-1]
    assert lookup.find(keymath.as_keys([5] * 10)).tolist() == [-1] * 10


# --- chains that are cut meanwhile ----------------------------------------------------------------


class Chain:
    """Two blocks in one chain; the first one goes, and its slot gets a block of another chain."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = new_index(directory, slots=16)
        self.index = replica(directory, self.file)
        bucket = self._bucket(0)
        self.last, self.first = 0, next(k for k in range(1, 10**6) if self._bucket(k) == bucket)
        self.other = next(k for k in range(1, 100) if self._bucket(k) != bucket)
        with self.index.change():
            self.slot = put(self.index, self.last, 1)
            self.first_slot = put(self.index, self.first, 1)
            put(self.index, 1000, 1)
        self._saved = self.file.map[:]

    def reset(self) -> None:
        self.file.map[:] = self._saved
        self.index = replica(self.directory, self.file)

    def _bucket(self, key: int) -> int:
        return keymath.mix_one(key, 0) & (self.file.buckets - 1)

    def replace_first(self) -> None:
        with self.index.change():
            self.index.remove(self.first_slot)
            assert put(self.index, self.other, 1) == self.first_slot


@pytest.mark.parametrize("n", [1, SCALAR_LIMIT + 2], ids=["scalar", "vectorised"])
def test_a_stored_block_is_found_whenever_its_chain_changes(
    tmp_path: Path, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain(tmp_path)
    lookup = Lookup(chain.file)
    keys = keymath.as_keys([chain.last, *range(2000, 1999 + n)])
    find = functools.partial(lookup.find, keys, touch=False)
    missed_without_retries = 0
    for retries in (lookup_module.RETRIES, 1):
        monkeypatch.setattr(lookup_module, "RETRIES", retries)
        at, reached = 0, True
        while reached:
            at += 1
            chain.reset()
            found, reached = interleave(find, chain.replace_first, at)
            if retries > 1:
                assert found.tolist() == [chain.slot] + [-1] * (n - 1)
            else:
                missed_without_retries += int(found[0] < 0)
        assert at > 50
    assert missed_without_retries  # else the walk was never led astray


def test_a_block_replaced_while_it_is_located_is_not_mistaken_for_the_new_one(
    tmp_path: Path,
) -> None:
    outcomes = set()
    chain = Chain(tmp_path)
    lookup = Lookup(chain.file)
    at, reached = 0, True
    while reached:
        at += 1
        chain.reset()
        locate = functools.partial(lookup.locate, chain.first_slot, chain.first, 0)
        where, reached = interleave(locate, chain.replace_first, at)
        outcomes.add(where is None)
        if where is not None:
            assert where.checksum == chain.first
            assert lookup.is_unchanged(where) != reached
    assert outcomes == {True, False}


def test_a_miss_gives_up_when_chains_are_cut_all_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = new_index(tmp_path, slots=16)
    lookup = Lookup(file)
    walks = []

    def walk(keys: np.ndarray, *_: np.ndarray) -> np.ndarray:
        file.control["unlinks"] += 1
        walks.append(len(keys))
        return np.full(len(keys), -1, np.int64)

    monkeypatch.setattr(lookup, "_walk", walk)
    n = SCALAR_LIMIT + 4
    assert lookup.find(keymath.as_keys(range(n))).tolist() == [-1] * n
    assert walks == [n] * lookup_module.RETRIES


# --- locations ------------------------------------------------------------------------------------


def test_a_location_is_good_until_its_tag_changes(tmp_path: Path) -> None:
    file = new_index(tmp_path, slots=16)
    index = replica(tmp_path, file)
    with index.change():
        slot = put(index, 5, 3)
    lookup = Lookup(file)
    where = lookup.locate(slot, 5, 0)
    assert where is not None
    assert (where.shard, where.slot, where.checksum, where.nbytes) == (0, slot, 5, 3 * PAGE)
    assert where.runs == [(slot, 3)]
    assert lookup.is_unchanged(where)
    assert lookup.locate(slot, 6, 0) is None
    with index.change():
        index.remove(slot)
    assert not lookup.is_unchanged(where)
    assert lookup.locate(slot, 5, 0) is None
    with index.change():
        assert put(index, 5, 3) == slot  # the same key in the same slots: another generation
    assert not lookup.is_unchanged(where)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("run", value) for value in (0, 2, 4, 2**32 - 1)),
        *(("next_run", value) for value in (1, 9, 2**32 - 1)),
        *(("nbytes", value) for value in (0, 3 * PAGE + 1, 2**64 - 1)),
    ],
)
def test_a_block_whose_runs_make_no_sense_is_nowhere(
    tmp_path: Path, field: str, value: int
) -> None:
    file = new_index(tmp_path, slots=16)
    index = replica(tmp_path, file)
    with index.change():
        slot = put(index, 5, 3)
        put(index, 6, 3)
    file.entries[field][slot] = value
    assert Lookup(file).locate(slot, 5, 0) is None


# --- damage ---------------------------------------------------------------------------------------


def garbage(rng: np.random.Generator, file: IndexFile, what: str, plausible: bool) -> None:
    """Overwrite a part of the index with random numbers; plausible ones lie within the shard."""
    top = file.slots + 2 if plausible else 2**32
    if what == "heads":
        file.heads[:] = rng.integers(0, top, file.heads.size, np.uint32)
    elif what == "entries":
        file.entries.view(np.uint8)[:] = rng.integers(0, 256, file.entries.nbytes, np.uint8)
        if plausible:
            live = rng.random(file.entries.size) < 0.7
            file.entries["tag"][live] = fmt.make_tag(fmt.LIVE, 0, 1)
            for name in ("run", "next_run", "next"):
                file.entries[name] = rng.integers(0, top, file.entries.size, np.uint32)
    else:
        file.entries[what] = rng.integers(0, top, file.entries.size, np.uint32)


@pytest.mark.parametrize("plausible", [True, False])
@pytest.mark.parametrize("what", ["heads", "next", "next_run", "run", "entries"])
@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_index_neither_holds_nor_breaks_a_look_up(
    tmp_path: Path, what: str, plausible: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    file = new_index(tmp_path, slots=30, shards=2)
    shards = [replica(tmp_path, file, shard) for shard in range(2)]
    for key in range(24):
        shard = keymath.shard_of(keymath.mix_one(key, 0), 2)
        with shards[shard].change():
            put(shards[shard], key, 1)
    garbage(rng, file, what, plausible)
    lookup = Lookup(file)
    keys = keymath.as_keys(range(40))
    started = time.monotonic()
    for found in (lookup.find(keys).tolist(), find_each(lookup, keys)):
        for key, entry in enumerate(found):
            if entry >= 0:  # whatever is found is an entry that says it is that key's
                record = file.entries[entry]
                assert (int(record["low"]), int(record["high"])) == (key, 0)
                assert int(record["tag"]) & fmt.STATE_MASK == fmt.LIVE
                where = lookup.locate(entry, key, 0)
                if where is not None:
                    assert sum(n for _, n in where.runs) == -(-where.nbytes // PAGE)
                    assert all(at >= 0 and at + n <= file.slots for at, n in where.runs)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("n", [1, 20], ids=["scalar", "vectorised"])
def test_a_chain_that_is_a_ring_ends(tmp_path: Path, n: int) -> None:
    file = new_index(tmp_path, slots=4)
    file.heads[:] = 1
    file.entries["next"] = [2, 3, 4, 1]
    started = time.monotonic()
    assert Lookup(file).find(keymath.as_keys(range(n))).tolist() == [-1] * n
    assert time.monotonic() - started < 2
