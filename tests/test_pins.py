"""Pins: left alone by eviction and expiry, kept over restarts, at most half of a shard."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import light_mem
from light_mem import LightMemError, PinLimitError, maintenance
from light_mem.engine.base import Outcome
from light_mem.index import keys as keymath
from light_mem.index import retention
from light_mem.index.order import MIN_BATCH
from light_mem.monitor import look
from tests.engine_helpers import Block, assert_consistent
from tests.retention_helpers import START, Clock, Store, keys_of
from tests.service_rig import rig

A, B, C, D = (Block(key, 2) for key in range(1, 5))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A full store of A to D, used in this order."""
    store = Store(tmp_path / "store", 8)
    store.write(A, B, C, D)
    yield store
    store.close()


def pinned(store: Store) -> tuple[int, int]:
    stats = store.engine.stats()
    return stats["pinned_blocks"], stats["pinned_slots"]


def test_eviction_leaves_pinned_blocks_alone(store: Store) -> None:
    assert store.engine.pin(keys_of(A, C, Block(99), A)) == 2
    assert pinned(store) == (2, 4)
    assert store.write(Block(5, 2), Block(6, 2)) == ["STORED"] * 2
    assert store.stored(A, B, C, D, Block(5), Block(6)) == [1, 3, 5, 6]
    assert store.write(Block(7, 4)) == ["STORED"]
    assert store.stored(A, C, Block(7)) == [1, 3, 7]
    assert_consistent(store.engine._index)
    assert store.engine.unpin(keys_of(A, C, Block(99))) == 2
    assert pinned(store) == (0, 0)
    store.write(Block(8, 2))
    assert store.stored(A, C, Block(8)) == [1, 3, 8]  # unpinning counts as a use
    store.write(Block(9, 4))
    assert store.stored(A, C, Block(8), Block(9)) == [3, 8, 9]  # A was unpinned before C


def test_at_most_half_of_a_shard_is_pinned_and_a_refusal_pins_nothing(store: Store) -> None:
    assert store.engine.pin(keys_of(A)) == 1
    with pytest.raises(PinLimitError) as caught:
        store.engine.pin(keys_of(A, B, C))
    error = caught.value
    assert isinstance(error, LightMemError)
    assert isinstance(error, OSError)
    assert (error.shard, error.pinned, error.needed, error.limit) == (0, 2, 4, 4)  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(error)).limit == 4
    assert pinned(store) == (1, 2)
    assert store.engine.pin(keys_of(A, B)) == 2  # exactly half
    assert store.engine.pin(keys_of(A, B)) == 2  # again: the same ones
    assert int(store.engine._index.control["dirty"][0]) == 0


def test_a_refusal_in_one_shard_takes_back_the_pins_of_the_others(tmp_path: Path) -> None:
    with rig(tmp_path, shards=4, slots=256, pages=256) as r:
        keys = list(range(250))
        r.write(keys, keys)
        stored = [key for key in keys if r.service.query(key)]
        before = stored[:2]
        assert r.service.pin(before) == 2
        with pytest.raises(PinLimitError):
            r.service.pin(stored)
        assert r.service.stats()["pinned_blocks"] == 2
        assert r.service.unpin(stored) == 2
        assert all(not b.pinned for b in maintenance.blocks(tmp_path / "store"))


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
    maintenance.resize(tmp_path / "store", 2 * 64)
    store = Store(tmp_path / "store", 2, block_pages=2)
    assert store.stored(B, Block(5)) == [2]
    assert store.rig.read(B) == [Outcome.LOADED]
    assert pinned(store) == (1, 2)  # more than half now, and so it stays
    with pytest.raises(PinLimitError):
        store.engine.pin(keys_of(B))
    store.close()
    assert maintenance.verify(tmp_path / "store").clean


def test_a_shrinking_store_keeps_pinned_blocks_before_those_used_last(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", 16)
    blocks = [Block(key, 2) for key in range(8)]
    for block in blocks:
        store.write(block)
    store.engine.pin(keys_of(blocks[0], blocks[3], blocks[6]))
    store.close()
    report = maintenance.resize(tmp_path / "store", 8 * 64, dry_run=True)
    assert report.blocks == 4
    maintenance.resize(tmp_path / "store", 8 * 64)
    store = Store(tmp_path / "store", 8)
    assert store.stored(*blocks) == [0, 3, 6, 7]
    assert store.rig.read(*(blocks[n] for n in (0, 3, 6, 7))) == [Outcome.LOADED] * 4
    assert pinned(store) == (3, 6)
    store.close()
    assert maintenance.verify(tmp_path / "store").clean


def test_a_forced_rebuild_under_a_server_keeps_pins(store: Store, tmp_path: Path) -> None:
    store.engine.pin(keys_of(A))
    store.engine._index.entries["keep"][:] = 0  # as garbage: the records are believed
    maintenance.rebuild(tmp_path / "store", force=True)
    assert pinned(store) == (1, 2)
    store.write(Block(5, 6))
    assert store.stored(A, B, C, D) == [1]


@pytest.mark.parametrize("how", ["delete", "clear"])
def test_pinned_blocks_can_be_taken_out(store: Store, how: str) -> None:
    store.engine.pin(keys_of(A, B))
    if how == "delete":
        assert store.rig.delete(A) == 1
        assert pinned(store) == (1, 2)
        assert store.engine.pin(keys_of(C)) == 1
    else:
        assert store.engine.clear() == 4
        assert pinned(store) == (0, 0)
    store.write(A)
    assert store.engine.unpin(keys_of(A)) == 0  # a new block of an old key is not pinned
    assert_consistent(store.engine._index)


def test_a_pinned_block_that_is_written_with_another_length_is_pinned_no_more(
    store: Store,
) -> None:
    store.engine.pin(keys_of(A))
    assert store.write(Block(A.key, 1)) == ["STORED"]
    assert pinned(store) == (0, 0)


def test_a_pin_is_beyond_time_and_gives_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    store = Store(tmp_path / "store", 8)
    store.write(A, B, time_to_live=10)
    store.engine.pin(keys_of(A))
    clock.now = START + 10
    assert store.stored(A, B) == [1]
    assert store.engine.pin(keys_of(B)) == 0  # it has expired
    store.write(Block(5, 6))
    assert store.stored(A, B, Block(5)) == [1, 5]
    assert store.engine.unpin(keys_of(A)) == 1
    assert store.stored(A) == []
    assert int(store.engine._index.control["expires"][0]) <= retention.now()
    store.write(Block(6, 2))  # takes the room of A, not that of the older one
    assert store.stored(Block(5), Block(6)) == [5, 6]
    store.close()


def test_evict_leaves_pinned_blocks(store: Store, tmp_path: Path) -> None:
    store.engine.pin(keys_of(C))
    assert maintenance.evict(tmp_path / "store", 0, dry_run=True).removed == 3
    assert maintenance.evict(tmp_path / "store", 0).removed == 3
    assert store.stored(A, B, C, D) == [3]


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


def test_a_shard_of_pinned_blocks_has_room_for_what_fits_the_rest(tmp_path: Path) -> None:
    """Many more pinned blocks than are sorted out at a time, the oldest of all."""
    slots = 8 * MIN_BATCH
    store = Store(tmp_path / "store", slots)
    old = [Block(key) for key in range(slots // 2)]
    new = [Block(key) for key in range(slots // 2, slots)]
    store.write(*old)
    assert store.engine.pin(keys_of(*old)) == len(old)
    store.write(*new)
    more = [Block(key) for key in range(slots, slots + 3 * MIN_BATCH)]
    assert store.write(*more) == ["STORED"] * len(more)
    assert len(store.stored(*old)) == len(old)
    assert store.stored(*new) == [b.key for b in new[3 * MIN_BATCH :]]
    store.close()


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
