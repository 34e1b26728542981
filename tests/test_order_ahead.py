"""EvictionOrder: what was sorted out ahead, without the lock, leaves the order exact."""

from __future__ import annotations

import time

import numpy as np
import pytest

from light_mem.index.order import MAX_AHEAD, MAX_LOOKS, MIN_BATCH
from tests.test_order import Shard


def filled(slots: int) -> Shard:
    shard = Shard(slots)
    for slot in range(slots):
        shard.store(slot)
    return shard


def drained(shard: Shard) -> list[int]:
    """What `oldest_at_hand` gives, each block evicted."""
    order: list[int] = []
    while (slot := shard.order.oldest_at_hand()) is not None:
        order.append(slot)
        shard.drop(slot)
    return order


def test_nothing_is_at_hand_before_it_is_sorted_out() -> None:
    shard = filled(8)
    assert shard.order.is_running_low
    assert shard.order.oldest_at_hand() is None
    assert shard.order.sort_out(frozenset(), shard.clock + 1)
    assert not shard.order.is_running_low
    assert drained(shard) == list(range(8))
    assert shard.order.is_running_low


@pytest.mark.parametrize("slots", [5 * MIN_BATCH, 20 * MAX_AHEAD])
def test_the_oldest_part_is_at_hand(slots: int) -> None:
    shard = filled(slots)
    assert shard.order.sort_out(frozenset(), shard.clock + 1)
    assert drained(shard) == list(range(min(max(MIN_BATCH, slots // 8), MAX_AHEAD)))


def test_what_was_used_or_stored_while_it_was_sorted_out_is_no_candidate() -> None:
    """Such a block may be older than one that this scan has passed before it was published."""
    shard = filled(8)
    shard.drop(7)
    moment = shard.clock + 1
    shard.use(2)
    shard.store(7)
    assert shard.order.sort_out(frozenset(), moment)
    assert drained(shard) == [0, 1, 3, 4, 5, 6]
    assert not shard.order.sort_out(frozenset(), moment)  # nothing else is that old
    assert shard.order.sort_out(frozenset(), shard.clock + 1)
    assert drained(shard) == [2, 7]


def test_a_pin_or_a_lease_of_that_moment_is_respected_and_its_end_is_a_use() -> None:
    shard = filled(6)
    shard.pin(0)
    moment = shard.clock + 1
    shard.unpin(0)
    shard.end_lease(1)
    assert shard.order.sort_out(frozenset([1]), moment)
    shard.pin(2)
    shard.leased.add(3)
    assert drained(shard) == [4, 5]


def test_times_in_the_future_are_left_to_who_holds_the_lock() -> None:
    shard = filled(4)
    shard.used[3] = time.time_ns() + 10**12
    assert not shard.order.sort_out(frozenset(), time.time_ns())
    assert shard.order.oldest_at_hand() is None


def test_a_search_among_what_others_have_taken_ends_early_and_goes_on_with_new_ones() -> None:
    shard = filled(4 * MAX_LOOKS)
    assert shard.order.sort_out(frozenset(), shard.clock + 1)
    for slot in range(2 * MAX_LOOKS):
        shard.drop(slot)
    assert shard.order.oldest_at_hand() is None
    assert shard.order.sort_out(frozenset(), shard.clock + 1)
    assert drained(shard) == list(range(2 * MAX_LOOKS, 4 * MAX_LOOKS))


@pytest.mark.parametrize("seed", range(8))
def test_the_order_is_exact_whatever_happens_before_during_and_after(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others store, use, evict, pin and lease blocks; what was sorted out may be very old."""
    monkeypatch.setattr("light_mem.index.order.MIN_BATCH", 16)
    rng = np.random.default_rng(seed)
    shard = Shard(200)
    for slot in rng.permutation(200)[:180].tolist():
        shard.store(slot)
    moment, leased = shard.clock + 1, frozenset(shard.leased)
    given = 0
    for _ in range(3000):
        operation, slot = int(rng.integers(0, 24)), int(rng.integers(0, 200))
        live = shard.live()
        if operation < 6:
            expected = shard.expected()
            found = shard.order.oldest_at_hand()
            if found is not None:
                given += 1
                assert found == expected
                shard.drop(found)
        elif operation == 6:
            moment, leased = shard.clock + 1, frozenset(shard.leased)
        elif operation == 7:
            shard.order.sort_out(leased, moment)
        elif operation == 8 and live.size:  # by another process
            expected = shard.expected()
            if expected is not None:
                shard.drop(expected)
        elif slot not in live:
            shard.store(slot)
            shard.keeps[slot] = 0
        elif operation < 12:
            shard.use(slot)
        elif operation < 14:
            shard.turn_pin(slot)
        elif operation < 16:
            shard.turn_lease(slot)
    assert given > 200
