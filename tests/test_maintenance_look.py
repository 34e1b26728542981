"""What `light-mem inspect` and `light-mem dump` show."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest

from light_mem.index import keys as keymath
from light_mem.maintenance import inspect
from tests.engine_helpers import Block
from tests.maintenance_helpers import (
    BLOCKS,
    PAGE,
    SHARDS,
    SLOTS,
    Command,
    files,
    flip,
    index_of,
    key_of,
    make_store,
    opened,
    place_of,
    records_of,
)
from tests.payload import block_bytes_of


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_store(tmp_path / "store")


# --- inspect --------------------------------------------------------------------------------------


def test_inspect_shows_the_numbers(store: Path, command: Command) -> None:
    before = files(store)
    file = index_of(store)
    file.count(30, 20)
    code, report = command.json("inspect", store)
    assert code == 0
    pages = sum(b.pages for b in BLOCKS)
    assert report["format_version"] == 2
    assert (report["shards"], report["slots"], report["page_bytes"]) == (SHARDS, SLOTS, PAGE)
    assert report["capacity"] == SHARDS * SLOTS * PAGE
    assert (report["blocks"], report["block_bytes"]) == (len(BLOCKS), pages * PAGE)
    assert report["used_slots"] == pages
    assert (report["lookups"], report["hits"]) == (30, 20)
    assert (report["inserts"], report["evictions"], report["damaged"]) == (len(BLOCKS), 0, 0)
    assert report["owners"] == []
    assert report["index_state"] == "ok"
    assert report["oldest_use"] < report["median_use"] < report["newest_use"]
    assert sum(shard["blocks"] for shard in report["by_shard"]) == len(BLOCKS)
    assert command("inspect", store, "--shards") == 0
    for text in ("20,", "30, 20 hits, 66.7%", "0 processes", "2 of 64 slots"):
        assert text in command.out
    file.count(-30, -20)
    assert files(store) == before


def test_inspect_says_who_has_the_store_open(store: Path, command: Command) -> None:
    rig = opened(store)
    code, report = command.json("inspect", store)
    assert code == 0
    assert [(o["pid"], o["kind"]) for o in report["owners"]] == [(os.getpid(), "server")]
    assert command("inspect", store) == 0
    assert f"{os.getpid()}" in command.out
    assert "1 process\n" in command.out.replace(" ", "").replace("1process", "1 process")
    rig.engine.close()
    assert inspect(store).owners == ()


def test_inspect_without_an_index_counts_the_records(store: Path, command: Command) -> None:
    (store / "index").write_bytes(b"garbage")
    code, report = command.json("inspect", store)
    assert code == 0
    assert report["blocks"] == len(BLOCKS)
    assert report["index_state"] != "ok"
    assert report["lookups"] is None
    assert report["newest_use"] is None
    assert report["newest_write"] is not None
    assert command("inspect", store) == 0
    assert "cannot be used" in command.out


# --- dump -----------------------------------------------------------------------------------------


def test_dump_lists_every_block(store: Path, command: Command) -> None:
    before = files(store)
    code, report = command.json("dump", store)
    assert code == 0
    assert {b["key"]: b["pages"] for b in report["blocks"]} == {key_of(b): b.pages for b in BLOCKS}
    assert command("dump", store) == 0
    lines = command.out.splitlines()
    assert len(lines) == 1 + len(BLOCKS)
    assert lines[0].split()[:3] == ["key", "shard", "slot"]
    assert command("dump", store, "--limit", 3) == 0
    assert len(command.out.splitlines()) == 4
    assert files(store) == before


def test_dump_shows_a_block_and_writes_its_bytes(
    store: Path, tmp_path: Path, command: Command
) -> None:
    block = BLOCKS[3]
    code, report = command.json("dump", store, key_of(block), "--output", "block.bin")
    assert code == 0
    assert (report["key"], report["pages"], report["problem"]) == (key_of(block), 4, "")
    assert (report["shard"], report["slot"]) == place_of(store, block)
    wanted = block_bytes_of(block.key, block.pages, PAGE)
    assert (tmp_path / "block.bin").read_bytes() == wanted.tobytes()
    assert command("dump", store, f"int:{block.key}") == 0
    assert "the bytes fit it" in command.out
    assert command("dump", store, key_of(block), "--output", "block.bin") == 2  # it is there
    assert command("dump", store, "--output", "other.bin") == 2


def test_dump_of_a_hash_uses_the_servers_way_to_a_key(tmp_path: Path, command: Command) -> None:
    rig = opened(tmp_path / "store")
    for value in ("prefix", b"\x01\x02"):
        low, high = keymath.as_key(value)
        rig.write(Block(high << 64 | low))
    rig.engine.close()
    assert command("dump", tmp_path / "store", "prefix") == 0
    assert command("dump", tmp_path / "store", "hex:0102") == 0
    assert command("dump", tmp_path / "store", "0102") == 1
    key = keymath.key_text(*keymath.as_key("0102"))
    assert f"block 0102 (key {key}) is not stored" in command.err
    assert command("dump", tmp_path / "store", key) == 1
    assert f"block {key} is not stored" in command.err


def test_dump_does_not_write_damaged_bytes(store: Path, tmp_path: Path, command: Command) -> None:
    flip(store, BLOCKS[3])
    code, report = command.json("dump", store, key_of(BLOCKS[3]), "--output", "block.bin")
    assert code == 1
    assert report["problem"] == "its bytes do not fit its checksum"
    assert not (tmp_path / "block.bin").exists()


def test_dump_says_when_a_block_has_no_record(store: Path, command: Command) -> None:
    shard, slot = place_of(store, BLOCKS[0])
    records_of(store, shard)["tag"][slot] = 0
    assert command("dump", store, key_of(BLOCKS[0])) == 0
    assert "no record" in command.out


def test_a_block_for_which_there_is_no_room_leaves_no_file(store: Path, command: Command) -> None:
    block = BLOCKS[3]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (block.pages * PAGE - 1, before[1]))
    try:
        assert command("dump", store, key_of(block), "--output", store.parent / "b") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.strerror(errno.EFBIG) in command.err
    assert not (store.parent / "b").exists()
    assert command("dump", store, key_of(block), "--output", store.parent / "b") == 0
    assert (store.parent / "b").stat().st_size == block.pages * PAGE
