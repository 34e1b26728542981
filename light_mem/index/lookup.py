"""Look-ups without a lock.

A bucket's head and an entry's `next` are single stores, so a reader always walks a chain that
exists or existed. What it may meet is an entry that was taken out and used again for another key:
the walk then leaves its chain and ends too early. So a look-up that misses looks once more when a
chain of that shard was cut meanwhile; walks are bounded, so that not even a damaged index holds
anyone. A key is compared between two reads of the tag, which changes with every change of an
entry's life.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from light_mem.index import keys as keymath
from light_mem.index import retention
from light_mem.index.file import IndexFile
from light_mem.index.format import CONTROL, ENTRY, EXTENT, LIVE, STATE_MASK
from light_mem.index.keys import KeyArray, MixedKeys
from light_mem.index.runs import Run

MAX_CHAIN = 4096  # steps; chains are a few entries long, a longer one is damage
RETRIES = 3
# Up to this many keys Python ints are faster than numpy calls: 1.5 us per key against 43 us for any
# number of them. Right after a batch was copied the CPU cache is cold for both; then loops win up
# to about 60 keys: use `find_each` and `locate_each` there.
SCALAR_LIMIT = 24

_NAMES = ("low", "high", "tag", "checksum", "nbytes", "used", "run")
_W64 = {name: ENTRY.fields[name][1] // 8 for name in _NAMES}  # type: ignore[index]
_W32 = {name: ENTRY.fields[name][1] // 4 for name in ("run", "next_run", "next")}  # type: ignore[index]
ENTRY_WORDS = ENTRY.itemsize // 8
_ENTRY32 = ENTRY.itemsize // 4
_CONTROL64 = CONTROL.itemsize // 8
# An ENTRY, field by field: to unpack one costs half of what its words do.
_FIELDS = struct.Struct("<6Q4I")
assert _FIELDS.size == ENTRY.itemsize
assert ENTRY.names == tuple("low high tag checksum nbytes used run next_run next keep".split())
LOW, HIGH, TAG, STORED = _W64["low"], _W64["high"], _W64["tag"], _W64["used"]
CHECKSUM, NBYTES = _W64["checksum"], _W64["nbytes"]
RUNS = _W64["run"]  # `run` in the low half of this word, `next_run` in the high half
RUN, NEXT_RUN, NEXT = _W32["run"], _W32["next_run"], _W32["next"]
NEXT_KEEP = NEXT // 2  # `next` in the low half of this word, `keep` in the high half


class Location(NamedTuple):
    """Where a stored block lay at one moment; good for as long as its tag is unchanged."""

    entry: int  # index in `IndexFile.entries`
    shard: int
    slot: int
    tag: int
    checksum: int
    nbytes: int
    runs: list[Run]  # in the order of the block's bytes


class Lookup:
    """Finds stored blocks in a mapped index. Any thread, any process, no lock."""

    def __init__(self, file: IndexFile) -> None:
        self._f = file
        e = file.entries
        self._low, self._high, self._tag = e["low"], e["high"], e["tag"]
        self._next, self._keep, self._uses = e["next"], e["keep"], file.uses
        self._unlinks = file.control["unlinks"]
        self._expires = file.control["expires"]

    def find(
        self, keys: KeyArray, touch: bool = True, expired: bool = False
    ) -> npt.NDArray[np.int64]:
        """Entries of the keys, -1 for a key that is not stored; shape [n].

        `touch` counts it as use for eviction. `expired`: those too whose time is up, for whoever
        is going to take them out.
        """
        if len(keys) <= SCALAR_LIMIT:
            return np.array(self.find_each(keys.tolist(), touch, expired), np.int64)
        mixed = keymath.mix(keys)
        shards = keymath.shards_of(mixed, self._f.shards)
        found = np.full(len(keys), -1, np.int64)
        todo = np.arange(len(keys))
        for _ in range(RETRIES):
            before = self._unlinks.copy()
            found[todo] = self._walk(keys[todo], mixed[todo], shards[todo])
            todo = todo[found[todo] < 0]
            if not todo.size:
                break
            moved = self._unlinks != before
            todo = todo[moved[shards[todo]]]
            if not todo.size:
                break
        if not expired and self._expires.any():  # else no block has a time to live
            # After the walk: if an entry is taken out meanwhile, its reader sees the tag change.
            # Keys that were not found index the last entry (-1) and stay -1 whatever it says.
            found[retention.expired(self._keep[found])] = -1
        if touch:
            self._uses[found[found >= 0]] = time.time_ns()
        return found

    def find_each(
        self, keys: Sequence[tuple[int, int]], touch: bool = True, expired: bool = False
    ) -> list[int]:
        """`find` for keys as Python ints: (low, high) each."""
        return [self.find_one(low, high, touch, expired) for low, high in keys]

    def find_mixed(self, keys: MixedKeys, nbytes: Sequence[int] | None = None) -> list[int]:
        """`find` for keys of a short batch; counts as use. `nbytes`: a block of another length does
        not count."""
        find = self.find_one
        found = [
            find(low, high, mixed=mixed)
            for (low, high), mixed in zip(keys.pairs, keys.mixed, strict=True)
        ]
        if nbytes is None:
            return found
        return [
            entry if entry < 0 or self.nbytes_of(entry) == wanted else -1
            for entry, wanted in zip(found, nbytes, strict=True)
        ]

    def _walk(
        self,
        keys: KeyArray,
        mixed: npt.NDArray[np.uint64],
        shards: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.int64]:
        f = self._f
        bucket = (mixed & np.uint64(f.buckets - 1)).astype(np.int64)
        at = f.heads[shards * f.buckets + bucket].astype(np.int64)
        found = np.full(len(keys), -1, np.int64)
        base = shards * f.slots - 1  # links are slot + 1
        low, high = keys[:, 0], keys[:, 1]
        active = np.flatnonzero((at > 0) & (at <= f.slots))
        at = at[active]
        for _ in range(MAX_CHAIN):
            if not active.size:
                break
            entry = base[active] + at
            tag = self._tag[entry]
            match = (
                (self._low[entry] == low[active])
                & (self._high[entry] == high[active])
                & ((tag & np.uint64(STATE_MASK)) == LIVE)
                & (self._tag[entry] == tag)
            )
            found[active[match]] = entry[match]
            at = self._next[entry].astype(np.int64)
            go_on = ~match & (at > 0) & (at <= f.slots)
            active, at = active[go_on], at[go_on]
        return found

    def find_one(
        self,
        low: int,
        high: int,
        touch: bool = True,
        expired: bool = False,
        mixed: int | None = None,
    ) -> int:
        """The entry of one key, or -1. `mixed`: its `mix_one`, where that is known."""
        f = self._f
        if mixed is None:
            mixed = keymath.mix_one(low, high)
        shard = keymath.shard_of(mixed, f.shards)
        head = f.heads_word + shard * f.buckets + (mixed & (f.buckets - 1))
        base = shard * f.slots - 1
        w32, w64 = f.words32, f.words64
        unlinks = f.unlinks_word + shard * _CONTROL64
        for _ in range(RETRIES):
            before = w64[unlinks]
            at = w32[head]
            for _ in range(MAX_CHAIN):
                if not 0 < at <= f.slots:
                    break
                entry = base + at
                word = f.entries_word64 + entry * ENTRY_WORDS
                tag = w64[word + TAG]
                if (
                    w64[word + LOW] == low
                    and w64[word + HIGH] == high
                    and tag & STATE_MASK == LIVE
                    and w64[word + TAG] == tag
                ):
                    keep = w64[word + NEXT_KEEP] >> 32
                    if keep and not expired and retention.has_expired(keep):
                        return -1
                    if touch:
                        w64[f.uses_word + entry] = time.time_ns()
                    return entry
                at = w32[f.entries_word32 + entry * _ENTRY32 + NEXT]
            if w64[unlinks] == before:
                break
        return -1

    def locate(self, entry: int, low: int, high: int) -> Location | None:
        """Where the block of this entry lies; None when it is no longer that key's block, or that
        has expired."""
        f = self._f
        words, word = f.words64, f.entries_word64 + entry * ENTRY_WORDS
        tag = words[word + TAG]
        its_low, its_high, _, checksum, nbytes, _, run, next_run, _, keep = _FIELDS.unpack_from(
            words, word * 8
        )
        if tag & STATE_MASK != LIVE or its_low != low or its_high != high:
            return None
        if keep and retention.has_expired(keep):
            return None
        shard, slot = divmod(entry, f.slots)
        runs: list[Run] | None
        if not next_run and 0 < run <= f.slots - slot and f.geometry.slots_of(nbytes) == run:
            runs = [(slot, run)]
        else:
            runs = self.runs(shard, slot, nbytes)
        if runs is None or words[word + TAG] != tag:
            return None
        return Location(entry, shard, slot, tag, checksum, nbytes, runs)

    def locate_each(self, entries: list[int], keys: list[tuple[int, int]]) -> list[Location | None]:
        """`locate` for several; a number of no entry, as -1, gives None."""
        count = len(self._tag)
        return [
            self.locate(entry, low, high) if 0 <= entry < count else None
            for entry, (low, high) in zip(entries, keys, strict=True)
        ]

    def runs(self, shard: int, slot: int, nbytes: int | None = None) -> list[Run] | None:
        """The runs of the block that starts at `slot`; None when they make no sense.

        `nbytes` is the length of a stored block, which its runs must fit.
        """
        f = self._f
        runs: list[Run] = []
        at, left = slot + 1, f.slots
        while at:
            if at > f.slots:
                return None
            entry = shard * f.slots + at - 1
            if runs and self.tag(entry) & STATE_MASK != EXTENT:
                return None
            word = f.entries_word32 + entry * _ENTRY32
            length = f.words32[word + RUN]
            if not 0 < length <= left or at - 1 + length > f.slots:
                return None
            runs.append((at - 1, length))
            left -= length
            at = f.words32[word + NEXT_RUN]
        if nbytes is not None and f.slots - left != f.geometry.slots_of(nbytes):
            return None
        return runs

    def tag(self, entry: int) -> int:
        """The tag of an entry now."""
        return self._f.words64[self._f.entries_word64 + entry * ENTRY_WORDS + TAG]

    def nbytes_of(self, entry: int) -> int:
        """Length in bytes of the block of an entry now."""
        return self._f.words64[self._f.entries_word64 + entry * ENTRY_WORDS + NBYTES]

    def is_unchanged(self, where: Location) -> bool:
        """Whether the block still lies where `locate` found it: ask after copying."""
        return self.tag(where.entry) == where.tag

    def are_unchanged(self, located: Sequence[Location]) -> list[bool]:
        """`is_unchanged` for several."""
        words, first = self._f.words64, self._f.entries_word64 + TAG
        return [words[first + where.entry * ENTRY_WORDS] == where.tag for where in located]
