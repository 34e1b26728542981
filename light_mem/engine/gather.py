"""Gather: blocks from the KV memory to the slots. `copy.py` says in which way, and why."""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from light_mem.engine import copy_loops as loops
from light_mem.engine.copy import Plan, Stopping, Update, new_checksum, pieces_of_rows
from light_mem.engine.page_views import PageViews
from light_mem.engine.pieces import (
    has_short_regions,
    is_by_rows,
    is_one_piece,
    joined_pieces,
    straight_pieces,
)
from light_mem.engine.places import Place, Regions, Rows
from light_mem.engine.scratch import Scratch, ScratchTable
from light_mem.engine.sinks import Sink
from light_mem.index.keys import key_bytes

# A block to copy: its key, and its parts, in order, each from a place to a sink as long as it.
Gather = tuple[int, int, Sequence[tuple[Place, Sink]]]


class Gathering:
    """Blocks to copy, as `Gatherer.plan` has planned it."""

    def __init__(
        self, plan: Plan, checksums: list[xxhash.xxh3_64 | None], whole: list[int]
    ) -> None:
        """`checksums` of the blocks; of those that are None there the plan adds them to `whole`."""
        self._plan, self._checksums, self._whole = plan, checksums, whole

    def run(self, stopped: Stopping = None) -> list[int]:
        """Copy them; returns their checksums. Raises Stopped, and OSError of the sinks."""
        self._plan.run(stopped)
        whole = self._whole
        if len(whole) == len(self._checksums):
            return whole
        left = iter(whole)
        return [next(left) if each is None else each.intdigest() for each in self._checksums]


class Gatherer:
    """Gathers for one worker. Not thread-safe."""

    def __init__(self) -> None:
        self._scratch = Scratch()
        self.forget()

    def plan(self, blocks: Sequence[Gather]) -> Gathering:
        """Blocks that its `run` copies to the sinks, in this order; once, before `forget`."""
        plan = Plan()
        checksums: list[xxhash.xxh3_64 | None] = []
        whole: list[int] = []  # the checksums of those that are None there
        for low, high, parts in blocks:
            place, sink = parts[0]
            if (
                len(parts) == 1
                and is_one_piece(place)
                and (views := self._of(place)).firsts is not None
            ):
                table = self._table(len(place.numbers), views)
                store, first = sink.storing(0, len(table.piece))
                key, rows = key_bytes(low, high), place.numbers
                step = (views.firsts, views.take, rows, table, store, first, key, whole.append)
                plan.steps(loops.gather_whole).append(step)
                checksums.append(None)
                continue
            checksum = new_checksum(low, high)
            for place, sink in parts:
                self._plan(plan, place, sink, checksum.update)
            checksums.append(checksum)
        return Gathering(plan, checksums, whole)

    def gather_part(
        self, place: Place, sink: Sink, checksum: xxhash.xxh3_64, stopped: Stopping = None
    ) -> None:
        """Copy what lies at a place to a sink, and add it to the checksum; raises as `run`."""
        plan = Plan()
        self._plan(plan, place, sink, checksum.update)
        plan.run(stopped)

    def forget(self) -> None:
        """Let go of the memory that was copied from last."""
        self._views: PageViews | None = None
        self._tables: dict[int, ScratchTable] = {}  # by rows, of this memory

    def _of(self, place: Place) -> PageViews:
        views = self._views
        if views is None or views.memory is not place.memory:
            views = self._views = PageViews(place)
            self._tables.clear()
        return views

    def _table(self, count: int, views: PageViews) -> ScratchTable:
        found = self._tables.get(count)
        if found is None:
            found = self._tables[count] = self._scratch.table(count, views.row_bytes)
        return found

    def _plan(self, plan: Plan, place: Place, sink: Sink, update: Update) -> None:
        """Copy what lies at a place to a sink, and add it to a checksum."""
        views = self._of(place)
        if has_short_regions(place):
            self._plan_short(plan, views, place, sink, update)
        elif not is_by_rows(place):
            _plan_straight(plan, views, place, sink, update)
        elif views.firsts is None:
            _plan_rows(plan, place, sink, update)
        else:
            steps = plan.steps(loops.gather_small_rows)
            for rows, at in pieces_of_rows(place.numbers, views.row_bytes):
                table = self._table(len(rows), views)
                step = (views.firsts, views.take, rows, table)
                steps.append((*step, *sink.storing(at, len(table.piece)), update))

    def _plan_short(
        self, plan: Plan, views: PageViews, place: Regions, sink: Sink, update: Update
    ) -> None:
        steps, at = plan.steps(loops.gather_short), 0
        for joined, nbytes in joined_pieces(place.regions):
            piece = self._scratch.bytes[:nbytes]
            steps.append((views.flat, joined, piece, *sink.storing(at, nbytes), update))
            at += nbytes


def _plan_rows(plan: Plan, place: Rows, sink: Sink, update: Update) -> None:
    steps, memory = plan.steps(loops.gather_rows), place.memory
    for rows, at in pieces_of_rows(place.numbers, memory.shape[1]):
        each = [memory[row] for row in rows.tolist()]
        steps.append((*sink.storing_rows(at, memory, rows), each, update))


def _plan_straight(plan: Plan, views: PageViews, place: Place, sink: Sink, update: Update) -> None:
    flat, steps, at = views.flat, plan.steps(loops.gather_straight), 0
    for offset, length in straight_pieces(place.extents()):
        steps.append((flat[offset : offset + length], *sink.storing(at, length), update))
        at += length
