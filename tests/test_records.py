"""Slot records that contradict each other: what an index made anew from them believes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from light_mem.engine.shard_file import ShardFile
from light_mem.index import description
from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.index.recovery import record_crcs
from light_mem.index.written import Written
from tests.engine_helpers import PAGE, assert_consistent, open_local

PAGES = 20


def describe(
    store: Path, runs: list[tuple[int, int]], key: int, nbytes: int, now: int, checksum: int = 0
) -> None:
    """Write the records of a block into shard 0, as a process that died later did."""
    geometry = description.load(store)
    assert geometry is not None
    file = ShardFile(store, geometry, 0)
    file.write_records([Written(key, 0, checksum, nbytes, runs, now)])
    file.close()


def keys_found(store: Path, pages: int = PAGES) -> set[int]:
    (store / "index").unlink()
    engine = open_local(store, pages)
    assert_consistent(engine._index)
    found = {key for key in range(100) if engine.find(keymath.as_keys([key]))[0]}
    engine.close()
    return found


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    open_local(tmp_path / "store", PAGES).close()
    return tmp_path / "store"


def test_of_blocks_that_overlap_the_newer_stays(empty: Path) -> None:
    describe(empty, [(0, 4)], key=1, nbytes=4 * PAGE, now=10)
    describe(empty, [(3, 3)], key=2, nbytes=3 * PAGE, now=30)
    describe(empty, [(5, 2)], key=3, nbytes=2 * PAGE, now=20)
    describe(empty, [(8, 2)], key=4, nbytes=2 * PAGE, now=1)
    assert keys_found(empty) == {2, 4}


def test_of_two_blocks_with_one_key_the_newer_stays(empty: Path) -> None:
    describe(empty, [(0, 1), (5, 1)], key=1, nbytes=2 * PAGE, now=10)
    describe(empty, [(2, 2)], key=1, nbytes=2 * PAGE, now=20)
    describe(empty, [(8, 2)], key=1, nbytes=2 * PAGE, now=15)
    assert keys_found(empty) == {1}
    engine = open_local(empty, PAGES)
    assert engine.lookup.find_one(1, 0) == 2
    assert engine.stats()["used_slots"] == 2
    engine.close()


def test_a_block_whose_further_run_is_anothers_is_dropped(empty: Path) -> None:
    describe(empty, [(0, 2), (6, 2)], key=1, nbytes=4 * PAGE, now=10)
    describe(empty, [(3, 1), (6, 2)], key=2, nbytes=3 * PAGE, now=5)
    assert keys_found(empty) == {2}


def test_a_block_whose_further_run_is_of_other_bytes_of_its_key_is_dropped(empty: Path) -> None:
    """However late it was stored: it was taken out, and written again in part of its slots."""
    describe(empty, [(0, 2), (6, 2)], key=1, nbytes=4 * PAGE, now=10, checksum=5)
    describe(empty, [(3, 1), (6, 2)], key=1, nbytes=3 * PAGE, now=5, checksum=6)
    assert keys_found(empty) == {1}
    engine = open_local(empty, PAGES)
    assert engine.lookup.find_one(1, 0) == 3
    assert engine.stats()["used_slots"] == 3
    engine.close()


@pytest.mark.parametrize(
    ("runs", "nbytes"),
    [
        ([(0, 0)], 0),
        ([(0, 2)], PAGE),
        ([(0, 2)], 2 * PAGE + 1),
        ([(PAGES - 2, 3)], 3 * PAGE),
        ([(0, 2), (PAGES - 2, 3)], 5 * PAGE),
        ([(0, 2), (4, 2), (0, 2)], 6 * PAGE),
        ([(0, 2), (40, 2)], 4 * PAGE),
        ([(0, 2), (4, 0)], 2 * PAGE),
        ([(0, 4), (2, 2)], 6 * PAGE),
    ],
)
def test_records_that_make_no_sense_are_dropped(
    empty: Path, runs: list[tuple[int, int]], nbytes: int
) -> None:
    records = np.memmap(
        empty / "shard-000.slots", fmt.RECORD, "r+", fmt.SHARD_HEADER_BYTES, (PAGES,)
    )
    for at, (start, length) in enumerate(runs[:1] + [r for r in runs[1:] if r[0] < PAGES]):
        record = np.zeros((), fmt.RECORD)
        record["low"], record["nbytes"], record["run"] = 1, nbytes, length
        record["tag"] = fmt.LIVE if at == 0 else fmt.EXTENT
        record["next_run"] = runs[at + 1][0] + 1 if at + 1 < len(runs) else 0
        [record["crc"]] = record_crcs(record)
        records[start] = record
    describe(empty, [(8, 1)], key=2, nbytes=PAGE, now=1)
    assert keys_found(empty) == {2}
