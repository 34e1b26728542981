"""Which prefix of a request can be loaded when several pools must have their part of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Demand(NamedTuple):
    """What a side pool must have.

    stored    bool [keys]: whether its page of each key is stored
    trailing  0: every page of the prefix; else only that many last pages of it (the state of a
              sliding window, or of a recurrent layer)
    """

    name: str
    stored: npt.NDArray[np.bool_]
    trailing: int


class Usable(NamedTuple):
    """pages: the longest prefix that all pools can serve; by_pool: each pool's own longest one,
    where there is any; prefixes: all lengths that all pools can serve, ascending."""

    pages: int
    by_pool: dict[str, int]
    prefixes: list[int]


def usable_prefixes(kv_pages: int, demands: Sequence[Demand]) -> Usable:
    """The prefixes, in pages, of a request of which the pool kv has the first `kv_pages`.

    With trailing demands the lengths have gaps: a checkpoint may be stored at 4 pages and at 8.
    Ranks agree on one of these lengths, and the longest of each might be none of the others'.
    """
    fits = np.ones(kv_pages, bool)  # fits[n - 1]: a prefix of n pages
    by_pool = {"kv": kv_pages} if kv_pages else {}
    for demand in demands:
        mine = _fitting(demand, kv_pages)
        if mine.any():
            by_pool[demand.name] = int(np.flatnonzero(mine)[-1]) + 1
        fits &= mine
    prefixes = (np.flatnonzero(fits) + 1).tolist()
    return Usable(prefixes[-1] if prefixes else 0, by_pool, prefixes)


def _fitting(demand: Demand, kv_pages: int) -> npt.NDArray[np.bool_]:
    stored = demand.stored[:kv_pages]
    if not demand.trailing:
        return np.logical_and.accumulate(stored)
    missing = np.concatenate(([0], np.cumsum(~stored)))
    ends = np.arange(1, kv_pages + 1)
    starts = np.maximum(ends - demand.trailing, 0)
    return np.asarray(missing[ends] == missing[starts])
