"""How a block is cut into pieces that fit the caches, and which way it is copied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeGuard

from light_mem.engine.places import Bytes1D, Place, Regions, Rows

PIECE_BYTES = 512 * 1024  # about the second-level cache of current server cores
# Pages below this, and regions of less in the mean, go to the slots by way of a scratch piece:
# together they are long enough for copies around the cache (see `program.COPY_TUNABLES`),
# and one call stores them all. Not those that follow each other.
SMALL_PAGE_BYTES = 32 * 1024


def is_one_piece(place: Place) -> TypeGuard[Rows]:
    """Whether it is rows that one call copies well wherever they lie: to ask more of a block of
    some 100 KB costs more than the answer saves."""
    return type(place) is Rows and place.memory.shape[1] * len(place.numbers) <= PIECE_BYTES


def has_small_rows(place: Place) -> TypeGuard[Rows]:
    """Whether it is several small rows, and one piece."""
    return (
        is_one_piece(place) and len(place.numbers) > 1 and place.memory.shape[1] < SMALL_PAGE_BYTES
    )


def is_put_straight(place: Place) -> bool:
    """Whether a sink is handed the memory itself rather than a gathered piece."""
    if isinstance(place, Regions):
        return not has_short_regions(place)
    if place.memory.shape[1] >= SMALL_PAGE_BYTES:
        return True
    return not (is_one_piece(place) or is_scattered(place))


def has_short_regions(place: Place) -> TypeGuard[Regions]:
    """Whether it is regions of less than a large page in the mean."""
    return isinstance(place, Regions) and place.nbytes < SMALL_PAGE_BYTES * len(place.regions)


def is_scattered(place: Place) -> TypeGuard[Rows]:
    """Whether it is better copied by rows, several a call, than slice by slice."""
    return (
        isinstance(place, Rows)
        and place.memory.shape[1] <= PIECE_BYTES
        and place.first_if_contiguous() is None
    )


def straight_pieces(place: Place) -> Iterator[tuple[int, Bytes1D]]:
    """Views of the memory in the order of the block's bytes, and where in the block each begins."""
    at = 0
    for part in place.slices():
        for a, b in pieces_of(len(part), PIECE_BYTES):
            yield at, part[a:b]
            at += b - a


def pieces_of(total: int, size: int) -> Iterator[tuple[int, int]]:
    """Where each piece of `size` begins and ends; the last one may be shorter."""
    for at in range(0, total, size):
        yield at, min(total, at + size)
