"""Pins and leases of blocks in an engine's store: what eviction leaves alone, and for how long.

Kill points: a pin is in the entry, then in the record; a holder who died in between is followed by
one who makes the record say what the entry does. A lease is announced in the shard's control page,
then noted in the owner's record; at its end the slots that only it kept go back first, then it goes
from the record. A lease whose holder died does not count, and `reclaim` does the same for it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from light_mem.engine.copy import new_checksum
from light_mem.engine.removing import WRONG_SUM
from light_mem.engine.slot_calls import problem_of
from light_mem.errors import (
    LeaseLimitError,
    LockTimeoutError,
    PinLimitError,
    ServiceClosedError,
    StoreFormatError,
)
from light_mem.index import keys as keymath
from light_mem.index.format import MAX_LEASES
from light_mem.index.keys import Key, KeyArray
from light_mem.index.locks import LOCK_TIMEOUT_SECONDS
from light_mem.index.runs import Run, cut_at_runs

if TYPE_CHECKING:
    from light_mem.engine.open_store import OpenStore
    from light_mem.index.shard import ShardIndex

log = logging.getLogger("light_mem")


def pin(engine: OpenStore, keys: KeyArray, expired: bool = False) -> int:
    """Pin the stored blocks among these keys; returns how many are pinned now. `expired`: those too
    whose time is up, and that nobody has taken out yet.

    Raises PinLimitError, LockTimeoutError, OSError, StoreFormatError: then none of them is pinned
    that was not before, unless a shard's lock was not free for that in time either, which is
    logged.
    """
    count = 0
    fresh: dict[int, list[Key]] = {}  # what was pinned here, by shard
    try:
        for shard, part in _by_shard(engine, keys):
            count += _pin(engine, shard, part, expired, fresh.setdefault(shard, []))
    except BaseException:
        for shard, part in fresh.items():
            _unpin_again(engine, shard, part)
        raise
    return count


def _pin(engine: OpenStore, shard: int, keys: list[Key], expired: bool, fresh: list[Key]) -> int:
    """`pin` in one shard; adds to `fresh` what was not pinned before."""
    with engine.change(shard) as (index, file):
        slots = dict(_stored(index, keys, expired))
        excess = index.retention.excess(list(slots.values()))
        pinned, limit = int(index.control["pinned_slots"][0]), index.retention.limit
        if not excess:
            for key, slot in slots.items():
                if not index.retention.is_pinned(slot):
                    fresh.append(key)
                    file.set_keep(slot, index.retention.pin(slot))
            return len(slots)
    needed = excess + limit - pinned
    raise PinLimitError(
        f"{pinned} slots of shard {shard} are pinned and {needed} more would be; at most "
        f"{limit} may be, half of them: nothing was pinned",
        shard=shard,
        pinned=pinned,
        needed=needed,
        limit=limit,
    )


def _unpin_again(engine: OpenStore, shard: int, keys: list[Key]) -> None:
    if not keys:
        return
    try:
        _unpin(engine, shard, keys)
    except (OSError, StoreFormatError, ServiceClosedError) as error:
        log.warning(
            "%d blocks of shard %d of %s stay pinned by a call that failed: %s",
            len(keys),
            shard,
            engine.directory,
            str(error),
        )


def unpin(engine: OpenStore, keys: KeyArray) -> int:
    """Take the pins of these keys away; returns how many were pinned."""
    return sum(_unpin(engine, shard, part) for shard, part in _by_shard(engine, keys))


def _unpin(engine: OpenStore, shard: int, keys: list[Key]) -> int:
    count = 0
    with engine.change(shard) as (index, file):
        for slot in index.find_many(keys):
            if slot >= 0 and index.retention.is_pinned(slot):
                file.set_keep(slot, index.retention.unpin(slot))
                count += 1
    return count


def _by_shard(engine: OpenStore, keys: KeyArray) -> list[tuple[int, list[Key]]]:
    shards = keymath.shards_of(keymath.mix(keys), engine.geometry.shards)
    return [
        (shard, list(dict.fromkeys(map(tuple, keys[shards == shard].tolist()))))
        for shard in np.unique(shards).tolist()
    ]


def _stored(index: ShardIndex, keys: list[Key], expired: bool = False) -> list[tuple[Key, int]]:
    """Those of these keys that are stored, with their first slots; `expired`: also expired ones."""
    found = zip(keys, index.find_many(keys), strict=True)
    gone = index.retention.has_expired
    return [(k, slot) for k, slot in found if slot >= 0 and (expired or not gone(slot))]


# --- leases ---------------------------------------------------------------------------------------


class Leased(NamedTuple):
    """A block whose slots are not reused before `end_lease`."""

    shard: int
    slot: int
    nbytes: int
    runs: list[Run]


def lease(engine: OpenStore, low: int, high: int) -> Leased | None:
    """Lease the stored block of a key, and verify its bytes; None: not stored, or damaged. Then its
    pages were in the page cache a moment ago: whoever maps them meets none that are lost.

    Raises LeaseLimitError, LockTimeoutError, OSError; ServiceClosedError when the store was left
    meanwhile. Then nothing is leased. Any thread.
    """
    shard = keymath.shard_of(keymath.mix_one(low, high), engine.geometry.shards)
    taken = False
    damage = "its runs of slots make no sense"
    try:
        with engine.change(shard) as (index, _):
            found = _stored(index, [(low, high)])
            if not found:
                return None
            slot = found[0][1]
            entry = index.entries[slot]
            nbytes, checksum, tag = (int(entry[name]) for name in ("nbytes", "checksum", "tag"))
            runs = engine.lookup.runs(shard, slot, nbytes)
            before = engine.leases.count(shard, slot)
            try:
                # Not raised in here: that would have the shard put in order.
                problem = None if runs is None else _take(engine, index, slot)
                taken = runs is not None and problem is None
            except BaseException:
                # An exception (a signal handler's, perhaps) may come after the lease was counted.
                # One that comes between our return and the caller's first step leaks the lease
                # until the process ends.
                taken = engine.leases.count(shard, slot) > before
                raise
        if problem is not None:
            raise problem
        if runs is not None:
            leased = Leased(shard, slot, nbytes, runs)
            found_damage = _damage(engine, leased, low, high, checksum)
            if found_damage is None:
                engine.lookup.find_one(low, high)  # a use
                return leased
            damage = found_damage
    except BaseException:  # e.g. no descriptors or memory left: only this call knows of the lease
        if taken:
            end_lease(engine, shard, slot)
        raise
    if taken:
        end_lease(engine, shard, slot)
    engine.drop_damaged(shard, slot, tag, low, high, damage)
    return None


def _take(
    engine: OpenStore, index: ShardIndex, slot: int
) -> LeaseLimitError | ServiceClosedError | None:
    shard, retention = index.shard, index.retention
    leased = index.leases.slots()
    slots = sum(retention.slots_at(each) for each in leased)
    needed = 0 if slot in leased else retention.slots_at(slot)
    if slots + needed > retention.limit:
        return LeaseLimitError(
            f"{slots} slots of shard {shard} are leased and {needed} more would be; at most "
            f"{retention.limit} may be, half of them",
            shard=shard,
            leased=slots,
            needed=needed,
            limit=retention.limit,
        )
    index.leases.announce()
    if not engine.leases.take(shard, slot):
        if engine.leases.closed:
            return ServiceClosedError("the store was left meanwhile")
        return LeaseLimitError(
            f"this process has {MAX_LEASES} blocks leased, the most it may",
            shard=-1,
            leased=MAX_LEASES,
            needed=1,
            limit=MAX_LEASES,
        )
    return None


def _damage(engine: OpenStore, leased: Leased, low: int, high: int, checksum: int) -> str | None:
    """What is wrong with the bytes of a leased block, in words; None: nothing. They are read by
    calls, for this process is the server. Raises OSError, ServiceClosedError."""
    digest = new_checksum(low, high) if engine.verify else None
    file = engine.file(leased.shard)
    parts = cut_at_runs(leased.runs, leased.nbytes, engine.geometry.page_bytes)
    try:
        for run, start, end in parts:
            if digest is None and file.is_cached(run, end - start):
                continue
            for piece in file.pieces(run, end - start):
                if digest is not None:
                    digest.update(piece)
    except OSError as error:
        problem = problem_of(error)
        if problem is None:
            raise
        return problem
    return WRONG_SUM if digest is not None and digest.intdigest() != checksum else None


def end_lease(engine: OpenStore, shard: int, slot: int) -> None:
    """End a lease. Any thread. If the shard's lock is not to be had in time, `end_dropped` tries
    again; until then the block stays leased."""
    _end(engine, shard, [slot], LOCK_TIMEOUT_SECONDS)


def end_dropped(engine: OpenStore, timeout: float) -> bool:
    """End the leases of views that nobody closed and nobody has any more, those of a shard in one
    hold of its lock, for which it waits `timeout` seconds. Any thread.

    Returns whether all that had been dropped by then have ended; the others stay for later.
    """
    by_shard: dict[int, list[int]] = {}
    dropped = engine.leases.dropped
    for _ in range(len(dropped)):
        try:
            shard, slot = dropped.popleft()
        except IndexError:  # another thread was faster
            break
        by_shard.setdefault(shard, []).append(slot)
    ended = True
    try:
        while by_shard:
            ended &= _end(engine, *by_shard.popitem(), timeout)
    finally:
        dropped.extend((shard, slot) for shard, slots in by_shard.items() for slot in slots)
    return ended


def _end(engine: OpenStore, shard: int, slots: list[int], timeout: float) -> bool:
    left = list(slots)
    try:
        with engine.change(shard, timeout=timeout) as (index, _):
            while left:
                slot = left[-1]
                if engine.leases.ends(shard, slot):
                    index.release(slot, engine.leases.of_shard(shard, but=engine.leases.number))
                    engine.leases.forget_own(shard, slot)
                left.pop()
                index.retention.uses(slot)
    except (LockTimeoutError, OSError, StoreFormatError, ServiceClosedError) as error:
        if timeout or not isinstance(error, LockTimeoutError):
            text = "a lease in %s has not ended yet: %s"
            engine.limited.warning(text, engine.directory, str(error))
    finally:
        engine.leases.dropped.extend((shard, slot) for slot in left)
    return not left
