"""The slots that one process is filling, as its owner record announces them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from light_mem.engine import removing
from light_mem.index.format import MAX_INTENTS
from light_mem.index.owners import Owner

if TYPE_CHECKING:
    from light_mem.engine.shard_file import ShardFile
    from light_mem.index.shard import ShardIndex


# Blocks written at a time. The remaining 16 intents are reserved for retries while failed blocks
# still hold theirs.
MOST_BLOCKS = MAX_INTENTS - 16


class Intents:
    """First slots that are ours, WRITING, by shard: of the blocks in hand, and of batches that
    failed. Not thread-safe."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._words: dict[int, dict[int, int]] = {}  # by shard and slot: which of the record's
        self._free = list(range(MAX_INTENTS))[::-1]

    @property
    def shards(self) -> list[int]:
        """Shards in which slots are ours."""
        return [shard for shard, words in self._words.items() if words]

    @property
    def count(self) -> int:
        """How many slots are announced."""
        return sum(map(len, self._words.values()))

    def announce(self, shard: int, slots: Sequence[int]) -> None:
        """Announce that these slots of one shard, and no others of it, are being filled. What is
        announced in other shards, where a lock could not be had, stays announced: it is given back
        at our next write, when we leave, or at our death. MAX_INTENTS at most in all."""
        words = self._words.setdefault(shard, {})
        if words:
            self.forget(shard, set(words).difference(slots))
        new = [slot for slot in slots if slot not in words]
        assert len(new) <= len(self._free), f"{self.count + len(new)} slots to announce"
        for slot in new:
            at = words[slot] = self._free.pop()
            self._owner.announce(at, (shard, slot))

    def forget(self, shard: int, slots: Iterable[int]) -> None:
        """These are published, or were given back."""
        words = self._words.get(shard, {})
        for slot in slots:
            at = words.pop(slot, None)
            if at is not None:
                self._owner.withdraw(at)
                self._free.append(at)

    def give_back(
        self, shard: int, index: ShardIndex, file: ShardFile, but: Sequence[int] = ()
    ) -> None:
        """Free the slots that failed batches left in a shard, all `but` those still in hand; under
        its lock. The caller must then `announce` those in hand."""
        for slot in self._words.get(shard, ()):
            if slot not in but and index.is_marked(slot, self._owner.number):
                removing.give_back(index, file, slot)
