"""Leases: whoever evicts, deletes or drops a leased block leaves its slots alone until they end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from light_mem import LeaseLimitError, maintenance
from light_mem.engine.base import Outcome
from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from tests.engine_helpers import Block, assert_consistent
from tests.retention_helpers import A, B, C, D, Store, Two, holds, lease, two

__all__ = ["two"]  # fixtures


def test_eviction_passes_leased_blocks_over(two: Two) -> None:
    viewer, writer = two
    leased = lease(viewer, A)
    viewer.rig.find(B, C, D, touch=True)  # A is the oldest
    assert writer.write(Block(5, 2), Block(6, 2)) == ["STORED"] * 2
    assert writer.stored(A, B, C, D) == [1, 4]
    assert holds(viewer, leased, A)
    viewer.engine.end_lease(leased)
    assert writer.write(Block(7, 4)) == ["STORED"]  # its end counted as a use
    assert writer.stored(A, D, Block(5), Block(6), Block(7)) == [1, 6, 7]
    writer.write(Block(8, 4))
    assert A.key not in writer.stored(A)


@pytest.mark.parametrize("how", ["delete", "clear", "replace", "damage"])
def test_a_block_taken_out_under_a_lease_keeps_its_slots_until_the_last_one_ends(
    two: Two, how: str
) -> None:
    viewer, other = two
    first, second, third = lease(viewer, A), lease(viewer, A), lease(other, A)
    if how == "delete":
        assert other.rig.delete(A) == 1
    elif how == "clear":
        assert other.engine.clear() == 4
    elif how == "replace":
        other.rig.delete(D)
        assert other.write(Block(A.key, 1)) == ["STORED"]
        assert other.rig.delete(Block(A.key)) == 1
    else:
        low, high = keymath.as_key(A.key)
        entry = other.engine.lookup.find_one(low, high)
        other.engine.drop_damaged(0, first.slot, other.engine.lookup.tag(entry), low, high)
    assert other.stored(A) == []
    assert other.states()[fmt.HELD - 1] == 1
    assert_consistent(other.engine._index)
    blocks = [Block(key) for key in range(20, 40)]
    other.write(*blocks)
    assert len(other.stored(*blocks)) == 6  # all the room but that of A
    for leased in (first, third):
        assert holds(viewer, leased, A)
        (viewer if leased is first else other).engine.end_lease(leased)
        assert other.states()[fmt.HELD - 1] == 1
    viewer.engine.end_lease(second)
    assert other.states()[fmt.HELD - 1] == 0
    assert other.engine.free_slots(0) == 2
    other.write(A)
    assert other.rig.read(A) == [Outcome.LOADED]


def test_a_block_deleted_under_a_lease_can_be_written_and_viewed_again(two: Two) -> None:
    viewer, other = two
    old = lease(viewer, A)
    other.rig.delete(A, D)
    assert other.write(A) == ["STORED"]
    new = lease(viewer, A)
    assert old.slot != new.slot
    assert holds(viewer, old, A)
    assert holds(viewer, new, A)
    viewer.engine.end_lease(old)
    assert other.states()[fmt.HELD - 1] == 0
    assert other.stored(A) == [1]
    viewer.engine.end_lease(new)


@pytest.mark.parametrize("spoil", ["nothing", "entries"])
def test_a_forced_rebuild_leaves_what_is_held(two: Two, tmp_path: Path, spoil: str) -> None:
    viewer, other = two
    gone, stays = lease(viewer, A), lease(viewer, C)
    other.rig.delete(A)
    if spoil == "entries":  # the records say where the others lie
        slots = [n for n in range(8) if n not in (gone.slot, gone.slot + 1)]
        other.engine._index.entries["low"][slots] += np.uint64(1000)
    maintenance.rebuild(tmp_path / "store", force=True)
    assert other.stored(A, B, C, D) == [2, 3, 4] or spoil == "entries"
    for leased, block in ((gone, A), (stays, C)):
        other.write(Block(7, 2), Block(8, 2), Block(9, 2))
        assert holds(viewer, leased, block)
        viewer.engine.end_lease(leased)
    assert other.states()[fmt.HELD - 1] == 0
    assert_consistent(other.engine._index)


def test_half_of_a_shard_may_be_leased_and_each_block_counts_once(two: Two) -> None:
    viewer, other = two
    open_now = [(viewer, lease(viewer, A)), (viewer, lease(viewer, A)), (other, lease(other, A))]
    open_now.append((other, lease(other, B)))
    with pytest.raises(LeaseLimitError) as caught:
        viewer.engine.lease(*keymath.as_key(C.key))
    error = caught.value
    assert (error.shard, error.leased, error.needed, error.limit) == (0, 4, 2, 4)  # type: ignore[attr-defined]
    assert int(viewer.engine._index.control["dirty"][0]) == 0
    for store, leased in open_now:
        store.engine.end_lease(leased)
    viewer.engine.end_lease(lease(viewer, C))


def test_a_process_has_room_for_so_many_leases(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", 4 * fmt.MAX_LEASES)
    blocks = [Block(key) for key in range(fmt.MAX_LEASES + 1)]
    store.write(*blocks)
    leased = [lease(store, block) for block in blocks[:-1]]
    leased.append(lease(store, blocks[0]))  # once more on one block takes no room
    with pytest.raises(LeaseLimitError) as caught:
        store.engine.lease(*keymath.as_key(blocks[-1].key))
    assert caught.value.shard == -1  # type: ignore[attr-defined]
    for each in leased:
        store.engine.end_lease(each)
    store.engine.end_lease(lease(store, blocks[-1]))
    store.close()


def test_a_shard_without_leases_is_not_looked_at_for_them(two: Two) -> None:
    viewer, writer = two
    asked = 0
    real = writer.engine.leases.of_shard

    def counted(*args: int, **more: int) -> set[int]:
        nonlocal asked
        asked += 1
        return real(*args, **more)

    writer.engine._open._indexes.clear()  # made anew below, over what counts
    writer.engine.leases.of_shard = counted  # type: ignore[method-assign]
    writer.write(Block(5))
    assert asked == 0
    viewer.engine.end_lease(lease(viewer, D))
    writer.write(Block(6), Block(7))
    assert asked == 1  # found none, and says so in the control page
    writer.write(Block(8), Block(9))
    assert asked == 1
    del writer.engine.leases.of_shard


def test_a_damaged_block_is_no_view_and_is_dropped(two: Two) -> None:
    viewer, _ = two
    low, high = keymath.as_key(A.key)
    slot = viewer.engine.lookup.find_one(low, high)
    viewer.engine.file(0).bytes(slot, 1)[5] ^= 1
    assert viewer.engine.lease(low, high) is None
    assert viewer.stored(A) == []
    assert viewer.engine.stats()["damaged"] == 1
    assert viewer.states()[fmt.HELD - 1] == 0
    assert viewer.engine.leases.open == 0


def test_a_damaged_lease_beyond_the_shard_is_of_no_block(two: Two) -> None:
    viewer, other = two
    words = other.engine.leases._words
    words[1] = fmt.slot_word(0, 1 << 17)
    for store, block in ((viewer, A), (other, B)):
        leased = lease(store, block)
        assert holds(store, leased, block)
        store.engine.end_lease(leased)
    words[1] = 0
    assert_consistent(viewer.engine._index)
