"""Written: a block whose bytes lie in its slots; what its record and its entry say."""

from __future__ import annotations

from typing import NamedTuple

from light_mem.index.runs import Run


class Written(NamedTuple):
    """A block whose bytes lie in its slots."""

    low: int
    high: int
    checksum: int
    nbytes: int
    runs: list[Run]
    used: int  # when it was stored, ns since 1970
    keep: int = 0  # time to live and pin, see `format.KEEP_PINNED`

    @property
    def slot(self) -> int:
        """Its first slot, under which the index lists it."""
        return self.runs[0][0]
