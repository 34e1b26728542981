"""An index made anew from the slots files, and when it is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from light_mem.engine.base import Outcome
from light_mem.index import file as index_file
from light_mem.index import format as fmt
from tests.engine_helpers import PAGE, Block, Rig, assert_consistent, open_local

LOADED, MISSING, DAMAGED = Outcome.LOADED, Outcome.MISSING, Outcome.DAMAGED
PAGES, SHARDS = 20, 2
BLOCKS = [Block(key, key % 4 + 1) for key in range(8)]


def opened(directory: Path) -> Rig:
    return Rig(open_local(directory, PAGES, shards=SHARDS, block_pages=4))


def contents(directory: Path, *blocks: Block) -> list[Outcome]:
    """What a fresh opening reads; the index is in order then."""
    rig = opened(directory)
    outcomes = rig.read(*blocks)
    assert_consistent(rig.engine._index)  # type: ignore[attr-defined]
    rig.engine.close()
    return outcomes


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A closed store of eight blocks of one to four pages."""
    rig = opened(tmp_path / "store")
    assert all(o[-1] is Outcome.STORED for o in rig.write(*BLOCKS))
    rig.engine.close()
    return tmp_path / "store"


def records_of(store: Path, shard: int) -> np.ndarray:
    """The records of a shard, mapped."""
    return np.memmap(
        store / f"shard-{shard:03}.slots", fmt.RECORD, "r+", fmt.SHARD_HEADER_BYTES, (PAGES,)
    )


def place_of(store: Path, key: int) -> tuple[int, int]:
    """Shard and first slot of a block, from the records."""
    for shard in range(SHARDS):
        records = records_of(store, shard)
        found = np.flatnonzero((records["low"] == key) & (records["tag"] == fmt.LIVE))
        if found.size:
            return shard, int(found[0])
    raise AssertionError(f"no record of {key}")


# --- when -----------------------------------------------------------------------------------------


def rewrite_header(store: Path, **fields: object) -> None:
    raw = bytearray((store / "index").read_bytes())
    header = np.frombuffer(raw, fmt.INDEX_HEADER, 1)
    for name, value in fields.items():
        header[name] = value
    header["crc"] = fmt.header_crc(header, fmt.INDEX_HEADER_CRC)
    (store / "index").write_bytes(raw)


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x20]))


UNUSABLE: dict[str, Callable[[Path], object]] = {
    "missing": lambda store: (store / "index").unlink(),
    "empty": lambda store: os.truncate(store / "index", 0),
    "cut short": lambda store: os.truncate(store / "index", 9000),
    "one byte too short": lambda store: os.truncate(
        store / "index", (store / "index").stat().st_size - 1
    ),
    "zeros": lambda store: (store / "index").write_bytes(bytes((store / "index").stat().st_size)),
    "garbage": lambda store: (store / "index").write_bytes(os.urandom(100_000)),
    "a flipped header bit": lambda store: flip(store / "index", 33),
    "another version": lambda store: rewrite_header(store, version=fmt.INDEX_VERSION + 1),
    "another store": lambda store: rewrite_header(store, store_id=b"x" * 16),
    "another page size": lambda store: rewrite_header(store, page_bytes=PAGE + 1),
    "another number of slots": lambda store: rewrite_header(store, slots=PAGES - 1),
}


@pytest.mark.parametrize("how", UNUSABLE)
def test_an_index_that_cannot_be_used_is_made_anew_with_all_blocks(
    store: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    UNUSABLE[how](store)
    assert contents(store, *BLOCKS, Block(99)) == [LOADED] * 8 + [MISSING]
    assert "made anew with 8 blocks" in caplog.text
    caplog.clear()
    assert contents(store, *BLOCKS) == [LOADED] * 8
    assert "made anew" not in caplog.text


def test_counters_and_free_space_of_a_new_index_are_right(store: Path) -> None:
    (store / "index").unlink()
    rig = opened(store)
    stats = rig.engine.stats()
    assert stats["blocks"] == len(BLOCKS)
    assert stats["used_slots"] == sum(b.pages for b in BLOCKS)
    assert rig.write(Block(50), Block(51, 4))[1][-1] is Outcome.STORED
    assert rig.read(Block(50), Block(51, 4)) == [LOADED] * 2
    rig.engine.close()


def test_a_new_index_evicts_in_the_order_of_writing(tmp_path: Path) -> None:
    rig = Rig(open_local(tmp_path / "store", 4))
    for key in (3, 0, 2, 1):
        rig.write(Block(key))
    rig.engine.close()
    (tmp_path / "store" / "index").unlink()
    rig = Rig(open_local(tmp_path / "store", 4))
    for key, gone in zip(range(10, 14), (3, 0, 2, 1), strict=True):
        assert rig.find(Block(gone)) == [True]
        rig.write(Block(key))
        assert rig.find(Block(gone)) == [False]
    rig.engine.close()


@pytest.mark.parametrize("closed", [True, False])
def test_after_a_restart_of_the_machine_only_a_synced_index_is_believed(
    tmp_path: Path, closed: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig = opened(tmp_path / "store")
    rig.write(*BLOCKS)
    if closed:
        rig.engine.close()
    copy = tmp_path / "copy"  # of a store that is open, this is what a power cut may leave
    shutil.copytree(tmp_path / "store", copy)
    rig.engine.close()
    monkeypatch.setattr(index_file, "boot_id", lambda: b"another boot....")
    assert contents(copy, *BLOCKS) == [LOADED] * 8
    assert ("unsynced" in caplog.text) == (not closed)
    caplog.clear()
    # The new boot has the index open now, and then crashes: it is the same boot at the next open.
    rig = opened(copy)
    again = tmp_path / "again"
    shutil.copytree(copy, again)
    rig.engine.close()
    assert contents(again, *BLOCKS) == [LOADED] * 8
    assert "made anew" not in caplog.text


def test_without_boot_ids_a_second_service_can_open_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(index_file, "boot_id", lambda: bytes(16))  # macOS
    rig = opened(tmp_path / "store")
    rig.write(*BLOCKS)
    assert contents(tmp_path / "store", *BLOCKS) == [LOADED] * 8
    assert rig.read(*BLOCKS) == [LOADED] * 8
    shutil.copytree(tmp_path / "store", tmp_path / "crashed")
    rig.engine.close()
    assert "made anew" not in caplog.text
    assert contents(tmp_path / "crashed", *BLOCKS) == [LOADED] * 8
    assert "unsynced" in caplog.text


# --- from what ------------------------------------------------------------------------------------


def test_records_with_a_flipped_bit_are_dropped_and_no_others(store: Path) -> None:
    for key in (2, 5):
        shard, slot = place_of(store, key)
        raw = records_of(store, shard).view(np.uint8).reshape(PAGES, -1)
        raw[slot, 7 * key] ^= 0x04
    (store / "index").unlink()
    expected = [MISSING if b.key in (2, 5) else LOADED for b in BLOCKS]
    assert contents(store, *BLOCKS) == expected


@pytest.mark.parametrize("at", [0, 4096, 4096 + 64, 4096 + 70, 4096 + 120])
def test_a_slots_file_cut_short_costs_the_blocks_behind_the_cut(store: Path, at: int) -> None:
    places = {b.key: place_of(store, b.key) for b in BLOCKS}
    os.truncate(store / "shard-000.slots", at)
    (store / "index").unlink()
    whole = (at - 4096) // 64
    assert contents(store, *BLOCKS) == [
        LOADED if places[b.key][0] == 1 or places[b.key][1] < whole else MISSING for b in BLOCKS
    ]


def test_deleted_blocks_do_not_come_back(store: Path) -> None:
    rig = opened(store)
    assert rig.delete(BLOCKS[1], BLOCKS[6]) == 2
    rig.engine.close()
    (store / "index").unlink()
    assert contents(store, BLOCKS[1], BLOCKS[6], BLOCKS[7]) == [MISSING, MISSING, LOADED]


def test_a_block_in_several_runs_is_found_again(tmp_path: Path) -> None:
    rig = Rig(open_local(tmp_path / "store", PAGES, block_pages=4))
    rig.write(*(Block(key) for key in range(PAGES)))
    rig.delete(*(Block(key) for key in range(0, PAGES, 2)))
    rig.write(Block(100, 4))
    rig.engine.close()
    (tmp_path / "store" / "index").unlink()
    rig = Rig(open_local(tmp_path / "store", PAGES, block_pages=4))
    entry = rig.engine.lookup.find_one(100, 0)  # type: ignore[attr-defined]
    where = rig.engine.lookup.locate(entry, 100, 0)  # type: ignore[attr-defined]
    assert len(where.runs) == 4
    assert rig.read(Block(100, 4), Block(1)) == [LOADED, LOADED]
    assert rig.delete(Block(100)) == 1
    assert_consistent(rig.engine._index)  # type: ignore[attr-defined]
    rig.engine.close()
