"""Pins: left alone by eviction and expiry, at most half of a shard."""

from __future__ import annotations

import errno
import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest

from light_mem import LightMemError, PinLimitError, maintenance
from light_mem.engine import writing
from light_mem.engine.base import Outcome
from light_mem.engine.shard_file import ShardFile
from light_mem.index import keys as keymath
from light_mem.index import retention
from light_mem.index.order import MIN_BATCH
from tests.engine_helpers import Block, Rig, assert_consistent, open_local
from tests.retention_helpers import START, A, B, C, Clock, D, Store, keys_of, lease, pinned, store
from tests.service_rig import rig

__all__ = ["store"]  # fixtures


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


@pytest.mark.parametrize("call", [0, 1, 5])
def test_a_failure_takes_back_the_pins_of_its_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    calls, real = itertools.count(), ShardFile.set_keep

    def set_keep(file: ShardFile, slot: int, keep: int) -> None:
        if next(calls) == call:
            raise OSError(errno.EIO, "no record can be written")
        real(file, slot, keep)

    with rig(tmp_path, shards=4, slots=256, pages=256) as r:
        keys = list(range(8))
        r.write(keys, keys)
        monkeypatch.setattr(ShardFile, "set_keep", set_keep)
        with pytest.raises(OSError, match="no record"):
            r.service.pin(keys)
        assert next(calls) > call
        assert r.service.stats()["pinned_blocks"] == 0
        assert r.service.pin(keys) == 8


@pytest.mark.parametrize("kept", ["pinned", "leased", "both"])
def test_what_can_never_have_room_evicts_nothing_and_makes_nobody_wait(
    store: Store, kept: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writing, "ROOM_SECONDS", 3600.0)
    if kept != "leased":
        store.engine.pin(keys_of(A))
    leased = None
    if kept != "pinned":
        leased = store.engine.lease(*keymath.as_key(A.key))
        assert leased is not None
    large, small = Block(50, 7), Block(51, 1)
    assert store.write(large, small) == ["NO_ROOM", "STORED"]
    [said] = caplog.messages
    viewed = 2 if kept == "leased" else 0  # a pinned one is counted once
    assert "no room for a block of 7 slots in shard 0: of its 8 slots" in said
    assert f" {2 - viewed} are pinned and {viewed} viewed; unpin blocks, close views" in said
    assert store.stored(A, B, C, D, small) == [1, 3, 4, 51]  # one made room for the small one
    assert store.write(Block(52, 6)) == ["STORED"]
    assert store.stored(A, B, C, D, small, Block(52)) == [1, 52]
    assert_consistent(store.engine._index)
    if leased is not None:
        store.engine.end_lease(leased)


@pytest.mark.parametrize("kept", ["pinned", "leased"])
def test_room_that_a_shard_can_never_give_is_refused_before_anything_is_evicted(
    store: Store, kept: str
) -> None:
    """By the shard itself, whoever asks."""
    if kept == "pinned":
        store.engine.pin(keys_of(A, B))
    leases = [lease(store, block) for block in (A, B) if kept == "leased"]
    evicted: list[int] = []
    with store.engine.change(0) as (index, _):
        assert index.most_slots() == 4
        assert index.allocate(5, evicted) is None
        assert index.allocate_many([5, 5], evicted) == []
    assert evicted == []
    assert store.stored(A, B, C, D) == [1, 2, 3, 4]
    assert store.engine.stats()["evictions"] == 0
    for leased in leases:
        store.engine.end_lease(leased)


def test_what_was_taken_out_while_it_was_leased_has_no_room_to_give(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "ROOM_SECONDS", 3600.0)
    store.engine.pin(keys_of(A))
    leased = store.engine.lease(*keymath.as_key(A.key))
    assert leased is not None
    assert store.rig.delete(A) == 1
    assert store.write(Block(50, 7)) == ["NO_ROOM"]
    store.engine.end_lease(leased)
    assert store.write(Block(50, 8)) == ["STORED"]


def test_damage_of_what_is_pinned_or_leased_does_not_stop_writes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "ROOM_SECONDS", 3600.0)
    leased = store.engine.lease(*keymath.as_key(A.key))
    assert leased is not None
    index = store.engine._index
    index.control["pinned_slots"][0] |= np.uint64(1 << 40)
    index.entries["nbytes"][leased.slot] |= np.uint64(1 << 50)
    assert store.write(Block(50, 2), Block(51, 1)) == ["STORED"] * 2
    index.entries["nbytes"][leased.slot] ^= np.uint64(1 << 50)
    leases = store.engine._owners.records["leases"][store.engine._owner.number]
    leases[-1] = 1 + 99  # beyond the shard
    assert store.write(Block(52, 2)) == ["STORED"]
    leases[-1] = 0
    assert int(index.control["dirty"][0]) == 0
    store.engine.end_lease(leased)


def test_a_pin_outlives_the_length_of_its_block(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    store.engine.pin(keys_of(A))
    before = int(store.engine._index.control["removals"][0])
    assert store.write(Block(A.key, 3)) == ["STORED"]
    assert int(store.engine._index.control["removals"][0]) == before + 1
    assert pinned(store) == (1, 3)
    assert store.write(Block(A.key, 5)) == ["STORED"]
    assert pinned(store) == (0, 0)
    assert "is not pinned: more than half" in caplog.text
    control = store.engine._index.control
    left = sum(int(control[name][0]) for name in ("evictions", "removals", "blocks"))
    assert int(control["inserts"][0]) == left
    store.engine.close()
    assert maintenance.verify(store.engine.directory).clean  # records and entries agree


def test_blocks_that_replace_pinned_ones_together_pin_half_a_shard_at_most(store: Store) -> None:
    store.engine.pin(keys_of(A, B))
    assert store.write(Block(A.key, 3), Block(B.key, 3)) == ["STORED", "STORED"]
    assert pinned(store) == (1, 3)


@pytest.mark.parametrize("turn", [1, -1])
def test_a_block_that_becomes_longer_leaves_room_for_pins_that_others_keep(
    tmp_path: Path, turn: int
) -> None:
    engine = open_local(tmp_path / "store", 16)
    rig = Rig(engine)
    before, after = [Block(1, 1), Block(2, 4)], [Block(1, 6), Block(2, 3)]
    rig.write(*before)
    engine.pin(keys_of(*before))
    rig.write(*after[::turn])
    assert rig.read(*after) == [Outcome.LOADED] * 2
    assert (engine.stats()["pinned_blocks"], engine.stats()["pinned_slots"]) == (1, 3)
    engine.close()
    assert maintenance.verify(tmp_path / "store").clean


def test_of_a_key_with_two_lengths_in_a_batch_the_last_one_stays(store: Store) -> None:
    short, long = Block(60, 1), Block(60, 2)
    assert store.write(short, long) == ["PRESENT", "STORED"]
    assert store.rig.read(long) == [Outcome.LOADED]
    assert store.write(Block(61, 2), Block(61, 1), Block(61, 1)) == ["PRESENT", "STORED", "PRESENT"]
    assert store.rig.read(Block(61, 1)) == [Outcome.LOADED]
    assert_consistent(store.engine._index)


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
