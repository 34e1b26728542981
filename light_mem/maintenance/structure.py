"""Whether one shard's entries, chains, counters, records and free space agree: no bytes are read.

The rules are the invariants 1 to 6 of docs/format.md; each finding names the one it breaks by its
kind. Works on a `Snapshot`: one taken without a lock, of a shard that others change, may show
what never was, so a finding counts only when a snapshot taken under the lock shows it too.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.index import recovery
from light_mem.index.description import Geometry
from light_mem.index.recovery import Ints
from light_mem.index.retention import Retention
from light_mem.maintenance.owners import Named
from light_mem.maintenance.report import Finding
from light_mem.maintenance.store import Snapshot, as_words, blocks_in

Bools = npt.NDArray[np.bool_]

# Words of an entry and of a record, which are the same: the state, what the block is, and its run
# and the next one in one word.
_AT = {name: fmt.RECORD.fields[name][1] // 8 for name in fmt.RECORD.names or ()}  # type: ignore[index]
_TAG, _RUNS = _AT["tag"], _AT["run"]
_RETENTION = ("pinned", "pinned_slots", "expires")
_ROWS = 1 << 13  # looked at together: what stays in a core's cache
_BLOCK = [_AT[name] for name in ("low", "high", "checksum", "nbytes")]
_KEEP_IN_RECORD = _AT["keep"]  # its low half; the high half of that word in an entry
_TAKEN = (fmt.WRITING, fmt.HELD)  # states of what is not stored and has slots


class StructureCheck:
    """The check of one snapshot. `settled=False`: the shard's holder died in the middle of a
    change, so chains, counters and free space are whatever they are until the next one."""

    def __init__(
        self, snapshot: Snapshot, geometry: Geometry, named: Named, settled: bool = True
    ) -> None:
        self._s = snapshot
        self._g = geometry
        self._named = named
        self._settled = settled
        self._entries = snapshot.entries
        self._states = recovery.states_of(snapshot.entries)
        self._live = self._states == fmt.LIVE
        self._heads, self._several = blocks_in(snapshot.entries, geometry.page_bytes)
        self._mixed = keymath.mix(as_words(snapshot.entries)[:, :2])  # of low and high

    def findings(self) -> list[Finding]:
        """Everything that is wrong, by kind."""
        checks = [self._senseless, self._misplaced, self._records]
        if self._settled:
            checks += [self._space, self._extents, self._chains, self._counts]
            checks += [self._stale, self._leaks]
        return [finding for check in checks for finding in check()]

    def _say(self, kind: str, slot: int, problem: str) -> Finding:
        key = ""
        if slot >= 0 and self._states[slot] == fmt.LIVE:
            entry = self._entries[slot]
            key = keymath.key_text(int(entry["low"]), int(entry["high"]))
        return Finding(kind, self._s.shard, slot, key, problem)

    # --- blocks ----------------------------------------------------------------------------------

    def _senseless(self) -> Iterator[Finding]:
        for slot in np.flatnonzero(self._states > fmt.HELD).tolist():
            yield self._say("state", slot, f"entry {slot} has state {int(self._states[slot])}")
        sound = np.zeros(len(self._states), bool)
        sound[self._heads] = True
        for slot in np.flatnonzero(self._live & ~sound).tolist():
            entry = self._entries[slot]
            yield self._say(
                "runs",
                slot,
                f"a block of {int(entry['nbytes'])} bytes in slots {slot} to "
                f"{slot + int(entry['run']) - 1}, next run {int(entry['next_run']) - 1}",
            )

    def _misplaced(self) -> Iterator[Finding]:
        live = np.flatnonzero(self._live)
        mixed = self._mixed[live]
        for slot in live[keymath.shards_of(mixed, self._g.shards) != self._s.shard].tolist():
            yield self._say("place", slot, "its key belongs to another shard")
        order = np.argsort(mixed)
        close = mixed[order][:-1] == mixed[order][1:]
        if not close.any():
            return  # no two keys are alike
        live = live[np.isin(mixed, mixed[order][:-1][close])]
        low, high = self._entries["low"][live], self._entries["high"][live]
        order = np.lexsort((self._entries["used"][live], high, low))
        low, high, live = low[order], high[order], live[order]
        twin = (low[:-1] == low[1:]) & (high[:-1] == high[1:])
        for older, newer in zip(live[:-1][twin].tolist(), live[1:][twin].tolist(), strict=True):
            yield self._say("twin", older, f"slot {newer} holds a block of the same key")

    # --- space -----------------------------------------------------------------------------------

    def _space(self) -> Iterator[Finding]:
        starts, lengths = recovery.occupied_runs(self._entries)
        ends = starts + lengths
        for slot in starts[(lengths < 1) | (ends > len(self._states))].tolist():
            if not self._live[slot]:
                yield self._say("runs", slot, f"a run of {int(self._entries['run'][slot])} slots")
        if not starts.size:
            return
        reach = np.maximum.accumulate(ends)
        for at in np.flatnonzero(starts[1:] < reach[:-1]).tolist():
            other = int(np.flatnonzero(ends[: at + 1] > starts[at + 1])[0])
            yield self._say(
                "overlap", int(starts[at + 1]), f"its slots are also those of {int(starts[other])}"
            )

    def _extents(self) -> Iterator[Finding]:
        """EXTENT slots must be led to by a block that is stored, being written, or HELD."""
        led = np.zeros(len(self._states), bool)
        for runs in self._several.values():
            led[[start for start, _ in runs]] = True
        for slot in np.flatnonzero(np.isin(self._states, _TAKEN)).tolist():
            runs_ = recovery.follow_runs(self._entries, self._states, slot)
            led[[start for start, _ in runs_ or []]] = True
        for slot in np.flatnonzero((self._states == fmt.EXTENT) & ~led).tolist():
            yield self._say("extent", slot, f"slot {slot} is a further run of no block")

    def _leaks(self) -> Iterator[Finding]:
        for slot in np.flatnonzero(self._states == fmt.WRITING).tolist():
            owner = int(self._entries["tag"][slot]) >> fmt.OWNER_SHIFT & fmt.OWNER_MASK
            if (self._s.shard, slot) not in self._named.intents.get(owner, set()):
                problem = f"slot {slot} is marked as being written by owner {owner}, who is not"
                yield self._say("leak", slot, problem)
        for slot in np.flatnonzero(self._states == fmt.HELD).tolist():
            if (self._s.shard, slot) not in self._named.leases:
                yield self._say("leak", slot, f"slot {slot} is held for a lease that nobody has")

    def _counts(self) -> Iterator[Finding]:
        control = self._s.control.copy()
        said = {name: int(control[name][0]) for name in ("blocks", "used_slots", *_RETENTION)}
        Retention(control, self._entries, self._entries["used"], self._g.page_bytes).recount()
        found = {name: int(control[name][0]) for name in _RETENTION}
        found["blocks"] = int(self._live.sum())
        found["used_slots"] = int(self._entries["run"][self._states != fmt.FREE].sum())
        if said["expires"] and (said["expires"] <= found["expires"] or not found["expires"]):
            del said["expires"]  # it may be too early: then the next sweep finds nothing
        for name, number in said.items():
            if number != found[name]:
                yield self._say("count", -1, f"{name} says {number}, the entries say {found[name]}")

    # --- chains ----------------------------------------------------------------------------------

    def _chains(self) -> Iterator[Finding]:
        slots = len(self._states)
        seen = np.zeros(slots, bool)
        mine = np.full(slots, -1, np.int64)  # the bucket of each stored block
        live = np.flatnonzero(self._live)
        mine[live] = (self._mixed[live] & np.uint64(len(self._s.heads) - 1)).astype(np.int64)
        bucket = np.flatnonzero(self._s.heads)
        at = self._s.heads[bucket].astype(np.int64)
        while at.size:  # every round sees new slots or ends chains
            inside = at <= slots
            for b, link in zip(bucket[~inside].tolist(), at[~inside].tolist(), strict=True):
                yield self._say("chain", -1, f"bucket {b} leads to slot {link - 1}, behind the end")
            bucket, slot = bucket[inside], at[inside] - 1
            good = (mine[slot] == bucket) & ~seen[slot]
            for b, s in zip(bucket[~good].tolist(), slot[~good].tolist(), strict=True):
                yield self._say("chain", s, f"bucket {b} leads to slot {s}, {self._not(s, seen)}")
            bucket, slot = bucket[good], slot[good]
            seen[slot] = True
            at = self._entries["next"][slot].astype(np.int64)
            bucket, at = bucket[at > 0], at[at > 0]
        for slot in np.flatnonzero(self._live & ~seen).tolist():
            yield self._say("unchained", slot, "no look-up reaches it")

    def _not(self, slot: int, seen: Bools) -> str:
        if not self._live[slot]:
            return "where no block is stored"
        return "a second time" if seen[slot] else "which belongs to another bucket"

    # --- records ---------------------------------------------------------------------------------

    def _records(self) -> Iterator[Finding]:
        for slot in self.without_record():
            yield self._say("record", slot, "its record is missing or tells of another block")

    def without_record(self) -> list[int]:
        """First slots of blocks whose records, one a run, do not fit the entry."""
        heads = self._heads
        fits = self._record_fits(heads, heads, fmt.LIVE)
        missing = set(heads[~fits].tolist())
        for head, runs in self._several.items():
            further = np.array([start for start, _ in runs[1:]])
            if not self._record_fits(further, np.full(len(further), head), fmt.EXTENT).all():
                missing.add(head)
        return sorted(missing)

    def _record_fits(self, slots: Ints, heads: Ints, state: int) -> Bools:
        """Whether the records of runs at `slots` are sound, and say what the entries say: those
        of `heads` about the block, their own about the run."""
        fits = np.empty(len(slots), bool)
        for first in range(0, len(slots), _ROWS):
            part = slice(first, first + _ROWS)
            fits[part] = self._part_fits(slots[part], heads[part], state)
        return fits

    def _part_fits(self, slots: Ints, heads: Ints, state: int) -> Bools:
        records, entries = as_words(self._s.records)[slots], as_words(self._entries)
        told = entries[heads]
        fits = fmt.states_of(records[:, _TAG]) == state
        for word in _BLOCK:
            fits &= records[:, word] == told[:, word]
        fits &= records[:, _RUNS] == entries[slots, _RUNS]
        if state == fmt.LIVE and self._settled:  # else a pin may be in one and not the other yet
            keep = records[:, _KEEP_IN_RECORD] & np.uint64(2**32 - 1)
            fits &= keep == told[:, _KEEP_IN_RECORD] >> np.uint64(32)
        fits &= recovery.crc_fits(records.view(fmt.RECORD).reshape(-1))
        return np.asarray(fits)

    def _stale(self) -> Iterator[Finding]:
        records = self._s.records
        listed = recovery.states_of(records) == fmt.LIVE
        listed &= (self._states != fmt.LIVE) & (self._states != fmt.WRITING)
        suspects = np.flatnonzero(listed)
        for slot in suspects[recovery.crc_fits(records[suspects])].tolist():
            record = records[slot]
            key = keymath.key_text(int(record["low"]), int(record["high"]))
            problem = "a record of a block that is not stored"
            yield Finding("stale", self._s.shard, slot, key, problem)
