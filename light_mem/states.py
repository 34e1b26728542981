"""State and CacheBlock: what a task says of its blocks."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from light_mem.engine.table_layout import ABORTED, FINISHED, INITIAL, WORKING
from light_mem.index.keys import HashValue


class State(IntEnum):
    """State of a block. Only a Finished block's bytes may be used."""

    Initial = INITIAL
    Working = WORKING
    Finished = FINISHED
    Aborted = ABORTED


class CacheBlock(NamedTuple):
    """One block of a task at the moment of asking: its hash, its pages in order, its state.

    `regions`, (offset, length) in bytes, is set instead of `pages` by `create_regions`.
    """

    hash: HashValue
    pages: tuple[int, ...]
    state: State
    regions: tuple[tuple[int, int], ...] = ()

    def ready(self) -> bool:
        """Whether the block is Finished."""
        return self.state is State.Finished
