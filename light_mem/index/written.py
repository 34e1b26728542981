"""Written: a block whose bytes lie in its slots; what its record and its entry say."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from light_mem.index.runs import Run

_FIELDS = ("low", "high", "checksum", "nbytes", "used", "keep")


class Written(NamedTuple):
    """A block whose bytes lie in its slots."""

    low: int
    high: int
    checksum: int
    nbytes: int
    runs: list[Run]
    used: int  # when it was stored, ns since 1970
    keep: int = 0  # time to live and pin, see `format.KEEP_PINNED`

    @classmethod
    def of(cls, entry: np.void, runs: list[Run]) -> Written:
        """The block that an entry or a record describes, in these slots."""
        low, high, checksum, nbytes, used, keep = (int(entry[name]) for name in _FIELDS)
        return cls(low, high, checksum, nbytes, runs, used, keep)

    @property
    def slot(self) -> int:
        """Its first slot, under which the index lists it."""
        return self.runs[0][0]
