"""Shard files that were removed, or whose header was, and what becomes of their blocks."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from light_mem import maintenance
from light_mem.engine import shard_making
from light_mem.engine.base import Outcome
from light_mem.errors import StoreFormatError
from light_mem.index import description
from light_mem.index import format as fmt
from tests.engine_helpers import Block, Rig, assert_consistent, blocks_of_shard, open_local
from tests.test_foreign import contents

LOADED, MISSING = Outcome.LOADED, Outcome.MISSING
SLOTS, SHARDS = 12, 2
MINE = [Block(b.key, 1 + n % 2) for n, b in enumerate(blocks_of_shard(0, SHARDS, 4))]
OTHERS = blocks_of_shard(1, SHARDS, 4)


def opened(directory: Path, slots: int = SLOTS) -> Rig:
    return Rig(open_local(directory, slots, shards=SHARDS, block_pages=4))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Blocks in two shards; one of shard 0 lies in several runs, one is pinned."""
    rig = opened(tmp_path / "store")
    filler = blocks_of_shard(0, SHARDS, SLOTS, first=1000)
    rig.write(*filler)
    rig.delete(*filler[::2])
    rig.write(*MINE, *OTHERS)
    assert any(int(run) for run in rig.engine._index.entries["next_run"])  # type: ignore[attr-defined]
    rig.delete(*filler)
    rig.engine.pin(np.array([[MINE[0].key, 0]], np.uint64))  # type: ignore[attr-defined]
    rig.engine.close()
    return tmp_path / "store"


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    caplog.clear()
    return found


def test_a_new_store_warns_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened(tmp_path / "store").engine.close()
    opened(tmp_path / "store").engine.close()
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("without_index", [False, True])
def test_blocks_of_a_lost_data_file_are_misses_at_once(
    store: Path, caplog: pytest.LogCaptureFixture, without_index: bool
) -> None:
    (store / "shard-000.data").unlink()
    if without_index:
        (store / "index").unlink()
    rig = opened(store)
    [said, *more] = warnings_of(caplog)
    assert f"shard-000.data was missing and is made anew, empty; {len(MINE)} blocks" in said
    assert len(more) == without_index
    assert rig.find(*MINE, *OTHERS) == [False] * len(MINE) + [True] * len(OTHERS)
    assert rig.read(*MINE, *OTHERS) == [MISSING] * len(MINE) + [LOADED] * len(OTHERS)
    assert_consistent(rig.engine._index)  # type: ignore[attr-defined]
    assert rig.engine.stats()["pinned_slots"] == rig.engine.stats()["damaged"] == 0
    rig.engine.close()
    assert maintenance.verify(store).clean
    (store / "index").unlink()  # no record brings them back
    rig = opened(store)
    assert rig.read(*MINE, *OTHERS) == [MISSING] * len(MINE) + [LOADED] * len(OTHERS)
    rig.engine.close()


def test_a_kill_before_a_lost_data_file_is_made_leaves_it_missing(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    (store / "shard-000.data").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(shard_making, "_make_file", killed)
        with pytest.raises(Killed):
            opened(store)
    assert not (store / "shard-000.data").exists()
    rig = opened(store)
    assert rig.read(*MINE, *OTHERS) == [MISSING] * len(MINE) + [LOADED] * len(OTHERS)
    rig.engine.close()


def test_a_lost_slots_file_is_made_anew_from_the_index(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (store / "shard-000.slots").unlink()
    opened(store).engine.close()
    [said] = warnings_of(caplog)
    assert "shard-000.slots was missing" in said
    assert f"from the index, with {len(MINE)} blocks" in said
    assert maintenance.verify(store).clean
    (store / "index").unlink()
    rig = opened(store)
    assert rig.read(*MINE, *OTHERS) == [LOADED] * len(MINE + OTHERS)
    assert rig.engine.stats()["pinned_blocks"] == 1
    rig.engine.close()


def test_a_lost_slots_file_costs_no_block_of_a_store_that_gets_another_size(store: Path) -> None:
    for slots in (2 * SLOTS, SLOTS):
        (store / "shard-000.slots").unlink()
        rig = opened(store, slots)
        assert rig.read(*MINE, *OTHERS) == [LOADED] * len(MINE + OTHERS)
        rig.engine.close()
        assert maintenance.verify(store).clean


@pytest.mark.parametrize("index", ["missing", "from before a power cut"])
def test_a_lost_slots_file_without_an_index_is_said_to_cost_its_blocks(
    store: Path, caplog: pytest.LogCaptureFixture, index: str
) -> None:
    (store / "shard-000.slots").unlink()
    if index == "missing":
        (store / "index").unlink()
    else:
        with (store / "index").open("r+b") as file:
            header = np.fromfile(store / "index", fmt.INDEX_HEADER, 1)
            header["clean"], header["boot_id"] = 0, bytes(15) + b"1"
            file.write(header.tobytes())
    rig = opened(store)
    said = warnings_of(caplog)
    assert "shard-000.slots was missing" in said[0]
    assert "its blocks are lost" in said[0]
    assert "made anew with 4 blocks" in said[1]
    assert rig.read(*MINE, *OTHERS) == [MISSING] * len(MINE) + [LOADED] * len(OTHERS)
    rig.engine.close()


def test_both_files_lost_are_no_more_than_the_data_lost(store: Path) -> None:
    (store / "shard-000.data").unlink()
    (store / "shard-000.slots").unlink()
    rig = opened(store)
    assert rig.read(*MINE, *OTHERS) == [MISSING] * len(MINE) + [LOADED] * len(OTHERS)
    rig.engine.close()
    assert maintenance.verify(store).clean


def test_what_others_have_open_is_left_to_them(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = opened(store)
    first.read(*MINE, *OTHERS)  # maps the files
    (store / "shard-000.data").unlink()
    (store / "shard-001.slots").unlink()
    second = opened(store)
    data, slots = warnings_of(caplog)
    assert "found damaged as they are read" in data
    assert f"light-mem verify {store} --repair" in slots
    assert first.read(*MINE, *OTHERS) == [LOADED] * len(MINE + OTHERS)
    assert second.read(*OTHERS) == [LOADED] * len(OTHERS)
    first.engine.close()
    second.engine.close()
    assert not maintenance.verify(store, repair=True).clean
    (store / "index").unlink()
    second = opened(store)  # the advice was right
    assert second.read(*OTHERS) == [LOADED] * len(OTHERS)
    second.engine.close()


@pytest.mark.parametrize("name", ["shard-000.data", "shard-001.slots"])
def test_a_header_that_is_mended_is_said_to_be(
    store: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    with (store / name).open("r+b") as file:
        file.write(bytes(4096))
    rig = opened(store)
    [said] = warnings_of(caplog)
    assert f"['{name}'] were damaged, and are written anew" in said
    assert rig.read(*MINE, *OTHERS) == [LOADED] * len(MINE + OTHERS)
    rig.engine.close()


def test_a_file_of_another_store_is_refused_before_blocks_are_taken_out(
    store: Path, tmp_path: Path
) -> None:
    opened(tmp_path / "other").engine.close()
    (store / "shard-000.data").rename(tmp_path / "data")
    mine = (store / "shard-001.data").rename(tmp_path / "mine")
    (tmp_path / "other" / "shard-001.data").rename(store / "shard-001.data")
    before = {name: c for name, c in contents(store).items() if "." in name or name == "index"}
    with pytest.raises(StoreFormatError, match="another store"):
        opened(store)
    after = {name: c for name, c in contents(store).items() if "." in name or name == "index"}
    assert after == before
    mine.rename(store / "shard-001.data")
    (tmp_path / "data").rename(store / "shard-000.data")
    rig = opened(store)
    assert rig.read(*MINE, *OTHERS) == [LOADED] * len(MINE + OTHERS)
    rig.engine.close()


@pytest.mark.parametrize("lost", ["header", "file"])
def test_a_store_is_described_by_its_slots_files_too(tmp_path: Path, lost: str) -> None:
    rig = Rig(open_local(tmp_path / "store", 8))
    rig.write(Block(1), Block(2))
    rig.engine.close()
    before = description.load(tmp_path / "store")
    (tmp_path / "store" / "store.json").unlink()
    data = tmp_path / "store" / "shard-000.data"
    if lost == "file":
        data.unlink()
    else:
        with data.open("r+b") as file:
            file.write(bytes(4096))
    rig = Rig(open_local(tmp_path / "store", 8))
    assert rig.find(Block(1), Block(2)) == [lost == "header"] * 2
    rig.engine.close()
    assert description.load(tmp_path / "store") == before
