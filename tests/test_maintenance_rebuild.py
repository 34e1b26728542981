"""`light-mem rebuild`: all blocks come back, in their order of use, whatever the index was."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from light_mem.index import format as fmt
from light_mem.maintenance import rebuild
from tests.engine_helpers import Block
from tests.maintenance_helpers import (
    BLOCKS,
    PAGE,
    SLOTS,
    Command,
    assert_holds,
    files,
    flip,
    geometry_of,
    index_of,
    key_of,
    make_store,
    opened,
    order_of_use,
    place_of,
    records_of,
    stored,
)

# --- what happened to the index -------------------------------------------------------------------


def missing(store: Path) -> None:
    (store / "index").unlink()


def empty(store: Path) -> None:
    (store / "index").write_bytes(b"")


def garbage(store: Path) -> None:
    size = (store / "index").stat().st_size
    content = np.random.default_rng(1).integers(0, 256, size, np.uint8).tobytes()
    (store / "index").write_bytes(content)


def ones(store: Path) -> None:
    (store / "index").write_bytes(b"\xff" * (store / "index").stat().st_size)


def of_another_store(store: Path) -> None:
    other = make_store(store.parent / "other", [Block(5), Block(6, 3)])
    (store / "index").write_bytes((other / "index").read_bytes())


def of_another_size(store: Path) -> None:
    other = make_store(store.parent / "other", [Block(5)], slots=200, shards=1)
    (store / "index").write_bytes((other / "index").read_bytes())


def zero_entries(store: Path) -> None:
    index_of(store).entries[:] = np.zeros((), fmt.ENTRY)


def header(store: Path) -> None:
    """Only the header is garbage: what the entries say can still be believed."""
    with (store / "index").open("r+b") as file:
        file.write(b"garbage" * 500)


def nothing(store: Path) -> None:
    pass


def chains(store: Path) -> None:
    index_of(store).heads[:] = 12345


def dirty(store: Path) -> None:
    index_of(store).control["dirty"] = 1


LOSE_ORDER = [missing, empty, garbage, ones, of_another_store, of_another_size, zero_entries]
KEEP_ORDER = [nothing, header, chains, dirty]


@pytest.mark.parametrize("spoil", LOSE_ORDER, ids=lambda f: f.__name__)
def test_without_a_usable_entry_blocks_are_in_the_order_of_writing(
    store: Path, command: Command, spoil: Callable[[Path], None]
) -> None:
    spoil(store)
    code, report = command.json("rebuild", store)
    assert code == 0
    assert report["blocks"] == len(BLOCKS)
    assert report["kept_order"] == 0
    assert report["lost"] == 0
    assert command("verify", store) == 0
    assert_holds(store, *reversed(BLOCKS))


@pytest.mark.parametrize("spoil", KEEP_ORDER, ids=lambda f: f.__name__)
def test_where_entries_can_be_believed_the_order_of_use_is_kept(
    store: Path, command: Command, spoil: Callable[[Path], None]
) -> None:
    spoil(store)
    code, report = command.json("rebuild", store)
    assert code == 0
    assert report["kept_order"] == len(BLOCKS)
    assert command("verify", store) == 0
    assert_holds(store, *BLOCKS)


def test_of_an_index_that_was_cut_short_the_rest_is_believed(store: Path, command: Command) -> None:
    entries = fmt.index_layout(2, SLOTS).entries
    os.truncate(store / "index", entries + SLOTS * fmt.ENTRY.itemsize)  # the first shard's
    first = sum(place_of(store, block)[0] == 0 for block in BLOCKS)
    code, report = command.json("rebuild", store)
    assert code == 0
    assert report["blocks"] == len(BLOCKS)
    assert report["kept_order"] == first
    assert command("verify", store) == 0
    known = [key_of(b) for b in BLOCKS if place_of(store, b)[0] == 0]
    assert order_of_use(store)[:first] == known  # they were used after all was written


def test_a_block_was_not_used_before_it_was_stored(store: Path) -> None:
    """A power cut can leave a new block's entry, and the time of use of the one before it."""
    shard, slot = place_of(store, BLOCKS[3])
    index_of(store).uses[shard * SLOTS + slot] -= 10**18
    assert rebuild(store).kept_order == len(BLOCKS)
    assert_holds(store, *BLOCKS)


@pytest.mark.parametrize("by", ["opening", "rebuild", "rebuild without a header"])
def test_an_index_of_version_2_gives_its_order_of_use(store: Path, by: str) -> None:
    file = index_of(store)
    file.entries["used"] = file.uses  # as it was there
    file.header["version"] = 2
    file.header["crc"] = fmt.header_crc(file.header, fmt.INDEX_HEADER_CRC)
    os.truncate(store / "index", fmt.index_layout(2, SLOTS).uses)
    inserts = int(file.control["inserts"].sum())
    if by == "rebuild without a header":
        file.header["magic"] = b""
        inserts = 0  # nothing there is believed but the entries
        assert rebuild(store).kept_order == len(BLOCKS)
    elif by == "rebuild":
        assert rebuild(store).kept_order == len(BLOCKS)
    else:
        opened(store).engine.close()
    assert int(index_of(store).control["inserts"].sum()) == inserts
    assert_holds(store, *BLOCKS)


def test_an_entry_of_garbage_time_is_not_believed(store: Path) -> None:
    shard, slot = place_of(store, BLOCKS[0])
    index_of(store).uses[shard * SLOTS + slot] = 2**63
    assert rebuild(store).kept_order == len(BLOCKS) - 1
    assert order_of_use(store)[-1] == key_of(BLOCKS[0])  # it was written first


def test_counters_go_over(store: Path) -> None:
    rig = opened(store)
    rig.delete(BLOCKS[0])
    rig.engine.close()
    file = index_of(store)
    file.header["lookups"][0], file.header["hits"][0] = 70, 50
    before = [int(file.control[name].sum()) for name in ("inserts", "removals")]
    rebuild(store)
    file = index_of(store)
    assert [int(file.control[name].sum()) for name in ("inserts", "removals")] == before
    assert (int(file.header["lookups"][0]), int(file.header["hits"][0])) == (70, 50)


# --- records --------------------------------------------------------------------------------------


def test_a_block_without_a_record_is_kept_when_its_bytes_are_right(
    store: Path, command: Command
) -> None:
    for block in BLOCKS[3:6]:
        shard, slot = place_of(store, block)
        records_of(store, shard)["tag"][slot] = fmt.FREE
    flip(store, BLOCKS[5])
    code, report = command.json("rebuild", store)
    assert code == 0
    assert (report["adopted"], report["lost"]) == (2, 1)
    assert command("verify", store) == 0
    assert_holds(store, *[b for b in BLOCKS if b is not BLOCKS[5]])
    (store / "index").unlink()  # now their records are enough
    assert rebuild(store).blocks == len(BLOCKS) - 1


def test_a_damaged_record_costs_its_block_only_when_the_index_is_lost_too(
    store: Path, command: Command
) -> None:
    shard, slot = place_of(store, BLOCKS[3])
    records_of(store, shard)["nbytes"][slot] += 1
    missing(store)
    code, report = command.json("rebuild", store)
    assert code == 0
    assert report["dropped"] == 1
    assert command("verify", store) == 0
    assert stored(store) == {key_of(b) for b in BLOCKS} - {key_of(BLOCKS[3])}


def test_lost_slots_files_and_description_are_made_too(store: Path, command: Command) -> None:
    (store / "shard-000.slots").unlink()
    (store / "store.json").unlink()
    before = (geometry_of(make_store(store.parent / "twin")).slots, PAGE)
    assert command("rebuild", store) == 0
    assert (geometry_of(store).slots, geometry_of(store).page_bytes) == before
    assert command("verify", store) == 0
    assert_holds(store, *BLOCKS)


# --- dry run, others ------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", [nothing, missing, garbage, dirty], ids=lambda f: f.__name__)
def test_a_dry_run_says_what_would_be_and_changes_no_byte(
    store: Path, command: Command, spoil: Callable[[Path], None]
) -> None:
    spoil(store)
    before = files(store)
    code, report = command.json("rebuild", store, "--dry-run")
    assert code == 0
    assert report["dry_run"]
    assert report["blocks"] == len(BLOCKS)
    assert command("rebuild", store, "--dry-run") == 0
    assert "would hold" in command.out
    assert files(store) == before
    assert rebuild(store)._replace(dry_run=True, seconds=0) == rebuild(
        store, dry_run=True
    )._replace(seconds=0, kept_order=report["kept_order"])
