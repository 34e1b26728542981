"""Scatter: blocks from the slots to the KV memory. `copy.py` says in which way, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import xxhash

from light_mem.engine import copy_loops as loops
from light_mem.engine.copy import Plan, Stopping, Update, pieces_of_rows
from light_mem.engine.page_views import PageViews
from light_mem.engine.pieces import (
    PIECE_BYTES,
    is_by_rows,
    is_one_piece,
    joined_pieces,
    straight_pieces,
)
from light_mem.engine.places import Bytes1D, Place, Regions, RowNumbers, Rows
from light_mem.engine.scratch import Scratch
from light_mem.index.keys import key_bytes

# To copy slots to a place, as long as they, and add them to the checksum if there is one.
Scatter = tuple[Place, Bytes1D, "xxhash.xxh3_64 | None"]

# Regions of less, in the mean, are summed up several by one call.
_LONG_BYTES = PIECE_BYTES // 2


class Scatterer:
    """Scatters for one worker. Not thread-safe."""

    def __init__(self) -> None:
        self._scratch: Scratch | None = None
        self.forget()

    def scatter(self, moves: Iterable[Scatter], stopped: Stopping = None) -> None:
        """Copy to the places, in this order; raises Stopped."""
        plan = Plan()
        for place, slots, checksum in moves:
            views = self._of(place)
            update = _no_sum if checksum is None else checksum.update
            if is_one_piece(place):
                _plan_rows(plan, views, place.numbers, slots, update)
            elif is_by_rows(place):
                for rows, at in pieces_of_rows(place.numbers, views.row_bytes):
                    piece = slots[at : at + len(rows) * views.row_bytes]
                    _plan_rows(plan, views, rows, piece, update)
            elif isinstance(place, Regions) and place.nbytes < len(place.regions) * _LONG_BYTES:
                _plan_joined(plan, views, place, slots, update)
            else:
                _plan_straight(plan, views, place, slots, update)
        plan.run(stopped)

    def scatter_checked(
        self,
        low: int,
        high: int,
        place: Rows,
        fill: Callable[[Bytes1D], bool],
        checksum: int | None,
    ) -> bool:
        """Have `fill` put a block of small rows (`has_small_rows`) into private memory, and copy it
        to its rows if `fill` returns True and its sum is `checksum` (None: any). Returns whether it
        was copied."""
        if self._scratch is None:
            self._scratch = Scratch()
        nbytes = place.nbytes
        piece = self._scratch.bytes[:nbytes]
        if not fill(piece):
            return False
        key = key_bytes(low, high)
        if checksum is not None and self._scratch.sum_up(key, nbytes) != checksum:
            return False
        self.scatter([(place, piece, None)])
        return True

    def forget(self) -> None:
        """Let go of the memory that was copied to last."""
        self._views: PageViews | None = None

    def _of(self, place: Place) -> PageViews:
        views = self._views
        if views is None or views.memory is not place.memory:
            views = self._views = PageViews(place)
        return views


def _plan_rows(
    plan: Plan, views: PageViews, rows: RowNumbers, piece: Bytes1D, update: Update
) -> None:
    """Rows that are a piece."""
    firsts = views.firsts_to_put
    loop = loops.scatter_rows if firsts is None else loops.scatter_small_rows
    plan.steps(loop).append((firsts, views.put, rows, piece.view(views.element), piece, update))


def _plan_joined(
    plan: Plan, views: PageViews, place: Regions, slots: Bytes1D, update: Update
) -> None:
    steps, at = plan.steps(loops.scatter_joined), 0
    for joined, nbytes in joined_pieces(place.regions):
        steps.append((views.flat, joined, slots[at : at + nbytes], update))
        at += nbytes


def _plan_straight(
    plan: Plan, views: PageViews, place: Place, slots: Bytes1D, update: Update
) -> None:
    flat, steps, at = views.flat, plan.steps(loops.scatter_straight), 0
    for offset, length in straight_pieces(place.extents()):
        steps.append((flat[offset : offset + length], slots[at : at + length], update))
        at += length


def _no_sum(piece: Bytes1D) -> None:
    pass
