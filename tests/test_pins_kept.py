"""Pins are kept over restarts and by the tools: resize, rebuild, evict, export and import."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import light_mem
from light_mem import LightMemError, PinLimitError, maintenance
from light_mem.engine.base import Outcome
from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.monitor import look
from tests.engine_helpers import Block
from tests.retention_helpers import A, B, C, D, Store, keys_of, pinned, store
from tests.service_rig import rig

__all__ = ["store"]  # fixtures


@pytest.mark.usefixtures("short_blocks")
def test_pins_outlive_engines_an_index_and_a_resize(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", 8)
    store.write(A, B, C, D)
    store.engine.pin(keys_of(B))
    store.close()
    for lose in (False, True):
        if lose:
            (tmp_path / "store" / "index").unlink()
        store = Store(tmp_path / "store", 8)
        assert pinned(store) == (1, 2)
        store.write(Block(5, 6))
        assert store.stored(A, B, C, D, Block(5)) == [2, 5]
        store.close()
    maintenance.resize(tmp_path / "store", 4 * 64)
    store = Store(tmp_path / "store", 4, block_pages=2)
    assert store.stored(B, Block(5)) == [2]
    assert store.rig.read(B) == [Outcome.LOADED]
    assert pinned(store) == (1, 2)
    store.close()
    assert maintenance.verify(tmp_path / "store").clean


@pytest.mark.usefixtures("short_blocks")
def test_a_store_does_not_shrink_until_more_than_half_of_it_is_pinned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path / "store", 8)
    store.write(A, B, C, D)
    store.engine.pin(keys_of(B, C))
    store.close()
    for dry_run in (True, False):
        with pytest.raises(PinLimitError, match="4 slots of shard 0 are pinned; of 6 slots"):
            maintenance.resize(tmp_path / "store", 6 * 64, dry_run=dry_run)
    store = Store(tmp_path / "store", 6, block_pages=2)
    assert "keeps its storage_size: 4 slots of shard 0 are pinned" in caplog.text
    assert store.engine.geometry.slots == 8
    assert store.stored(A, B, C, D) == [1, 2, 3, 4]
    assert store.engine.unpin(keys_of(C)) == 1
    store.close()
    assert maintenance.resize(tmp_path / "store", 6 * 64).removed == 1
    store = Store(tmp_path / "store", 6, block_pages=2)
    assert (store.engine.geometry.slots, pinned(store)) == (6, (1, 2))
    store.close()


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("state", ["lost", "of another version", "older than the pins"])
def test_nor_does_one_whose_index_is_made_anew(tmp_path: Path, state: str) -> None:
    index = tmp_path / "store" / "index"
    store = Store(tmp_path / "store", 8)
    store.write(A, B, C, D)
    control = index.read_bytes()[fmt.BLOCK_ALIGN : 2 * fmt.BLOCK_ALIGN]
    store.engine.pin(keys_of(B, C))
    store.close()
    if state == "lost":
        index.unlink()
    else:
        raw = bytearray(index.read_bytes())
        header = np.frombuffer(raw, fmt.INDEX_HEADER, 1)
        if state == "of another version":
            header["version"] = 2
            header["crc"] = fmt.header_crc(header, fmt.INDEX_HEADER_CRC)
        else:  # as after a power cut
            raw[fmt.BLOCK_ALIGN : 2 * fmt.BLOCK_ALIGN] = control
            header["clean"], header["boot_id"] = 0, b"another boot"
        del header
        index.write_bytes(raw)
    store = Store(tmp_path / "store", 6, block_pages=2)
    assert store.engine.geometry.slots == 8
    assert pinned(store) == (2, 4)
    store.close()


@pytest.mark.usefixtures("short_blocks")
def test_a_shrinking_store_keeps_pinned_blocks_before_those_used_last(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", 16)
    blocks = [Block(key, 2) for key in range(8)]
    for block in blocks:
        store.write(block)
    store.engine.pin(keys_of(blocks[0], blocks[3]))
    store.close()
    report = maintenance.resize(tmp_path / "store", 8 * 64, dry_run=True)
    assert report.blocks == 4
    maintenance.resize(tmp_path / "store", 8 * 64)
    store = Store(tmp_path / "store", 8)
    assert store.stored(*blocks) == [0, 3, 6, 7]
    assert store.rig.read(*(blocks[n] for n in (0, 3, 6, 7))) == [Outcome.LOADED] * 4
    assert pinned(store) == (2, 4)
    store.close()
    assert maintenance.verify(tmp_path / "store").clean


def test_a_forced_rebuild_under_a_server_keeps_pins(store: Store, tmp_path: Path) -> None:
    store.engine.pin(keys_of(A))
    store.engine._index.entries["keep"][:] = 0  # as garbage: the records are believed
    maintenance.rebuild(tmp_path / "store", force=True)
    assert pinned(store) == (1, 2)
    store.write(Block(5, 6))
    assert store.stored(A, B, C, D) == [1]


def test_evict_leaves_pinned_blocks(store: Store, tmp_path: Path) -> None:
    store.engine.pin(keys_of(C))
    assert maintenance.evict(tmp_path / "store", 0, dry_run=True).removed == 3
    assert maintenance.evict(tmp_path / "store", 0).removed == 3
    assert store.stored(A, B, C, D) == [3]


@pytest.mark.usefixtures("short_blocks")
def test_an_import_pins_what_was_pinned_as_far_as_may_be(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.engine.pin(keys_of(A, B))
    maintenance.export_store(tmp_path / "store", tmp_path / "file")
    report = maintenance.import_store(tmp_path / "other", tmp_path / "file", storage_size=16 * 64)
    assert report.blocks == 4
    found = {b.key: b.pinned for b in maintenance.blocks(tmp_path / "other")}
    assert found == {keymath.key_text(key, 0): key < 3 for key in range(1, 5)}
    assert not caplog.records
    other = Store(tmp_path / "third", 7, block_pages=4)  # half are three slots
    other.write(A)
    other.close()
    maintenance.export_store(tmp_path / "store", tmp_path / "file", [1, 2], overwrite=True)
    report = maintenance.import_store(tmp_path / "third", tmp_path / "file")
    assert (report.present, report.blocks) == (1, 1)
    [warning] = [r.getMessage() for r in caplog.records if "pinned" in r.getMessage()]
    assert warning.startswith("1 pinned blocks of ")
    assert sum(b.pinned for b in maintenance.blocks(tmp_path / "third")) == 1
    assert maintenance.verify(tmp_path / "other").clean


def test_a_damaged_record_stays_damaged_when_its_block_is_pinned(store: Store) -> None:
    records = store.engine.file(0).records
    slot = int(np.flatnonzero(records["low"] == A.key)[0])
    records["checksum"][slot] ^= np.uint64(1)
    before = records[slot].tobytes()
    store.engine.pin(keys_of(A))
    assert records[slot].tobytes() == before
    assert "record" in {f.kind for f in maintenance.verify(store.engine.directory).findings}


def test_the_numbers_are_shown_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from light_mem.cli import main

    with rig(tmp_path) as r:
        r.write(["a", "b", "c"], [0, 1, 2])
        assert r.service.pin(["a", "b", "nothing"]) == 2
        assert r.service.pin("a") == 1
        assert r.service.client().unpin("b") == 1
        stats = r.service.stats()
        assert (stats["pinned_blocks"], stats["pinned_slots"]) == (1, 1)
        found = look(tmp_path / "store").store
        assert (found.pinned_blocks, found.pinned_slots) == (1, 1)
        report = maintenance.inspect(tmp_path / "store")
        assert (report.pinned_blocks, report.pinned_slots) == (1, 1)
        assert main(["stats", str(tmp_path / "store")]) == 0
        assert "pinned" in capsys.readouterr().out
        assert main(["dump", str(tmp_path / "store"), "a"]) == 0
        assert "pinned; then until it is evicted" in capsys.readouterr().out
    assert issubclass(light_mem.PinLimitError, LightMemError)
