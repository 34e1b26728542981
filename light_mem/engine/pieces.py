"""How a block is cut into pieces that fit the caches, and which way it is copied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeGuard

from light_mem.engine.places import Extent, Place, Regions, Rows

PIECE_BYTES = 512 * 1024  # about the second-level cache of current server cores
# Smaller pages (or regions smaller on average) are gathered in a scratch piece, which is long
# enough for non-temporal copies (the threshold of `program.COPY_TUNABLES`) and is stored with one
# call. Pages adjacent in memory are not. (64 pages of 20 and 28 KB: read 1.35 and 1.39, written
# 1.06 and 1.17 times as fast as with 32 KiB for both; no difference for slots the kernel has
# flushed.)
SMALL_PAGE_BYTES = 0x4080


def is_one_piece(place: Place) -> TypeGuard[Rows]:
    """Whether it is rows that one call copies well wherever they lie: to ask more of a block of
    some 100 KB costs more than the answer saves."""
    return type(place) is Rows and place.memory.shape[1] * len(place.numbers) <= PIECE_BYTES


def has_small_rows(place: Place) -> TypeGuard[Rows]:
    """Whether it is small rows, and one piece."""
    return is_one_piece(place) and place.memory.shape[1] < SMALL_PAGE_BYTES


def is_put_straight(place: Place) -> bool:
    """Whether a sink is handed the memory itself rather than a gathered piece."""
    if isinstance(place, Regions):
        return not has_short_regions(place)
    if place.memory.shape[1] >= SMALL_PAGE_BYTES:
        return True
    return not is_by_rows(place)


def has_short_regions(place: Place) -> TypeGuard[Regions]:
    """Whether it is regions of less than a large page in the mean."""
    return isinstance(place, Regions) and place.nbytes < SMALL_PAGE_BYTES * len(place.regions)


def is_by_rows(place: Place) -> TypeGuard[Rows]:
    """Whether it is better copied by rows, several a call, than extent by extent."""
    return is_one_piece(place) or (
        isinstance(place, Rows)
        and place.memory.shape[1] <= PIECE_BYTES
        and place.first_if_contiguous() is None
    )


def straight_pieces(extents: Iterable[Extent]) -> list[Extent]:
    """Extents, cut into pieces."""
    return [
        (at, min(PIECE_BYTES, offset + length - at))
        for offset, length in extents
        for at in range(offset, offset + length, PIECE_BYTES)
    ]


def joined_pieces(extents: Iterable[Extent]) -> Iterator[tuple[list[Extent], int]]:
    """Extents, cut, that are a piece together, and its length: all but the last PIECE_BYTES."""
    joined: list[Extent] = []
    room = PIECE_BYTES
    for extent in extents:
        while extent[1] >= room:
            offset, length = extent
            joined.append((offset, room))
            yield joined, PIECE_BYTES
            extent = offset + room, length - room
            joined, room = [], PIECE_BYTES
        if extent[1]:
            joined.append(extent)  # the very tuple: there may be very many
            room -= extent[1]
    if joined:
        yield joined, PIECE_BYTES - room


def pieces_of(total: int, size: int) -> Iterator[tuple[int, int]]:
    """Where each piece of `size` begins and ends; the last one may be shorter."""
    for at in range(0, total, size):
        yield at, min(total, at + size)
