"""Occupancy by age: how long ago the stored blocks were last used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from light_mem.index import format as fmt
from light_mem.index.recovery import Table, states_of

# In seconds: a minute, 5, 15, an hour, 4, 12, a day, 3, a week, 30 days.
AGE_BOUNDS = (60, 300, 900, 3600, 14400, 43200, 86400, 259200, 604800, 2592000)
_PIECE = 1 << 16  # entries at a time: what a look takes of memory, and the cache


class AgeBucket(NamedTuple):
    """Blocks used less than `below` seconds ago, and not in the bucket before."""

    below: int | None  # seconds; None: all that are older
    blocks: int
    nbytes: int


def by_age(entries: Table, uses: npt.NDArray[np.uint64], now: int) -> list[AgeBucket]:
    """The stored blocks among entries, ENTRY [n], by the time since their last use.

    uses    when each was last used, ns since 1970, [n]
    now     the same; a block used later than that counts as just used

    Takes no lock: a block that moves meanwhile may count twice or not at all.
    """
    blocks = np.zeros(len(AGE_BOUNDS) + 1, np.int64)
    nbytes = np.zeros(len(AGE_BOUNDS) + 1)
    bounds = np.array(AGE_BOUNDS) * 1e9
    for first in range(0, len(entries), _PIECE):
        piece = entries[first : first + _PIECE]
        live = states_of(piece) == fmt.LIVE
        ages = now - uses[first : first + _PIECE][live].astype(np.float64)
        bucket = np.searchsorted(bounds, ages, side="right")
        blocks += np.bincount(bucket, minlength=len(blocks))
        nbytes += np.bincount(bucket, piece["nbytes"][live], len(blocks))
    return [
        AgeBucket(below, int(n), int(size))
        for below, n, size in zip((*AGE_BOUNDS, None), blocks, nbytes, strict=True)
    ]


def added(parts: Sequence[Sequence[AgeBucket]]) -> list[AgeBucket]:
    """The buckets of several shards together; at least one."""
    return [
        AgeBucket(same[0].below, sum(b.blocks for b in same), sum(b.nbytes for b in same))
        for same in zip(*parts, strict=True)
    ]
