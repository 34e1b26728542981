"""EvictionOrder: exactly the least recently used block, against a naive model."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import pytest

from light_mem.index.format import FREE, KEEP_PINNED, LIVE, WRITING, make_tag
from light_mem.index.order import MIN_BATCH, EvictionOrder


class Shard:
    """Tags and times of use of a shard, and what the naive model says of them."""

    def __init__(self, slots: int) -> None:
        self.tags = np.zeros(slots, np.uint64)
        self.used = np.zeros(slots, np.uint64)
        self.keeps = np.zeros(slots, np.uint32)
        self.leased: set[int] = set()
        self.clock = 0
        self.order = EvictionOrder(self.tags, self.used, self.keeps, lambda: self.leased)

    def use(self, slot: int) -> None:
        self.clock += 1
        self.used[slot] = self.clock

    def store(self, slot: int) -> None:
        self.use(slot)
        self.tags[slot] = make_tag(LIVE, 0, int(self.tags[slot]) >> 32)

    def drop(self, slot: int) -> None:
        self.tags[slot] = make_tag(FREE, 0, (int(self.tags[slot]) >> 32) + 1)

    def _is_live(self) -> npt.NDArray[np.bool_]:
        return np.asarray((self.tags & np.uint64(0xFF)) == LIVE)

    def live(self) -> npt.NDArray[np.int64]:
        return np.flatnonzero(self._is_live())

    def expected(self) -> int | None:
        evictable = self.evictable()
        return int(evictable[self.used[evictable].argmin()]) if evictable.size else None

    def evictable(self) -> npt.NDArray[np.int64]:
        can_go = self._is_live() & (self.keeps >> np.uint32(31) == 0)
        can_go[list(self.leased)] = False
        return np.flatnonzero(can_go)

    def pin(self, slot: int) -> None:
        self.keeps[slot] |= np.uint32(KEEP_PINNED)

    def unpin(self, slot: int) -> None:
        """As `Retention.unpin`: the pin goes, and that counts as a use."""
        self.use(slot)
        self.keeps[slot] &= np.uint32(KEEP_PINNED - 1)

    def turn_pin(self, slot: int) -> None:
        """Pin a block, or unpin one that is pinned."""
        (self.unpin if self.keeps[slot] >> 31 else self.pin)(slot)

    def turn_lease(self, slot: int) -> None:
        """Lease a block, or end its lease."""
        if slot in self.leased:
            self.end_lease(slot)
        else:
            self.leased.add(slot)

    def end_lease(self, slot: int) -> None:
        self.use(slot)
        self.leased.discard(slot)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("slots", [5, 3 * MIN_BATCH, 20 * MIN_BATCH])
def test_the_least_recently_used_block_goes_first(seed: int, slots: int) -> None:
    rng = np.random.default_rng(seed)
    shard = Shard(slots)
    for slot in rng.permutation(slots)[: slots // 2].tolist():
        shard.store(slot)
    for _ in range(1500):
        operation, slot = rng.integers(0, 10), int(rng.integers(0, slots))
        live = shard.live()
        if operation < 4:
            expected = shard.expected()
            assert shard.order.oldest() == expected
            if expected is not None:
                shard.drop(expected)
        elif operation < 7 and slot not in live:
            shard.store(slot)
        elif live.size:
            shard.use(live[slot % len(live)])
            if operation == 9:  # taken out by someone else
                shard.drop(live[slot % len(live)])


def test_a_block_used_after_it_was_sorted_out_goes_later() -> None:
    shard = Shard(4)
    for slot in (2, 0, 3, 1):
        shard.store(slot)
    assert shard.order.oldest() == 2  # all four are sorted out now
    shard.drop(2)
    shard.use(0)
    shard.use(3)
    assert [shard.order.oldest()] == [1]
    shard.drop(1)
    assert shard.order.oldest() == 0


def test_a_sorted_out_block_that_was_used_keeps_its_place_among_the_sorted() -> None:
    shard = Shard(2 * MIN_BATCH)
    for slot in range(2 * MIN_BATCH):
        shard.store(slot)
    assert shard.order.oldest() == 0  # the oldest MIN_BATCH are sorted out, up to time MIN_BATCH
    shard.drop(0)
    shard.used[1] = 10  # another process's clock is a little behind: still among the sorted
    order = []
    while (slot := shard.order.oldest()) is not None:
        order.append(slot)
        shard.drop(slot)
    assert order[:11] == [2, 3, 4, 5, 6, 7, 8, 1, 9, 10, 11]
    assert sorted(order) == list(range(1, 2 * MIN_BATCH))


def test_blocks_being_written_and_free_slots_never_go() -> None:
    shard = Shard(4)
    assert shard.order.oldest() is None
    shard.tags[0] = make_tag(WRITING, 7, 1)
    assert shard.order.oldest() is None
    shard.store(1)
    shard.store(2)
    assert shard.order.oldest() == 1
    shard.drop(1)
    shard.tags[2] = make_tag(WRITING, 7, 2)  # its slot was taken again
    assert shard.order.oldest() is None


def test_all_blocks_used_between_two_evictions_still_go_in_order() -> None:
    shard = Shard(3 * MIN_BATCH)
    for slot in range(3 * MIN_BATCH):
        shard.store(slot)
    assert shard.order.oldest() == 0
    shard.drop(0)
    for slot in reversed(range(1, 3 * MIN_BATCH)):
        shard.use(slot)
    assert shard.order.oldest() == 3 * MIN_BATCH - 1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("slots", [5, 3 * MIN_BATCH, 20 * MIN_BATCH])
def test_the_order_is_exact_around_pins_and_leases(seed: int, slots: int) -> None:
    """At random, and more than a model of one step: the last evictions empty the shard of all
    that is neither pinned nor leased, in order of use."""
    rng = np.random.default_rng(seed)
    shard = Shard(slots)
    for slot in rng.permutation(slots)[: slots * 3 // 4].tolist():
        shard.store(slot)
    passed_over = 0
    for _ in range(1500):
        operation, slot = rng.integers(0, 12), int(rng.integers(0, slots))
        live = shard.live()
        if operation < 4:
            expected = shard.expected()
            assert shard.order.oldest() == expected
            if expected is not None:
                oldest = int(live[shard.used[live].argmin()])
                passed_over += oldest != expected
                shard.drop(expected)
        elif slot not in live:
            shard.store(slot)
            shard.keeps[slot] = 0
        elif operation < 7:
            shard.use(slot)
        elif operation < 9:
            shard.turn_pin(slot)
        elif operation < 11:
            shard.turn_lease(slot)
        elif slot not in shard.leased:  # a leased one would be HELD
            shard.drop(slot)
    assert passed_over
    kept = set(shard.live().tolist()) - set(shard.evictable().tolist())
    in_order = sorted(shard.evictable().tolist(), key=lambda each: shard.used[each])
    left = []
    while (oldest := shard.order.oldest()) is not None:
        left.append(oldest)
        shard.drop(oldest)
    assert left == in_order
    assert set(shard.live().tolist()) == kept


def test_many_pinned_and_leased_blocks_cost_an_eviction_nothing() -> None:
    shard = Shard(100 * MIN_BATCH)
    for slot in range(len(shard.tags)):
        shard.store(slot)
    for slot in range(50 * MIN_BATCH):  # the older half: met again and again, were they sorted out
        if slot % 2:
            shard.pin(slot)
        else:
            shard.leased.add(slot)
    sorted_out = 0
    refill = shard.order._refill

    def counted() -> bool:
        nonlocal sorted_out
        sorted_out += 1
        return refill()

    shard.order._refill = counted  # type: ignore[method-assign]
    for slot in range(50 * MIN_BATCH, 52 * MIN_BATCH):
        assert shard.order.oldest() == slot
        shard.drop(slot)
    assert sorted_out == 1


def test_a_batch_goes_in_order_whatever_was_used_meanwhile() -> None:
    shard = Shard(10)
    for slot in range(10):
        shard.store(slot)
    assert shard.order.oldest_many(1) == [0]
    shard.drop(0)
    shard.used[1] = 6  # as that of slot 5; another process's clock is a little behind
    assert shard.order.oldest_many(5) == [2, 3, 4, 1, 5]


def test_a_block_that_is_put_back_and_was_used_meanwhile_is_the_last_to_go() -> None:
    shard = Shard(2 * MIN_BATCH)
    for slot in range(2 * MIN_BATCH):
        shard.store(slot)
    first = shard.order.oldest_many(5)
    assert first == [0, 1, 2, 3, 4]
    shard.use(4)  # by another process, before it is put back
    shard.order.put_back(first)
    order = []
    while (slot := shard.order.oldest()) is not None:
        order.append(slot)
        shard.drop(slot)
    assert order == [0, 1, 2, 3, *range(5, 2 * MIN_BATCH), 4]


@pytest.mark.parametrize("seed", range(20))
def test_batches_of_two_processes_are_exact_around_pins_and_leases(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("light_mem.index.order.MIN_BATCH", 16)
    rng = np.random.default_rng(seed)
    shard = Shard(200)
    other = EvictionOrder(shard.tags, shard.used, shard.keeps, lambda: shard.leased)
    for slot in rng.permutation(200)[:180].tolist():
        shard.store(slot)
    for _ in range(300):
        operation, slot = int(rng.integers(0, 10)), int(rng.integers(0, 200))
        live = shard.live()
        if operation < 4:
            order = shard.order if rng.random() < 0.5 else other
            evictable = shard.evictable()
            expected = evictable[np.argsort(shard.used[evictable])].tolist()
            count = int(rng.choice([1, 2, 5, 20]))
            found = order.oldest_many(count)
            assert bool(found) == bool(expected)
            assert found == expected[: len(found)]
            takes = int(rng.integers(0, len(found) + 1))
            if takes < len(found) and rng.random() < 0.5:
                shard.use(found[-1])
            order.put_back(found[takes:])
            for each in found[:takes]:
                shard.drop(each)
        elif slot not in live:
            shard.store(slot)
            shard.keeps[slot] = 0
        elif operation < 7:
            shard.use(slot)
        elif operation == 7:
            shard.turn_pin(slot)
        elif operation == 8:
            shard.turn_lease(slot)
        elif slot not in shard.leased:
            shard.drop(slot)


@pytest.mark.parametrize("slots", [64, 8 * MIN_BATCH])
def test_what_a_clock_that_was_ahead_has_left_ages(slots: int) -> None:
    """Blocks used in the future keep their order, and are older than what is stored from now on."""
    shard, now, day = Shard(slots), time.time_ns(), 86400 * 10**9
    for slot in range(slots):
        shard.store(slot)
    shard.used[:] = now + 365 * day + np.arange(slots, dtype=np.uint64)
    shard.used[: slots // 4] = now - day + np.arange(slots // 4, dtype=np.uint64)
    gone = []
    for _ in range(slots):
        slot = shard.order.oldest()
        assert slot is not None
        gone.append(slot)
        shard.drop(slot)
        shard.tags[slot] = make_tag(LIVE, 0, int(shard.tags[slot]) >> 32)
        shard.used[slot] = time.time_ns()
    assert gone == list(range(slots))


def test_times_of_a_clock_that_was_ahead_keep_their_order_among_all() -> None:
    """It was an hour ahead for three: what was used before the last hour is not later than now."""
    shard, now, quarter = Shard(12), time.time_ns(), 15 * 60 * 10**9
    for slot in range(12):
        shard.store(slot)
        shard.used[slot] = now + 4 * quarter - (12 - slot) * quarter
    gone = []
    for _ in range(12):
        slot = shard.order.oldest()
        assert slot is not None
        gone.append(slot)
        shard.drop(slot)
    assert gone == list(range(12))
