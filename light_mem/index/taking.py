"""How blocks leave a shard, and how a shard is put in order after a death.

remove  tag FREE with a new generation -> cut from the chain -> slots may be used again: a reader
        that copied from the slots sees another tag
hold    what is leased becomes HELD instead of FREE: unlisted all the same, its slots stay taken
        until its last lease has ended
"""

from __future__ import annotations

from collections.abc import Set

import numpy as np

from light_mem.index import format as fmt
from light_mem.index.chains import Chains
from light_mem.index.control import Control
from light_mem.index.file import IndexFile
from light_mem.index.leases import ShardLeases
from light_mem.index.lookup import Lookup
from light_mem.index.recovery import link_chains, older_twins, sound_blocks
from light_mem.index.replica import SpaceReplica
from light_mem.index.retention import Retention
from light_mem.index.runs import Run


class Taking:
    """Takes blocks out of one shard, under its lock."""

    def __init__(
        self,
        file: IndexFile,
        shard: int,
        lookup: Lookup,
        chains: Chains,
        space: SpaceReplica,
        retention: Retention,
        leases: ShardLeases,
    ) -> None:
        self._shard = shard
        self._lookup = lookup
        self._chains = chains
        self._space = space
        self._retention = retention
        self._leases = leases
        self._page_bytes = file.geometry.page_bytes
        control, self._heads, self._entries, _ = file.of_shard(shard)
        self._control = Control(control)
        self._tags = self._entries["tag"]
        self._tag_of, self._nbytes_of = self._tags.data, self._entries["nbytes"].data

    def remove(self, slot: int) -> None:
        """Take out the stored block at `slot`; its slots are free, or HELD while it is leased."""
        if slot in self._leases.slots() and self._hold(slot):
            self._cut(slot)
            return
        runs = self.take_out(slot)
        if runs is not None:
            self.free_runs(runs)

    def take_out(self, slot: int) -> list[Run] | None:
        """Make a stored block invisible; returns its runs, which are not among the free ones yet.
        None: its entry was damaged, and the shard has been put in order."""
        runs = self._lookup.runs(self._shard, slot, self._nbytes_of[slot])
        self.free_tags([slot] if runs is None else [start for start, _ in runs])
        self._cut(slot)
        if runs is None:
            self.put_in_order()  # what it held is what no other block holds
        return runs

    def _cut(self, slot: int) -> None:
        self._retention.leaves(slot)
        self._chains.cut_out(slot)
        self._control.unlinks += 1
        self._control.blocks -= 1

    def _hold(self, slot: int) -> bool:
        """Whether the block at `slot` makes sense, and so is HELD now."""
        if self._lookup.runs(self._shard, slot, int(self._entries["nbytes"][slot])) is None:
            return False
        self._tag_of[slot] = fmt.next_tag(self._tag_of[slot], fmt.HELD)
        return True

    def release(self, slot: int, leased: Set[int]) -> None:
        """A lease on the block at `slot` ends; `leased` are those that go on. The slots are free
        when it has been taken out and that was the last one."""
        self._leases.forget()
        if fmt.state_of(self._tags[slot]) == fmt.HELD and slot not in leased:
            self.give_back(slot)

    def give_back(self, slot: int) -> None:
        """Free the slots of a block that is not visible: it was being written, or is HELD."""
        runs = self._lookup.runs(self._shard, slot)
        self.free_tags([slot] if runs is None else [start for start, _ in runs])
        if runs is None:
            self.put_in_order()
        else:
            self.free_runs(runs)

    def free_tags(self, starts: list[int]) -> None:
        """Nothing begins at these slots any more."""
        tags = self._tag_of
        for start in starts:
            tags[start] = fmt.next_tag(tags[start], fmt.FREE)

    def free_runs(self, runs: list[Run]) -> None:
        """These runs may be used again."""
        if not self._space.free(runs):
            self.put_in_order()  # damaged entries: two blocks in the same slots

    def clear(self) -> list[int]:
        """Take out all stored blocks; returns their first slots. Blocks being written stay so."""
        live = np.flatnonzero(fmt.states_of(self._tags) == fmt.LIVE)
        self._control.removals += int(live.size)
        slots: list[int] = live.tolist()
        self._unlist(slots)
        self.put_in_order()
        return slots

    def _unlist(self, slots: list[int]) -> None:
        """Have stored blocks FREE or HELD; chains, counts and free space are to be made anew."""
        leased = self._leases.slots()
        for slot in slots:
            if slot in leased and self._hold(slot):
                continue
            runs = self._lookup.runs(self._shard, slot, int(self._entries["nbytes"][slot]))
            self.free_tags([slot] if runs is None else [start for start, _ in runs])

    def put_in_order(self) -> None:
        """Chains, counts and free space anew from the entries; what makes no sense is freed.

        In a hold that must not scan it raises ScanNeeded, which leaves it to the next holder.
        """
        self._space.check_scan()
        self._control.dirty = fmt.RELINKING  # before the first chain is touched
        sound = sound_blocks(self._entries, self._page_bytes)
        wrong = fmt.states_of(self._tags) != fmt.FREE
        wrong[sound] = False
        self.free_tags(np.flatnonzero(wrong).tolist())
        self._leases.announce()  # a control page made anew does not know
        self._unlist(older_twins(self._entries))
        link_chains(self._entries, self._heads, len(self._heads))
        states = fmt.states_of(self._tags)
        self._control.blocks = int(np.count_nonzero(states == fmt.LIVE))
        used = int(self._entries["run"][states != fmt.FREE].sum())
        used += sum(length for _, length in self._space.unmarked)
        self._control.used_slots = used
        self._retention.recount()
        self._control.unlinks += 1
        # Further than the journal reaches: every replica reads the entries.
        self._control.epoch += fmt.JOURNAL_LENGTH + 1
        self._space.read()
        self._control.dirty = fmt.CHANGING
