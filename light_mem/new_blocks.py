"""The blocks of one `create` call: which are done already, and what the task table is to hold of
the others.

Few blocks are done in loops over Python ints, many by numpy. A task of a request has some ten
blocks, and `create` runs after its caller has done other things: each of some 40 different numpy
calls then takes 2 to 5 us, however short its arrays are, and a loop 4 us a block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from light_mem.engine.dealing import deal, deal_few
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.table_layout import (
    ABORTED,
    CELL,
    CELL_FIELDS,
    FINISHED,
    INITIAL,
    WRITE,
)
from light_mem.index import keys as keymath
from light_mem.index.keys import HashValue, MixedKeys
from light_mem.lane_room import Room
from light_mem.layouts import Layout

FEW = 32  # with more blocks numpy is faster (measured: as fast at some 40)


class NewBlocks(ABC):
    """The H blocks of one task of `mode`, READ or WRITE, looked up in the index, which counts as
    use. A block is *done* when there is nothing to do: a write finds it stored, with the same
    length, or a read does not find it."""

    done: int  # how many of them are

    def __init__(
        self, mode: int, hashes: list[HashValue], layout: Layout, engine: LocalStorageEngine
    ) -> None:
        """Look them up; raises InvalidArgumentError for what is no hash."""
        self.count = len(hashes)  # H
        self._mode = mode
        self._layout = layout
        self._num_shards = engine.geometry.shards
        self._final = FINISHED if mode == WRITE else ABORTED

    @abstractmethod
    def pages_already(self) -> list[int]:
        """The pages of a write's blocks that are done; of a read none."""

    def states_when_done(self) -> bytes:
        """The states of all blocks once there is nothing to do for any."""
        return bytes([self._final]) * self.count

    @abstractmethod
    def states(self) -> bytes:
        """The state that each block begins with, [H]."""

    @abstractmethod
    def deal(self, workers: int) -> None:
        """Decide which of so many workers had better write which blocks, and in which order."""

    @abstractmethod
    def cells(self, room: Room) -> bytes:
        """What the table holds of the blocks, CELL [H], in this room; after `deal`."""

    @abstractmethod
    def queue(self, room: Room) -> Sequence[int] | npt.NDArray[np.uint32]:
        """The cells of those that are not done, in the order in which to queue them; after
        `deal`."""


def new_blocks(
    mode: int, hashes: list[HashValue], layout: Layout, engine: LocalStorageEngine
) -> NewBlocks:
    """Look the blocks up; raises InvalidArgumentError for what is no hash."""
    kind = FewBlocks if len(hashes) <= FEW else ManyBlocks
    return kind(mode, hashes, layout, engine)


class FewBlocks(NewBlocks):
    """By loops."""

    def __init__(
        self, mode: int, hashes: list[HashValue], layout: Layout, engine: LocalStorageEngine
    ) -> None:
        super().__init__(mode, hashes, layout, engine)
        self._keys = keys = MixedKeys.of(map(keymath.as_key, hashes))
        self._shapes = [layout.shape_of(at) for at in range(len(hashes))]
        writes = mode == WRITE
        lengths = [nbytes for _, _, nbytes in self._shapes] if writes else None
        self._entries = engine.lookup.find_mixed(keys, lengths)
        self._is_done = [(entry >= 0) is writes for entry in self._entries]
        self._order = [at for at, is_done in enumerate(self._is_done) if not is_done]
        self.done = self.count - len(self._order)
        self._homes: dict[int, int] = {}

    def pages_already(self) -> list[int]:
        if not self.done or self._mode != WRITE:
            return []
        pages_of = self._layout.pages_of
        return [
            page for at, is_done in enumerate(self._is_done) if is_done for page in pages_of(at)
        ]

    def states(self) -> bytes:
        return bytes([self._final if is_done else INITIAL for is_done in self._is_done])

    def deal(self, workers: int) -> None:
        order = self._order
        if self._mode != WRITE or len(order) < 2:
            return
        mixed, count = self._keys.mixed, self._num_shards
        shards = [keymath.shard_of(mixed[at], count) for at in order]
        lengths = [self._shapes[at][2] for at in order]
        in_turn, homes = deal_few(shards, lengths, count, workers)
        self._order = [order[at] for at in in_turn]
        self._homes = dict(zip(self._order, homes, strict=True))

    def cells(self, room: Room) -> bytes:
        pack, homes, mode = CELL_FIELDS.pack, self._homes, self._mode
        row, pages, regions = room.row, room.pages, self._layout.regions
        is_write = int(mode == WRITE)
        cells = [
            pack(
                *(low, high, nbytes, pages + first, pieces, row, 0, 0, mode, regions),
                *(homes.get(at, 0), entry + 1, mixed * is_write),
            )
            for at, ((low, high), mixed, (first, pieces, nbytes), entry) in enumerate(
                zip(self._keys.pairs, self._keys.mixed, self._shapes, self._entries, strict=True)
            )
        ]
        return b"".join(cells)

    def queue(self, room: Room) -> list[int]:
        return [room.start + at for at in self._order]


class ManyBlocks(NewBlocks):
    """By numpy."""

    def __init__(
        self, mode: int, hashes: list[HashValue], layout: Layout, engine: LocalStorageEngine
    ) -> None:
        super().__init__(mode, hashes, layout, engine)
        self._keys = keymath.as_keys(hashes)
        self._mixed = keymath.mix(self._keys) if mode == WRITE else None
        lengths = layout.nbytes if mode == WRITE else None
        self._entries = engine.find_entries(self._keys, nbytes=lengths)
        found = self._entries >= 0
        self._is_done = found if mode == WRITE else ~found
        self.done = int(self._is_done.sum())
        self._order = np.flatnonzero(~self._is_done)
        self._homes: npt.NDArray[np.int64] | None = None

    def pages_already(self) -> list[int]:
        return self._layout.pages_where(self._is_done) if self._mode == WRITE else []

    def states(self) -> bytes:
        states = np.where(self._is_done, self._final, INITIAL)
        return bytes(states.astype(np.uint8))

    def deal(self, workers: int) -> None:
        if self._mixed is None or len(self._order) < 2:
            return
        shards = keymath.shards_of(self._mixed[self._order], self._num_shards)
        lengths = self._layout.nbytes[self._order]
        in_turn, self._homes = deal(shards, lengths, self._num_shards, workers)
        self._order = self._order[in_turn]

    def cells(self, room: Room) -> bytes:
        layout = self._layout
        cells = np.zeros(self.count, CELL)
        cells["low"], cells["high"] = self._keys[:, 0], self._keys[:, 1]
        cells["pages"], cells["places"] = room.pages + layout.first, layout.count
        cells["nbytes"], cells["regions"] = layout.nbytes, layout.regions
        cells["row"], cells["mode"] = room.row, self._mode
        cells["listed"] = self._entries + 1
        if self._mixed is not None:
            cells["mixed"] = self._mixed
        if self._homes is not None:
            cells["home"][self._order] = self._homes
        return cells.tobytes()

    def queue(self, room: Room) -> npt.NDArray[np.uint32]:
        return (room.start + self._order).astype(np.uint32)
