"""Filling slots: the copies of blocks that were given room. A part of LocalStorageEngine.

The copies of all parts are planned before the first one, whatever shards they are for, and what
fails in one shard's file takes no other's along.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby
from typing import TYPE_CHECKING

from light_mem.engine.base import Outcome
from light_mem.engine.copy import Stopped
from light_mem.engine.first_touch import FirstTouch
from light_mem.engine.gather import Gatherer
from light_mem.engine.groups import GROUP_BYTES, groups, stop_of
from light_mem.engine.pieces import is_put_straight
from light_mem.engine.write_job import Copied, Failures, Part, WriteJob

if TYPE_CHECKING:
    from light_mem.engine.direct_writes import Cut
    from light_mem.engine.local import LocalStorageEngine
    from light_mem.engine.shard_file import ShardFile


class Filler:
    """Copies for one engine. Not thread-safe."""

    def __init__(self, engine: LocalStorageEngine, gatherer: Gatherer, touch: FirstTouch) -> None:
        # Weak: in a cycle, the maps of a closed store would stay until the next collection.
        self._engine: LocalStorageEngine = weakref.proxy(engine)
        self._gatherer = gatherer
        self._touch = touch

    def fill(self, job: WriteJob, parts: Sequence[Part]) -> tuple[list[Part], Failures]:
        """Copy the blocks of parts of a batch into their slots; tells COPIED. Returns the parts to
        publish, and those that failed, of which nothing is under way any more."""
        places = [job.batch[at].place for part in parts for at in part.positions]
        self._touch.before_copies(places, is_put_straight)
        files = [self._engine.file(part.shard) for part in parts]  # open: they were just changed
        if not self._engine.drops:
            return self._fill(job, parts, files, GROUP_BYTES)
        return self._fill_past(job, parts, files)

    def _fill_past(
        self, job: WriteJob, parts: Sequence[Part], files: list[ShardFile]
    ) -> tuple[list[Part], Failures]:
        """`fill` past the page cache. Each part is copied on its own, because each is awaited on
        its own. Such a copy may wait for the device, so each block is a group of its own: an abort
        is seen before the next block."""
        for part, file in zip(parts, files, strict=True):
            with suppress(OSError):  # a hint; the copy says what is wrong
                file.expect(run for _, (_, runs) in part.taken for run in runs)
        filled: list[Part] = []
        failures: Failures = []
        try:
            for part, file in zip(parts, files, strict=True):
                good, bad = self._fill(job, [part], [file], 1)
                cut = file.cut()
                filled += [each._replace(under_way=cut) for each in good]
                failures += bad
                if bad:
                    _land(file, cut)
        except BaseException:  # nothing of it is under way when its slots are given back
            for part in filled:
                _land(files[0], part.under_way)
            _land(files[0], files[0].cut())
            raise
        return filled, failures

    def _fill(
        self, job: WriteJob, parts: Sequence[Part], files: list[ShardFile], group_bytes: int
    ) -> tuple[list[Part], Failures]:
        batch, stop = job.batch, job.stop
        # By position in the batch: which part, and what slots.
        rooms = {at: (n, runs) for n, part in enumerate(parts) for at, (_, runs) in part.taken}
        copied: list[list[Copied]] = [[] for _ in parts]
        errors: dict[int, OSError] = {}

        def copy(wanted: list[int]) -> None:
            planned = []
            for n, same in groupby(wanted, lambda at: rooms[at][0]):
                positions = list(same)
                blocks = [(rooms[at][1], batch[at]) for at in positions]
                planned.append((n, positions, files[n].plan(self._gatherer, blocks, job.by_calls)))
            stopped = stop_of(wanted, stop)
            made: list[tuple[int, list[int], list[int]]] = []
            for n, positions, copies in planned:
                try:
                    made.append((n, positions, copies(stopped)))
                except OSError as error:
                    # Without its frames, which hold what was copied from and refer to `errors`.
                    errors[n] = error.with_traceback(None)
            if made:
                job.report([at for _, positions, _ in made for at in positions], Outcome.COPIED)
            for n, positions, sums in made:
                copied[n] += [
                    (at, rooms[at][1], found) for at, found in zip(positions, sums, strict=True)
                ]

        for group in groups(list(rooms), job.nbytes, group_bytes):
            while wanted := [at for at in group if rooms[at][0] not in errors and not stop(at)]:
                with suppress(Stopped):
                    copy(wanted)
                    break
        filled = [
            part._replace(copied=copied[n]) for n, part in enumerate(parts) if n not in errors
        ]
        return filled, [(parts[n], error) for n, error in errors.items()]


def _land(file: ShardFile, cut: Cut | None) -> None:
    """Wait for what nobody will publish, whatever becomes of it."""
    with suppress(OSError):
        file.land(cut)
