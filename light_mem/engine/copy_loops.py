"""The loops that copy. All else was worked out before, by `gather.py` and `scatter.py`.

Each makes steps of one kind, tuples of what it calls and hands over: `store(first, piece)` has a
sink store a piece, `update(piece)` adds it to a checksum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import xxhash

Steps = list[tuple[Any, ...]]
Loop = Callable[[Steps], None]


def gather_whole(steps: Steps) -> None:
    """A block of small rows to scratch memory, and that to the sink by one call; the key lies
    before it, for one call to sum up both. `firsts`: see `PageViews`."""
    digest = xxhash.xxh3_64_intdigest
    for firsts, take, rows, (table, piece, before, keyed), store, first, key, add in steps:
        firsts[rows]
        take(rows, 0, table, "clip")
        store(first, piece)
        before[:] = key
        add(digest(keyed))


def gather_small_rows(steps: Steps) -> None:
    """The same of a piece of a longer block."""
    for firsts, take, rows, (table, piece, _, _), store, first, update in steps:
        firsts[rows]
        take(rows, 0, table, "clip")
        store(first, piece)
        update(piece)


def gather_rows(steps: Steps) -> None:
    """Rows to the sink; `each`: the same rows."""
    for store, arguments, each, update in steps:
        store(*arguments)
        for row in each:
            update(row)


def gather_short(steps: Steps) -> None:
    """Short regions to scratch memory, and that to the sink."""
    for memory, regions, piece, store, first, update in steps:
        at = 0
        for offset, length in regions:
            end = at + length
            piece[at:end] = memory[offset : offset + length]
            at = end
        store(first, piece)
        update(piece)


def gather_straight(steps: Steps) -> None:
    """A piece of the memory to the sink."""
    for piece, store, first, update in steps:
        store(first, piece)
        update(piece)


def scatter_small_rows(steps: Steps) -> None:
    """A piece of the slots to rows; `elements`: the same, an element a row; `firsts`: see
    `PageViews`."""
    for firsts, put, rows, elements, piece, update in steps:
        firsts[rows]
        put(rows, elements)
        update(piece)


def scatter_rows(steps: Steps) -> None:
    """The same, where nothing is to be loaded before."""
    for _, put, rows, elements, piece, update in steps:
        put(rows, elements)
        update(piece)


def scatter_joined(steps: Steps) -> None:
    """A piece of the slots to several regions."""
    for memory, regions, piece, update in steps:
        at = 0
        for offset, length in regions:
            end = at + length
            memory[offset : offset + length] = piece[at:end]
            at = end
        update(piece)


def scatter_straight(steps: Steps) -> None:
    """A piece of the slots to one of the memory."""
    for target, piece, update in steps:
        target[:] = piece
        update(piece)
