"""One batch to write, as the writer asks for it: all keys, all lengths, each shard's blocks; and
what of it is copied and not published yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from light_mem.engine.base import BlockIO, Job, Outcome, Report, Stop
from light_mem.index.description import Geometry
from light_mem.index.keys import MixedKeys

if TYPE_CHECKING:
    from light_mem.engine.direct_writes import Cut
    from light_mem.errors import StoreFormatError
    from light_mem.index.allocation import Allocation
    from light_mem.index.runs import Run


class WriteJob(Job):
    """A batch to write.

    keys      of the blocks
    slots     their lengths in slots
    by_shard  positions in the batch of each shard's blocks
    by_calls  whether no mapped slot is to be touched
    """

    def __init__(
        self,
        batch: Sequence[BlockIO],
        geometry: Geometry,
        report: Report,
        stop: Stop,
        mixed: Sequence[int] | None = None,
        by_calls: bool = False,
    ) -> None:
        """`mixed`: the keys' `keys.mix`, where that is known."""
        super().__init__(batch, report, stop)
        self.by_calls = by_calls
        self.keys = MixedKeys.of((block[:2] for block in batch), mixed)
        slots_of = {nbytes: geometry.slots_of(nbytes) for nbytes in set(self.nbytes)}
        self.slots = [slots_of[nbytes] for nbytes in self.nbytes]
        self.by_shard = self.keys.by_shard(geometry.shards)

    def settle_each(self, outcomes: list[tuple[int, Outcome]]) -> None:
        """Tell the final outcomes of blocks, by position."""
        by_outcome: dict[Outcome, list[int]] = {}
        for at, outcome in outcomes:
            by_outcome.setdefault(outcome, []).append(at)
        for outcome, positions in by_outcome.items():
            self.settle(positions, outcome)


Taken = tuple[int, "Allocation"]  # position in the batch, its room
Copied = tuple[int, "list[Run]", int]  # position in the batch, runs, checksum


class Part(NamedTuple):
    """Blocks of one shard that were given room together; then they are copied, then published."""

    shard: int
    job: WriteJob
    taken: list[Taken]
    all_new: tuple[int, int] | None  # the shard's stamp when none of the keys was stored
    copied: Sequence[Copied] = ()  # the others were stopped
    under_way: Cut | None = None  # what does not lie in its slots yet

    @property
    def slots(self) -> list[int]:
        """The blocks' first slots."""
        return [where.slot for _, where in self.taken]

    @property
    def positions(self) -> list[int]:
        """Of the blocks in the batch."""
        return [at for at, _ in self.taken]


Failures = list[tuple[Part, "OSError | StoreFormatError"]]  # their slots are still announced
