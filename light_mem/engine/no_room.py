"""Log messages for a write that got no space or could not be announced."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from light_mem.errors import LockTimeoutError, ServiceClosedError, StoreFormatError
from light_mem.index.format import MAX_INTENTS
from light_mem.index.locks import SHORT_SECONDS

if TYPE_CHECKING:
    from light_mem.engine.local import LocalStorageEngine


class Refused(NamedTuple):
    """A block that found no room, and its shard at that moment, in slots."""

    slots: int
    most: int  # that a block may have
    pinned: int


def late(engine: LocalStorageEngine, shard: int, slots: int) -> None:
    """Log why a block got no space after its wait, although this worker holds none."""
    try:
        with engine.change(shard, SHORT_SECONDS) as (index, _):
            refused = Refused(slots, index.most_slots(), index.retention.pinned_slots)
    except (LockTimeoutError, OSError, StoreFormatError, ServiceClosedError):
        return  # the next writer that fails for this reason reports it
    warn(engine, shard, refused)


def warn(engine: LocalStorageEngine, shard: int, refused: Refused) -> None:
    """Say it, at a bounded rate. Outside of the shard's lock: a log may be slow."""
    if not engine.evicts:
        return  # a tool, which wants free room only and counts what found none
    slots, most, pinned = refused
    total = engine.geometry.slots
    viewed = total - most - pinned
    if pinned or viewed > 0:
        advice = "unpin blocks, close views, or have a larger store"
    else:
        advice = "have a larger store, fewer shards or fewer workers"
    engine.limited.warning(
        "%s: no room for a block of %d slots in shard %d: of its %d slots %d are pinned and %d "
        "viewed%s; %s",
        engine.directory,
        slots,
        shard,
        total,
        pinned,
        viewed,
        ", and others are being written" if slots <= most else "",
        advice,
    )


def no_intents(engine: LocalStorageEngine, shards: list[int]) -> LockTimeoutError:
    """The error of blocks that cannot be announced."""
    return LockTimeoutError(
        f"{MAX_INTENTS} slots of failed writes wait for the locks of shards {shards}",
        path=str(engine.directory),
        shards=shards,
        timeout=0,
    )
