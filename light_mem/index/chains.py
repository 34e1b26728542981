"""The chains of one shard: a head a bucket, and each entry's link to the next.

Changed under the shard's lock while look-ups walk them without one, so every change is a single
store that leaves a chain which exists: entry -> tag -> head to put in, one link to cut out.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.index.keys import U64Array

Slots = npt.NDArray[np.int64]
FEW = 3  # up to here Python ints are faster than numpy calls


class Chains:
    """Heads uint32 [buckets] (slot + 1, 0: empty) and links of one shard's entries."""

    def __init__(self, heads: npt.NDArray[np.uint32], entries: npt.NDArray[np.void]) -> None:
        self._heads = heads
        self._next = entries["next"]
        self._tags = entries["tag"]
        self._low, self._high = entries["low"], entries["high"]
        self._mask = len(heads) - 1
        self._mask64 = np.uint64(self._mask)

    def begun(self, mixed: U64Array) -> npt.NDArray[np.bool_]:
        """Which mixed keys' chains hold any entry at all, bool [n]."""
        return np.asarray(self._heads[self._buckets(mixed)] != 0)

    def _buckets(self, mixed: U64Array) -> Slots:
        return np.asarray(mixed & self._mask64, np.int64)

    def put_in(self, slot: int, low: int, high: int, tag: int) -> None:
        """Make the block of an entry, whose other fields are in place, visible."""
        self._put(keymath.mix_one(low, high) & self._mask, slot, tag)

    def _put(self, bucket: int, slot: int, tag: int) -> None:
        self._next[slot] = self._heads[bucket]
        self._tags[slot] = tag
        self._heads[bucket] = slot + 1

    def put_in_many(self, slots: Slots, mixed: U64Array, tags: npt.NDArray[np.uint64]) -> None:
        """`put_in` for different blocks, by their mixed keys."""
        buckets = self._buckets(mixed)
        if not _all_differ(buckets):
            for bucket, slot, tag in zip(
                buckets.tolist(), slots.tolist(), tags.tolist(), strict=True
            ):
                self._put(bucket, slot, tag)
            return
        self._next[slots] = self._heads[buckets]
        self._tags[slots] = tags
        self._heads[buckets] = slots + 1

    def cut_out(self, slot: int) -> None:
        """Take the entry of a slot out of its chain; its tag says already that it is free."""
        mixed = keymath.mix_one(int(self._low[slot]), int(self._high[slot]))
        self._cut(mixed & self._mask, slot)

    def cut_out_many(self, slots: Slots) -> None:
        """`cut_out` for several."""
        if len(slots) <= FEW:
            for slot in slots.tolist():
                self.cut_out(slot)
            return
        buckets = self._buckets(keymath.mix_columns(self._low[slots], self._high[slots]))
        # Two of one chain may follow each other: each cut must see the one before.
        first = self._heads[buckets] == slots + 1
        if not _all_differ(buckets):
            first[:] = False
        elif first.all():
            self._heads[buckets] = self._next[slots]
            return
        self._heads[buckets[first]] = self._next[slots[first]]
        for bucket, slot in zip(buckets[~first].tolist(), slots[~first].tolist(), strict=True):
            self._cut(bucket, slot)

    def _cut(self, bucket: int, slot: int) -> None:
        link, following = slot + 1, int(self._next[slot])
        at = int(self._heads[bucket])
        if at == link:
            self._heads[bucket] = following
            return
        slots = len(self._next)
        for _ in range(slots):  # a damaged chain may be a ring
            if not 0 < at <= slots:
                return
            after = int(self._next[at - 1])
            if after == link:
                self._next[at - 1] = following
                return
            at = after


def _all_differ(numbers: npt.NDArray[np.int64]) -> bool:
    return len(set(numbers.tolist())) == len(numbers)


def tags_of(state: int, owner: int, generations: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """`format.make_tag` for many generations."""
    mask, shift = np.uint64(fmt.GENERATION_MASK), np.uint64(fmt.GENERATION_SHIFT)
    return np.asarray((generations & mask) << shift | np.uint64(state | owner << fmt.OWNER_SHIFT))


def next_generations(tags: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The generations that follow those of these tags."""
    return np.asarray((tags >> np.uint64(fmt.GENERATION_SHIFT)) + np.uint64(1))
