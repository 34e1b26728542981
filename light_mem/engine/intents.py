"""The slots that one process is filling, as its owner record announces them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from light_mem.index.format import MAX_INTENTS
from light_mem.index.owners import Owner

if TYPE_CHECKING:
    from light_mem.engine.shard_file import ShardFile
    from light_mem.index.shard import ShardIndex


# Blocks of one shard that are written at a time at most. The other intents are for what follows
# when these have failed: it has to do with fewer until they are given back.
PART_BLOCKS = MAX_INTENTS - 16


class Intents:
    """First slots that are ours, WRITING, by shard: of the blocks in hand, and of batches that
    failed. Not thread-safe."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._slots: dict[int, list[int]] = {}

    @property
    def shards(self) -> list[int]:
        """Shards in which slots are ours."""
        return [shard for shard, slots in self._slots.items() if slots]

    @property
    def count(self) -> int:
        """How many slots are announced."""
        return sum(map(len, self._slots.values()))

    def announce(self, shard: int, slots: list[int]) -> None:
        """Announce the slots of one shard that are being filled, and keep announcing those that a
        failed lock left behind in others: they go back when we next write, when we leave, or at our
        death. All of them are MAX_INTENTS at most."""
        self._slots[shard] = slots
        intents = [(s, slot) for s, left in self._slots.items() for slot in left]
        assert len(intents) <= MAX_INTENTS, f"{len(intents)} slots to announce"
        self._owner.intend(intents)

    def forget(self, shard: int, slots: list[int]) -> None:
        """These are published, or were given back."""
        left: list[int] = []
        if len(slots) < len(self._slots.get(shard, ())):  # nearly never: they are all
            gone = set(slots)
            left = [slot for slot in self._slots[shard] if slot not in gone]
        self.announce(shard, left)

    def give_back(
        self, shard: int, index: ShardIndex, file: ShardFile, but: Sequence[int] = ()
    ) -> None:
        """Free what a failed batch left in a shard; under its lock. `announce` follows, of those
        that are in hand as well, `but`."""
        for slot in self._slots.get(shard, []):
            if slot not in but and index.is_marked(slot, self._owner.number):
                file.clear_records([slot])
                index.give_back(slot)
