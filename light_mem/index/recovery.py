"""A shard's index, made anew: from its own entries after a death, from the slots file otherwise.

The same three steps serve both: pick the blocks that make sense and do not overlap, drop the
rest, link the chains. A block that is listed but whose bytes were lost is found out by its
checksum when it is read; that is a miss.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import xxhash

from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.index.file import IndexFile
from light_mem.index.retention import Retention
from light_mem.index.runs import Run, slots_needed

Table = npt.NDArray[np.void]  # of ENTRY or RECORD
Ints = npt.NDArray[np.int64]

_CRC_ROWS = 1024  # records at a time: what stays in a core's cache


def states_of(table: Table) -> npt.NDArray[np.uint64]:
    """The state of each slot."""
    return fmt.states_of(table["tag"])


def occupied_runs(table: Table) -> tuple[Ints, Ints]:
    """Starts and lengths of all runs that are not free, by place."""
    starts = np.flatnonzero(states_of(table))
    return starts, table["run"][starts].astype(np.int64)


def sound_blocks(table: Table, page_bytes: int) -> Ints:
    """First slots of all runs of blocks that make sense: lengths fit, no two overlap.

    Of two that overlap the one stored later wins. Shape [runs], any order.
    """
    slots = len(table)
    states = states_of(table)
    heads = np.flatnonzero(np.isin(states, (fmt.WRITING, fmt.LIVE, fmt.HELD)))
    run = table["run"][heads].astype(np.int64)
    follow = table["next_run"][heads].astype(np.int64)
    live = states[heads] == fmt.LIVE
    pages = slots_needed(table["nbytes"][heads].astype(np.float64), page_bytes)
    fits = (run > 0) & (heads + run <= slots)
    single = fits & (follow == 0) & (~live | (pages == run))
    blocks: list[tuple[int, int, list[Run]]] = []  # when stored, head, runs
    for head in heads[fits & (follow != 0)].tolist():
        runs = follow_runs(table, states, head)
        if runs is None:
            continue
        pages_there = slots_needed(int(table["nbytes"][head]), page_bytes)
        if states[head] == fmt.LIVE and sum(n for _, n in runs) != pages_there:
            continue
        blocks.append((int(table["used"][head]), head, runs))
    plain = heads[single]
    contested = _contested(slots, plain, run[single], blocks)
    kept: list[int] = plain[~contested].tolist()
    for head in plain[contested].tolist():
        blocks.append((int(table["used"][head]), head, [(head, int(table["run"][head]))]))
    taken = np.zeros(slots, bool)
    for _, _, runs in sorted(blocks, key=lambda b: b[0], reverse=True):
        if any(taken[start : start + length].any() for start, length in runs):
            continue
        for start, length in runs:
            taken[start : start + length] = True
            kept.append(start)
    return np.array(kept, np.int64)


def _contested(
    slots: int, starts: Ints, lengths: Ints, blocks: list[tuple[int, int, list[Run]]]
) -> npt.NDArray[np.bool_]:
    """Which of the runs have a slot that another run has too: only those need a decision."""
    change = np.zeros(slots + 1, np.int64)
    np.add.at(change, starts, 1)
    np.subtract.at(change, starts + lengths, 1)
    for _, _, runs in blocks:
        for start, length in runs:
            change[start] += 1
            change[start + length] -= 1
    double = np.concatenate([[0], np.cumsum(np.cumsum(change[:-1]) > 1)])
    return np.asarray(double[starts + lengths] > double[starts])


def follow_runs(table: Table, states: npt.NDArray[np.uint64], head: int) -> list[Run] | None:
    """The runs of the block at `head`; None when they make no sense."""
    runs = [(head, int(table["run"][head]))]
    at = int(table["next_run"][head])
    while at:
        if at > len(table) or len(runs) > len(table) or states[at - 1] != fmt.EXTENT:
            return None
        length = int(table["run"][at - 1])
        if length == 0 or at - 1 + length > len(table) or at - 1 in {s for s, _ in runs}:
            return None
        runs.append((at - 1, length))
        at = int(table["next_run"][at - 1])
    by_place = sorted(runs)
    if any(a + n > b for (a, n), (b, _) in pairwise(by_place)):
        return None
    return runs


def link_chains(entries: Table, heads: npt.NDArray[np.uint32], buckets: int) -> None:
    """Chain all stored blocks anew, the last stored first.

    Look-ups go on meanwhile; they may miss, and nothing worse.
    """
    live = np.flatnonzero(states_of(entries) == fmt.LIVE)
    keys = np.stack([entries["low"][live], entries["high"][live]], axis=1)
    bucket = (keymath.mix(keys) & np.uint64(buckets - 1)).astype(np.int64)
    order = np.lexsort((-entries["used"][live].astype(np.int64), bucket))
    live, bucket = live[order], bucket[order]
    following = np.zeros(live.size, np.uint32)
    same = bucket[1:] == bucket[:-1]
    following[:-1][same] = live[1:][same] + 1
    first = np.ones(live.size, bool)
    first[1:] = ~same
    new_heads = np.zeros(buckets, np.uint32)
    new_heads[bucket[first]] = live[first] + 1
    entries["next"][live] = following
    heads[:] = new_heads


def record_crcs(records: Table) -> list[int]:
    """The crc that each of a few records, RECORD [n], must carry."""
    raw = records.tobytes()
    size, end = fmt.RECORD.itemsize, fmt.RECORD_CRC_BYTES
    return [fmt.crc_of(raw[at : at + end]) for at in range(0, len(raw), size)]


def crc_fits(records: Table) -> npt.NDArray[np.bool_]:
    """Which records carry the crc that they must."""
    # No Python statement per record: with a million records those would be most of a rebuild or a
    # check. The records pass through a buffer whose slices for the checksum are made once.
    size = fmt.RECORD.itemsize
    words = np.asarray(records).view("<u8").reshape(len(records), size // 8)
    raw = memoryview(bytearray(min(_CRC_ROWS, len(records)) * size))
    buffer = np.frombuffer(raw, np.uint64).reshape(-1, size // 8)
    covered = [raw[at : at + fmt.RECORD_CRC_BYTES] for at in range(0, len(raw), size)]
    crcs = np.empty(len(records), np.uint32)
    for at in range(0, len(records), _CRC_ROWS):
        part = words[at : at + _CRC_ROWS]
        buffer[: len(part)] = part
        sums = b"".join(map(xxhash.xxh3_64_digest, covered[: len(part)]))
        crcs[at : at + len(part)] = np.frombuffer(sums, ">u4")[1::2]  # the low halves
    return np.asarray(crcs == records["crc"])


def drop_damaged_records(records: Table) -> int:
    """Set the state of records with a wrong crc to FREE, in place; returns how many."""
    used = np.flatnonzero(states_of(records))
    wrong = used[~crc_fits(records[used])]
    records["tag"][wrong] = fmt.FREE
    return int(wrong.size)


def drop_foreign_extents(records: Table) -> None:
    """Free records that list a further run for a block that is not theirs any more, in place.

    A record says LIVE or EXTENT; the runs of one block carry the same key and checksum.
    """
    states = states_of(records)
    for head in np.flatnonzero((states == fmt.LIVE) & (records["next_run"] != 0)).tolist():
        for start, _ in (follow_runs(records, states, head) or [])[1:]:
            if any(records[f][start] != records[f][head] for f in ("low", "high", "checksum")):
                records["tag"][head] = fmt.FREE
                break


def entries_of(records: Table, page_bytes: int) -> Table:
    """The entries that a shard's records describe, shape [slots]; chains are not linked yet.

    A key that two records hold goes to the one written later. `records` is changed: the state of
    those that are not believed becomes FREE.
    """
    drop_damaged_records(records)
    drop_foreign_extents(records)
    sound = sound_blocks(records, page_bytes)
    entries = np.zeros(len(records), fmt.ENTRY)
    for name in fmt.ENTRY.names or ():
        if name in (fmt.RECORD.names or ()):
            entries[name][sound] = records[name][sound]
    for head in older_twins(entries):
        for start, _ in follow_runs(entries, states_of(entries), head) or [(head, 0)]:
            entries["tag"][start] = fmt.FREE
    states = states_of(entries)
    entries["tag"] = np.where(
        states != fmt.FREE, states | np.uint64(1 << fmt.GENERATION_SHIFT), np.uint64(0)
    )
    return entries


def fill_shard(file: IndexFile, shard: int, entries: Table) -> int:
    """Fill one shard of a new, empty index; returns its blocks. `used` of the entries is their last
    use."""
    control, heads, into, uses = file.of_shard(shard)
    into[: len(entries)] = entries
    uses[: len(entries)] = entries["used"]
    link_chains(into, heads, file.buckets)
    states = states_of(into)
    control["blocks"] = np.count_nonzero(states == fmt.LIVE)
    control["used_slots"] = int(into["run"][states != fmt.FREE].sum())
    Retention(control, into, uses, file.geometry.page_bytes).recount()
    return int(control["blocks"][0])


def older_twins(entries: Table) -> list[int]:
    """First slots of stored blocks whose key another one, stored later, has too: who moves a block
    lists it in its new place before it takes it out of the old one, and may die in between."""
    live = np.flatnonzero(states_of(entries) == fmt.LIVE)
    low, high, used = (entries[f][live] for f in ("low", "high", "used"))
    mixed = np.sort(keymath.mix(np.stack([low, high], axis=1)))
    if not (mixed[:-1] == mixed[1:]).any():  # as nearly always
        return []
    order = np.lexsort((used, high, low))
    low, high, live = low[order], high[order], live[order]
    twin = (low[:-1] == low[1:]) & (high[:-1] == high[1:])
    slots: list[int] = live[:-1][twin].tolist()
    return slots
