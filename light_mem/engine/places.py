"""Where in the KV memory a block's bytes lie: rows of equal length, or regions of any length."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from light_mem.errors import InvalidArgumentError

Bytes2D = npt.NDArray[np.uint8]
Bytes1D = npt.NDArray[np.uint8]
RowNumbers = npt.NDArray[np.intp]
Extent = tuple[int, int]  # of a memory: offset and length in bytes


class Rows(NamedTuple):
    """Rows of `memory`, in order.

    memory   uint8 [rows, row_bytes]: the KV tensor; one row is a page of the store
    numbers  row numbers, dtype intp, shape [n]; not checked here
    """

    memory: Bytes2D
    numbers: RowNumbers

    @property
    def nbytes(self) -> int:
        """Length of the block in bytes."""
        return len(self.numbers) * int(self.memory.shape[1])

    def part(self, start: int, end: int) -> Rows:
        """What holds the block's bytes `[start, end)`, both at page boundaries."""
        row_bytes = self.memory.shape[1]
        return Rows(self.memory, self.numbers[start // row_bytes : end // row_bytes])

    def first_if_contiguous(self) -> int | None:
        """The first row when the rows follow each other, else None."""
        numbers = self.numbers
        first = int(numbers[0])
        if len(numbers) == 1:
            return first
        if int(numbers[-1]) - first == len(numbers) - 1 and bool((np.diff(numbers) == 1).all()):
            return first
        return None

    def extents(self) -> list[Extent]:
        """Where the block's bytes lie in the memory, in order, as few as it goes."""
        row_bytes, first = int(self.memory.shape[1]), self.first_if_contiguous()
        if first is not None:
            return [(first * row_bytes, len(self.numbers) * row_bytes)]
        return [(row * row_bytes, row_bytes) for row in self.numbers.tolist()]

    def slices(self) -> list[Bytes1D]:
        """The block's bytes in order, as few views of the memory as it goes."""
        return _slices(self)

    def require_pages(self, page_bytes: int) -> None:
        """Raise InvalidArgumentError unless each row is a page: a longer one would reach into the
        slots of another block."""
        if self.memory.shape[1] != page_bytes:
            raise InvalidArgumentError(
                f"the rows of a block are pages of {page_bytes} bytes, not {self.memory.shape[1]}",
                page_bytes=page_bytes,
                found=self.memory.shape[1],
            )


class Regions(NamedTuple):
    """Regions of `memory`, in order; together they are one block, which need not fill its last
    page.

    memory   uint8 [bytes]
    regions  (offset, length) in bytes, within the memory; not checked here
    """

    memory: Bytes1D
    regions: list[Extent]

    @property
    def nbytes(self) -> int:
        """Length of the block in bytes."""
        return sum(length for _, length in self.regions)

    def part(self, start: int, end: int) -> Regions:
        """What holds the block's bytes `[start, end)`, as far as it has them."""
        inside = []
        at = 0
        for offset, length in self.regions:
            first, last = max(start, at), min(end, at + length)
            if first < last:
                inside.append((offset + first - at, last - first))
            at += length
        return Regions(self.memory, inside)

    def extents(self) -> list[Extent]:
        """Where the block's bytes lie in the memory, in order."""
        return self.regions

    def slices(self) -> list[Bytes1D]:
        """The block's bytes in order, as views of the memory."""
        return _slices(self)

    def require_pages(self, page_bytes: int) -> None:
        """Nothing to check: regions are bytes, whatever a page is."""


Place: TypeAlias = "Rows | Regions"


def _slices(place: Place) -> list[Bytes1D]:
    flat = place.memory.reshape(-1)
    return [flat[offset : offset + length] for offset, length in place.extents()]
