"""Taking blocks out of an engine's store: on demand, for damage, and what the dead left behind.

Kill points: a block leaves the index, then its records go, in one hold of its shard's lock; a
holder who died in between is followed by one who clears the records of what is not listed. What
a dead process was filling or had leased goes before its record does: a kill in between leaves the
rest to the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from light_mem.errors import LockTimeoutError, StoreFormatError
from light_mem.index import keys as keymath
from light_mem.index.format import ShardSlot
from light_mem.index.keys import KeyArray

if TYPE_CHECKING:
    from light_mem.engine.open_store import OpenStore
    from light_mem.engine.shard_file import ShardFile
    from light_mem.index.shard import ShardIndex

log = logging.getLogger("light_mem")

WRONG_SUM = "its bytes do not fit its checksum"  # the usual `problem` of `drop_damaged`


def take_out(index: ShardIndex, file: ShardFile, slot: int) -> None:
    """Take out the stored block at `slot`, in a change of its shard; the caller counts why."""
    # First the index: whoever dies in between leaves a record that the next holder clears.
    index.remove(slot)
    file.clear_records([slot])


def give_back(index: ShardIndex, file: ShardFile, slot: int) -> None:
    """Free the slots of a block that was not published, in a change of its shard."""
    # First the record: whoever dies in between leaves slots that an owner's intents still name.
    file.clear_records([slot])
    index.give_back(slot)


def delete(engine: OpenStore, keys: KeyArray) -> int:
    """Take out the blocks of these keys; returns how many were stored and had not expired."""
    shards = keymath.shards_of(keymath.mix(keys), engine.geometry.shards)
    deleted = 0
    for shard in np.unique(shards).tolist():
        with engine.change(shard) as (index, file):
            for low, high in keys[shards == shard].tolist():
                slot = index.find(low, high)
                if slot is not None:
                    expired = index.retention.has_expired(slot)
                    take_out(index, file, slot)
                    index.control["removals"] += 1
                    deleted += not expired
    return deleted


def clear(engine: OpenStore) -> int:
    """Take out all blocks, shard by shard; returns how many."""
    cleared = 0
    for shard in range(engine.geometry.shards):
        with engine.change(shard) as (index, file):
            slots = index.clear()
            file.clear_records(slots)
            cleared += len(slots)
    return cleared


def drop_damaged(
    engine: OpenStore,
    shard: int,
    slot: int,
    tag: int,
    low: int,
    high: int,
    problem: str,
    timeout: float,
) -> None:
    """Take out a block that was found damaged, if its tag is still this one; says so in the log.

    `problem`: what is wrong with it, in words. If the shard's lock is not free within `timeout`
    seconds it stays, to be found damaged again.
    """
    engine.limited.warning(
        "block %s in slot %d of shard %d of %s is damaged: %s; it is dropped",
        keymath.key_text(low, high),
        slot,
        shard,
        engine.directory,
        problem,
    )
    try:
        with engine.change(shard, timeout) as (index, file):
            if engine.lookup.tag(shard * engine.geometry.slots + slot) == tag:
                take_out(index, file, slot)
                index.control["removals"] += 1
                index.control["damaged"] += 1
    except LockTimeoutError as error:
        engine.limited.warning("the damaged block stays listed: %s", str(error))


def take_back(
    engine: OpenStore,
    owner: int,
    intents: list[ShardSlot],
    timeout: float,
    only: Collection[int] | None,
) -> bool:
    """Give back the slots that a dead owner was filling, and those that were taken out while only
    the dead had them leased: shard by shard, `only` in these. Whether none is left; one whose lock
    is not free within `timeout` seconds, or whose files are gone, keeps no other waiting."""
    wanted: dict[int, tuple[list[int], list[int]]] = {}
    for kind, named in enumerate((engine.leases.of_owner(owner), intents)):
        for shard, slot in named:
            if shard < engine.geometry.shards and slot < engine.geometry.slots:
                wanted.setdefault(shard, ([], []))[kind].append(slot)
    settled = True
    for shard, (leased, filled) in wanted.items():
        if only is not None and shard not in only:
            settled = False
            continue
        try:
            with engine.change(shard, timeout) as (index, file):
                for slot in leased:
                    index.release(slot, engine.leases.of_shard(shard, but=owner))
                    engine.leases.forget(owner, shard, slot)
                for slot in filled:
                    if index.is_marked(slot, owner):
                        give_back(index, file, slot)
        except (OSError, StoreFormatError) as error:
            settled = False
            tell = engine.limited.warning if timeout else log.debug
            tell(
                "slots of shard %d of %s that a dead process was filling stay taken: %s",
                shard,
                engine.directory,
                str(error),
            )
    return settled
