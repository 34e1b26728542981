"""StorageEngine: what the service and the workers ask of a storage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from light_mem.engine.places import Place
from light_mem.index.keys import KeyArray


class Outcome(IntEnum):
    """What became of one block of a batch, as told to `report`."""

    COPIED = 1  # write: every byte has left the KV pages; a further outcome follows
    STORED = 2  # write: stored now
    PRESENT = 3  # write: was stored already; nothing was copied, or the copy was given back
    LOADED = 4  # read: the pages hold the block, verified
    MISSING = 5  # read: not stored, or of another length
    LOST = 6  # read: evicted while it was copied
    DAMAGED = 7  # read: lost on the device, or not what was written; the block was taken out
    NO_ROOM = 8  # write: no slot could be freed in time
    STOPPED = 9  # aborted by the caller
    FAILED = 10  # an I/O error, or a lock that was not free in time

    @property
    def success(self) -> bool:
        """Whether the block's bytes may be used (read) or can be found (write)."""
        return self in (Outcome.STORED, Outcome.PRESENT, Outcome.LOADED)


class BlockIO(NamedTuple):
    """One block to move: its key, and where in the KV memory its bytes are, or go."""

    low: int
    high: int
    place: Place

    @property
    def nbytes(self) -> int:
        """Length of the block in bytes."""
        return self.place.nbytes


Report = Callable[[Sequence[int], Outcome], None]  # (positions in the batch, outcome of each)
# Whether the block at this position was aborted; an engine's own threads may ask, at the same time.
Stop = Callable[[int], bool]


def check_places(batch: Sequence[BlockIO], page_bytes: int) -> None:
    """Raise InvalidArgumentError for a block whose rows are no pages."""
    for block in batch:
        block.place.require_pages(page_bytes)


def never(_: int) -> bool:
    """The Stop of a batch that nobody aborts."""
    return False


class Job:
    """A batch of blocks to move, their lengths in bytes (`nbytes`), and who is told of them."""

    def __init__(self, batch: Sequence[BlockIO], report: Report, stop: Stop) -> None:
        self.batch = batch
        self.report = report
        self.stop = stop
        self.nbytes = [block.place.nbytes for block in batch]

    def settle(self, positions: Sequence[int], outcome: Outcome) -> None:
        """Tell the final outcome of blocks, if there are any."""
        if positions:
            self.report(positions, outcome)


class StorageEngine(ABC):
    """A store of blocks by key. Several processes may each hold an engine on one store.

    Promises of every engine, tested by one suite (tests/test_engine_contract.py): a block is found
    only when it is whole; LOADED means the very bytes that were written under the key; the least
    recently used block goes first; damage is DAMAGED or MISSING, never an exception.
    """

    @abstractmethod
    def find(
        self, keys: KeyArray, touch: bool = True, nbytes: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.bool_]:
        """Which keys are stored, shape [n]; `touch` counts it as use. Any thread.

        `nbytes` [n]: a block of another length does not count. A block that is written with
        another length takes its place; to a read it is missing.
        """

    @abstractmethod
    def write(self, batch: Sequence[BlockIO], report: Report, stop: Stop = never) -> None:
        """Store the blocks. Each gets COPIED (if copied) and then one final outcome."""

    @abstractmethod
    def read(self, batch: Sequence[BlockIO], report: Report, stop: Stop = never) -> None:
        """Load the blocks into their rows. Each gets one final outcome."""

    @abstractmethod
    def delete(self, keys: KeyArray) -> int:
        """Take blocks out; returns how many were stored. Any thread."""

    @abstractmethod
    def clear(self) -> int:
        """Take all blocks out; returns how many. Any thread."""

    @abstractmethod
    def stats(self) -> dict[str, int]:
        """Numbers of the store, at least `blocks`, `used_slots`, `slots`, `evictions`."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the store; what is stored stays."""
