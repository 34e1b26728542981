"""How blocks get into a shard: slots are marked while they are filled, then a block is published.

publish  fields of the entry -> tag LIVE -> head of the chain: found only when whole

Loops over words instead of numpy calls: the copies before have emptied the CPU cache, and then each
distinct numpy call costs as much as ten loop steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from light_mem.index import format as fmt
from light_mem.index.chains import Chains
from light_mem.index.control import Control
from light_mem.index.file import IndexFile
from light_mem.index.lookup import CHECKSUM, ENTRY_WORDS, HIGH, LOW, NBYTES, RUNS, STORED, TAG
from light_mem.index.retention import Retention
from light_mem.index.runs import Run
from light_mem.index.written import Written


class Putting:
    """Puts blocks into one shard, under its lock."""

    def __init__(
        self, file: IndexFile, shard: int, chains: Chains, control: Control, retention: Retention
    ) -> None:
        self._f = file
        self._first_word = file.entries_word64 + shard * file.slots * ENTRY_WORDS
        self._uses_word = file.uses_word + shard * file.slots
        self._keeps = file.of_shard(shard).entries["keep"].data
        self._chains = chains
        self._control = control
        self._retention = retention

    def mark(self, runs: list[Run], owner: int) -> None:
        """Mark allocated slots as being written by `owner`, whose intents already name them."""
        words, first, last = self._f.words64, self._first_word, len(runs) - 1
        for at, (start, length) in enumerate(runs):
            word = first + start * ENTRY_WORDS
            words[word + RUNS] = length | (runs[at + 1][0] + 1 << 32 if at < last else 0)
            state = fmt.EXTENT if at else fmt.WRITING
            words[word + TAG] = fmt.next_tag(words[word + TAG], state, owner)

    def are_marked(self, slots: list[int], owner: int) -> list[bool]:
        """Whether the blocks at these slots are still being written by `owner`."""
        words, first = self._f.words64, self._first_word + TAG
        wanted = fmt.make_tag(fmt.WRITING, owner, 0)
        below = fmt.make_tag(fmt.STATE_MASK, fmt.OWNER_MASK, 0)
        return [words[first + slot * ENTRY_WORDS] & below == wanted for slot in slots]

    def publish(
        self,
        blocks: Sequence[Written],
        mixed: Sequence[int],
        now: int,
    ) -> None:
        """Make blocks visible; `mixed`: their keys'. Their bytes and their records are in place,
        their keys differ, and none of these is stored."""
        words, first, uses = self._f.words64, self._first_word, self._uses_word
        keep_of, chains = self._keeps, self._chains
        for (low, high, checksum, size, runs, _, keep), its_mix in zip(blocks, mixed, strict=True):
            slot = runs[0][0]
            word = first + slot * ENTRY_WORDS
            words[word + LOW], words[word + HIGH] = low, high
            words[word + CHECKSUM], words[word + NBYTES], words[word + STORED] = checksum, size, now
            words[uses + slot] = now
            keep_of[slot] = keep
            if keep:
                self._retention.arrives(slot)
            chains.put_in(slot, its_mix, fmt.live_tag(words[word + TAG]))
        self._control.blocks += len(blocks)
        self._control.inserts += len(blocks)
