"""Another `storage_size` at the next opening, and files that are shorter than they should be."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from light_mem import maintenance
from light_mem.engine.base import Outcome
from light_mem.engine.local import LocalStorageEngine
from light_mem.errors import InvalidArgumentError, StoreFormatError, StoreFullError
from light_mem.index.owners import Owner, Owners
from light_mem.index.shard import ShardIndex
from tests.engine_helpers import COPIED_AND_STORED, PAGE, Block, Rig, assert_consistent, open_local
from tests.service_child import Child

LOADED, MISSING = Outcome.LOADED, Outcome.MISSING


def test_every_shard_needs_room_for_a_full_block(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        open_local(tmp_path / "store", 3, shards=2, block_pages=4)
    assert str(2 * 4 * PAGE) in str(caught.value)
    for shards in (0, -1, 1001):
        with pytest.raises(InvalidArgumentError):
            open_local(tmp_path / "store", 8, shards=shards)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("pages", [4, 7, 9, 16])
def test_a_store_opened_with_another_size_keeps_what_fits(tmp_path: Path, pages: int) -> None:
    rig = Rig(open_local(tmp_path / "store", 8))
    blocks = [Block(key, 2) for key in range(4)]
    rig.write(*blocks)
    rig.engine.close()
    rig = Rig(open_local(tmp_path / "store", pages))
    kept = min(4, pages // 2)
    assert rig.read(*blocks) == [LOADED] * kept + [MISSING] * (4 - kept)
    assert rig.engine.stats()["slots"] == pages
    assert (tmp_path / "store" / "shard-000.data").stat().st_size == 4096 + pages * PAGE
    assert (tmp_path / "store" / "shard-000.slots").stat().st_size == 4096 + pages * 64
    assert rig.write(*(Block(key) for key in range(10, 10 + pages)))[0] == COPIED_AND_STORED
    assert_consistent(rig.engine._index)  # type: ignore[attr-defined]
    rig.engine.close()


def test_a_store_that_shrinks_and_grows_again_brings_nothing_back(tmp_path: Path) -> None:
    rig = Rig(open_local(tmp_path / "store", 8))
    rig.write(*(Block(key) for key in range(8)))
    rig.engine.close()
    open_local(tmp_path / "store", 4).close()
    rig = Rig(open_local(tmp_path / "store", 8))
    assert rig.read(*(Block(key) for key in range(8))) == [LOADED] * 4 + [MISSING] * 4
    rig.engine.close()


@pytest.mark.parametrize("pages", [4, 16])
def test_a_store_that_others_have_open_keeps_its_size(
    tmp_path: Path, pages: int, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(open_local(tmp_path / "store", 8))
    rig.write(*(Block(key) for key in range(8)))
    other = Rig(open_local(tmp_path / "store", pages))
    assert "keeps its storage_size" in caplog.text
    assert other.engine.stats()["slots"] == 8
    assert other.read(*(Block(key) for key in range(8))) == [LOADED] * 8
    rig.engine.close()
    assert other.write(Block(100)) == [COPIED_AND_STORED]
    other.engine.close()


def test_who_opens_it_while_a_store_gets_another_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_local(tmp_path / "store", 16).close()
    join = Owners.join

    def late(self: Owners, kind: str) -> Owner:
        monkeypatch.undo()
        open_local(tmp_path / "store", 8).close()
        return join(self, kind)

    monkeypatch.setattr(Owners, "join", late)
    with pytest.raises(StoreFormatError, match="was given another size"):
        LocalStorageEngine(tmp_path / "store", kind="client")
    engine = open_local(tmp_path / "store", 8)
    assert engine.owners() == []
    engine.close()


def test_blocks_that_a_smaller_store_drops_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(open_local(tmp_path / "store", 8))
    rig.write(*(Block(key) for key in range(6)))
    rig.engine.close()
    caplog.set_level(logging.INFO)

    def said(pages: int) -> tuple[str, str]:
        caplog.clear()
        open_local(tmp_path / "store", pages).close()
        [record] = [r for r in caplog.records if "now holds" in r.getMessage()]
        return record.levelname, record.getMessage().split("bytes; ")[1]

    assert said(16) == ("INFO", "6 blocks are kept, 0 are dropped")
    assert said(7) == ("INFO", "6 blocks are kept, 0 are dropped")
    assert said(4) == ("WARNING", "4 blocks are kept, 2 are dropped")


def test_who_keeps_a_store_from_another_size_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here = open_local(tmp_path / "store", 8)
    open_local(tmp_path / "store", 16).close()
    assert "another service of this process has it open" in caplog.text
    here.close()
    caplog.clear()
    script = """
from pathlib import Path
from tests.engine_helpers import open_local
engine = open_local(Path(sys.argv[1]), 8)
say("open")
hear()
"""
    with Child(script, tmp_path / "store") as child:
        assert child.hear() == ["open"]
        open_local(tmp_path / "store", 16).close()
        assert "another process has it open" in caplog.text


def test_a_new_store_without_room_is_named_itself(tmp_path: Path) -> None:
    store = tmp_path / "not" / "there"
    with pytest.raises(StoreFullError, match=f"the store {store} needs"):
        open_local(store, 2**50)
    assert not (tmp_path / "not").exists()


def test_a_shard_file_that_lost_its_end_is_mended_before_it_is_mapped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(open_local(tmp_path / "store", 8))
    rig.write(*(Block(key) for key in range(8)))
    rig.engine.close()
    os.truncate(tmp_path / "store" / "shard-000.data", 4096 + 3 * PAGE)
    rig = Rig(open_local(tmp_path / "store", 8))
    assert "shard-000.data" in caplog.text
    outcomes = rig.read(*(Block(key) for key in range(8)))
    assert outcomes == [LOADED] * 3 + [Outcome.DAMAGED] * 5
    assert rig.read(*(Block(key) for key in range(8))) == [LOADED] * 3 + [MISSING] * 5
    rig.engine.close()


@pytest.mark.usefixtures("short_blocks")
def test_a_death_between_the_two_places_of_a_moved_block_leaves_one_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    rig = Rig(open_local(store, 16))
    blocks = [Block(key) for key in range(1, 13)]
    rig.write(*blocks)
    rig.delete(*blocks[:6])
    rig.engine.close()

    def die(self: ShardIndex, slot: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardIndex, "remove", die)
        with pytest.raises(KeyboardInterrupt):
            maintenance.resize(store, 8 * PAGE)
    rig = Rig(open_local(store, 16))
    assert rig.engine.stats()["blocks"] == 6
    assert rig.read(*blocks[6:]) == [LOADED] * 6
    assert rig.delete(*blocks) == 6
    assert not any(rig.find(*blocks))
    rig.engine.close()
