"""Where the blocks of one task lie in the KV tensor: its pages, or regions of any length."""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from light_mem.blocks import lengths
from light_mem.engine import places
from light_mem.engine.places import Bytes2D, Place, Rows
from light_mem.engine.table_layout import READ, WORDS_PER_REGION
from light_mem.errors import InvalidArgumentError, PageIndexError

if TYPE_CHECKING:
    from typing import TypeAlias

    RegionsArgument: TypeAlias = "Sequence[tuple[int, int]] | Sequence[Sequence[tuple[int, int]]]"


class Layout(ABC):
    """The places of a task's H blocks, as its task table holds them. Picklable, never changed.

    words     uint32: page indices, or offsets and lengths of regions
    first     uint32 [H]: where a block's words begin
    count     uint32 [H]: page indices or regions of a block
    nbytes    int64 [H]: lengths of the blocks
    regions   1: words are regions, 0: pages
    """

    words: npt.NDArray[np.uint32]
    first: npt.NDArray[np.uint32]
    count: npt.NDArray[np.uint32]
    nbytes: npt.NDArray[np.int64]
    regions: int

    @property
    @abstractmethod
    def nbytes_in_all(self) -> int:
        """Bytes of all blocks together."""

    @property
    @abstractmethod
    def pieces(self) -> int:
        """Pages or regions of all blocks together."""

    @abstractmethod
    def shape_of(self, block: int) -> tuple[int, int, int]:
        """A block's numbers in `first`, `count` and `nbytes`."""

    @abstractmethod
    def place_of(self, block: int, memory: Bytes2D) -> Place:
        """Where a block's bytes lie in the KV memory, uint8 [num_pages, page_bytes]."""

    @abstractmethod
    def pages_of(self, block: int) -> tuple[int, ...]:
        """The pages of a block in order."""

    @abstractmethod
    def regions_of(self, block: int) -> tuple[tuple[int, int], ...]:
        """The regions of a block in order: (offset, length) in bytes."""

    @abstractmethod
    def pages_where(self, chosen: npt.NDArray[np.bool_]) -> list[int]:
        """The pages of the chosen blocks, bool [H]."""


class PageLayout(Layout):
    """Blocks of `per_hash` pages each, the last one maybe shorter."""

    regions = 0

    def __init__(
        self, pages: npt.NDArray[np.uint32], hashes: int, per_hash: int, page_bytes: int
    ) -> None:
        self.words = pages
        self._hashes = hashes
        self._per_hash = per_hash
        self._page_bytes = page_bytes

    # Made when they are asked for: a small read that `create` makes itself needs none of them.

    @cached_property
    def first(self) -> npt.NDArray[np.uint32]:  # type: ignore[override]
        return np.arange(0, self._hashes * self._per_hash, self._per_hash, dtype=np.uint32)

    @cached_property
    def count(self) -> npt.NDArray[np.uint32]:  # type: ignore[override]
        return lengths(self._hashes, len(self.words), self._per_hash).astype(np.uint32)

    @cached_property
    def nbytes(self) -> npt.NDArray[np.int64]:  # type: ignore[override]
        return self.count.astype(np.int64) * self._page_bytes

    @property
    def nbytes_in_all(self) -> int:
        return len(self.words) * self._page_bytes

    @property
    def pieces(self) -> int:
        return len(self.words)

    def shape_of(self, block: int) -> tuple[int, int, int]:
        first = block * self._per_hash
        count = min(self._per_hash, len(self.words) - first)
        return first, count, count * self._page_bytes

    def place_of(self, block: int, memory: Bytes2D) -> Place:
        n = self._per_hash
        return Rows(memory, self.words[block * n : (block + 1) * n].astype(np.intp))

    def pages_of(self, block: int) -> tuple[int, ...]:
        n = self._per_hash
        return tuple(self.words[block * n : (block + 1) * n].tolist())

    def regions_of(self, block: int) -> tuple[tuple[int, int], ...]:
        return ()

    def pages_where(self, chosen: npt.NDArray[np.bool_]) -> list[int]:
        pages: list[int] = self.words[np.repeat(chosen, self._per_hash)[: len(self.words)]].tolist()
        return pages


class RegionLayout(Layout):
    """Blocks of regions of the tensor's memory, uint64 [regions, 2] (offset, length)."""

    regions = 1

    def __init__(self, table: npt.NDArray[np.uint64], counts: npt.NDArray[np.int64]) -> None:
        """`counts` [H]: regions of each block, at least one."""
        self._table = table
        ends = np.cumsum(counts)
        self._starts = ends - counts
        self.words = np.ascontiguousarray(table).view(np.uint32).reshape(-1)
        self.first = (self._starts * WORDS_PER_REGION).astype(np.uint32)
        self.count = counts.astype(np.uint32)
        self.nbytes = np.add.reduceat(table[:, 1].astype(np.int64), self._starts)

    @property
    def nbytes_in_all(self) -> int:
        return int(self.nbytes.sum())

    @property
    def pieces(self) -> int:
        return len(self._table)

    def shape_of(self, block: int) -> tuple[int, int, int]:
        return int(self.first[block]), int(self.count[block]), int(self.nbytes[block])

    def place_of(self, block: int, memory: Bytes2D) -> Place:
        return places.Regions(memory.reshape(-1), list(self.regions_of(block)))

    def pages_of(self, block: int) -> tuple[int, ...]:
        return ()

    def regions_of(self, block: int) -> tuple[tuple[int, int], ...]:
        start = int(self._starts[block])
        rows = self._table[start : start + int(self.count[block])].tolist()
        return tuple((offset, length) for offset, length in rows)

    def pages_where(self, chosen: npt.NDArray[np.bool_]) -> list[int]:
        return []


def parse_regions(regions: Any, hashes: int, memory_bytes: int, mode: int) -> RegionLayout | None:
    """The regions of `create_regions`, one entry a hash: (offset, length), or several of them.

    None when there are no hashes. Raises InvalidArgumentError for anything else, PageIndexError
    for what lies outside the tensor, both before anything is queued.
    """
    try:
        entries = len(regions)
    except TypeError:  # a number, a generator
        raise InvalidArgumentError(
            f"regions are a sequence of one entry a hash, not {type(regions).__name__}",
            regions=regions,
        ) from None
    if entries != hashes:
        raise InvalidArgumentError(
            f"{entries} regions do not fit {hashes} hash_values: give one entry a hash",
            regions=entries,
            hashes=hashes,
        )
    if not hashes:
        return None
    try:
        table, counts = _table_of(regions)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgumentError(
            "a block's regions are (offset, length) or a sequence of such pairs, in bytes, not "
            f"{reprlib.repr(regions)}",
            value=regions,
            reason=str(error),
        ) from error
    offsets, lengths = table[:, 0], table[:, 1]
    wrong = (offsets < 0) | (lengths <= 0) | (lengths > memory_bytes - offsets)
    if wrong.any():
        offset, length = table[int(wrong.argmax())].tolist()
        outside = f"is outside the KV tensor of {memory_bytes} bytes"
        raise PageIndexError(
            f"the region of {length} bytes at {offset} "
            f"{outside if length > 0 else 'must have at least one byte'}",
            offset=offset,
            length=length,
            nbytes=memory_bytes,
        )
    if mode == READ and len(table) > 1:
        order = np.argsort(offsets, kind="stable")
        ends = offsets[order] + lengths[order]
        overlap = offsets[order][1:] < ends[:-1]
        if overlap.any():
            offset = int(offsets[order][1:][overlap][0])
            raise InvalidArgumentError(
                f"the bytes at {offset} would be read into twice by one task", offset=offset
            )
    return RegionLayout(table.astype(np.uint64), counts)


def _table_of(regions: Any) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    if isinstance(regions, np.ndarray) or all(len(r) == 2 and np.isscalar(r[0]) for r in regions):
        array = np.asarray(regions)
        if array.ndim == 2:
            array = array[:, None, :]
        if array.ndim != 3 or array.shape[2] != 2 or not array.size or array.dtype.kind not in "iu":
            raise ValueError(f"shape {array.shape}, {array.dtype}")
        counts = np.full(len(array), array.shape[1], np.int64)
        return array.reshape(-1, 2).astype(np.int64), counts
    parts = [np.asarray(r) for r in regions]
    if any(p.ndim != 2 or p.shape[1] != 2 or not p.size or p.dtype.kind not in "iu" for p in parts):
        raise ValueError("not pairs of whole numbers")
    table = np.concatenate(parts).astype(np.int64)
    return table, np.array([len(p) for p in parts], np.int64)
