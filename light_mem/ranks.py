"""Ranks: tensor-parallel processes that hold a part each of every page, on one store.

Each rank has a service and a KV tensor of its own; its blocks lie under keys of its own. A prefix
is of use only as far as *every* rank has it, and ranks that act on different lengths hang in their
next collective or mix up their caches. So a length is agreed on twice: when it is looked up, and
when it was loaded, since a block may be evicted in between, on one rank alone. docs/ranks.md shows
how a server does that.

rank_key, rank_keys   the key under which a rank keeps its part of a block
match_ranks           the prefix that all ranks have, looked up by one process: a scheduler
finished_prefix       how much of a load may be used on this rank, for a scheduler to take the least
RankedCache           the same among the ranks themselves, by a collective
agreement             that collective, from torch.distributed
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from light_mem import blocks
from light_mem.errors import (
    InvalidArgumentError,
    LockTimeoutError,
    ServiceClosedError,
    TaskTableFullError,
)
from light_mem.index import keys as keymath
from light_mem.index.keys import HashValue
from light_mem.logs import Limited
from light_mem.service import CacheService
from light_mem.task import CacheTask

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

MAX_WORLD = 1 << 16
_PERSON = b"lightmem.rank"
_STEP = 32  # hashes looked up at a time: keys behind a gap are not derived

Agree: TypeAlias = Callable[[int], int]


def rank_key(hash_value: HashValue, rank: int, world_size: int) -> int:
    """The hash, below 2**128, of one rank's part of a block.

    hash_value   of the block as a whole; it names content, model, weights and layout
    rank         0 <= rank < world_size
    world_size   parts of a block: another number cuts pages differently, so it shares nothing

    BLAKE2b, 128 bits, of the three in fields of fixed width: no two triples meet, and none meets a
    hash that is a str or bytes. The same in every process and release. Raises InvalidArgumentError.
    """
    return rank_keys([hash_value], rank, world_size)[0]


def rank_keys(hashes: Sequence[HashValue], rank: int, world_size: int) -> list[int]:
    """`rank_key` of each hash; about a microsecond each."""
    world_size = blocks.whole_number("world_size", world_size, 1, MAX_WORLD)
    rank = blocks.whole_number("rank", rank, 0, world_size - 1)
    keys = keymath.as_keys(blocks.parse_hashes(hashes))
    return _derive(keys.astype("<u8").tobytes(), rank, world_size)


def _derive(raw: bytes, rank: int, world_size: int) -> list[int]:
    start = blake2b(struct.pack("<II", world_size, rank), digest_size=16, person=_PERSON)
    derived = []
    for at in range(0, len(raw), 16):
        digest = start.copy()
        digest.update(raw[at : at + 16])
        derived.append(int.from_bytes(digest.digest(), "big"))
    return derived


def match_ranks(service: CacheService, hashes: Sequence[HashValue], world_size: int) -> int:
    """How many leading hashes are stored by every rank. These count as used.

    service   any service or client on the ranks' store; of a rank, or of the scheduler itself

    One process answers, so the answer is the same for all that it is handed to. Raises
    InvalidArgumentError.
    """
    world_size = blocks.whole_number("world_size", world_size, 1, MAX_WORLD)
    keys = keymath.as_keys(blocks.parse_hashes(hashes)).astype("<u8")
    length = 0
    while length < len(keys):
        raw = keys[length : length + _STEP].tobytes()
        by_rank = [_derive(raw, rank, world_size) for rank in range(world_size)]
        # All ranks' parts of the first block, then of the second: a prefix of these is whole
        # blocks and the parts of one more.
        parts = [key for of_block in zip(*by_rank, strict=True) for key in of_block]
        found = service.match_prefix(parts) // world_size
        length += found
        if found < len(by_rank[0]):
            break
    return length


def finished_prefix(task: CacheTask) -> int:
    """How many leading blocks of a ready task are Finished; what is behind them is of no use.

    Raises InvalidArgumentError for a task that is not ready: a worker may touch its pages still.
    """
    if not task.ready():
        raise InvalidArgumentError(f"{task} is not ready: wait for it, or abort it", task=task)
    return task.finished_prefix()


def agreement(group: ProcessGroup | None = None) -> Agree:
    """The least of all ranks' numbers, by an all-reduce of torch.distributed.

    group   one that takes CPU tensors (gloo), such as the CPU group that servers keep beside NCCL;
            None: the default group
    """
    import torch
    import torch.distributed as distributed

    def least(mine: int) -> int:
        number = torch.tensor([mine], dtype=torch.int64)
        distributed.all_reduce(number, distributed.ReduceOp.MIN, group=group)
        return int(number)

    return least


class RankedCache:
    """One rank's view of the cache. `match_prefix`, `load` and `loaded` are collectives: every
    rank calls them in the same order, with the same hashes, and gets the same number.

    service      this rank's, on the store of all ranks; it stays the caller's, who closes it
    agree        gives the least of the numbers that the ranks call it with: `agreement()`, or any
                 other way that the server's ranks have to talk

    Where a rank's own part of a collective fails it takes part all the same, with 0, and then
    raises: the others go on without the cache instead of waiting for it. One thread at a time.
    """

    def __init__(self, service: CacheService, rank: int, world_size: int, agree: Agree) -> None:
        self.service = service
        self.world_size = blocks.whole_number("world_size", world_size, 1, MAX_WORLD)
        self.rank = blocks.whole_number("rank", rank, 0, self.world_size - 1)
        self._agree = agree
        self._limited = Limited()

    def keys(self, hashes: Sequence[HashValue]) -> list[int]:
        """This rank's keys of the blocks."""
        return rank_keys(hashes, self.rank, self.world_size)

    def match_prefix(self, hashes: Sequence[HashValue]) -> int:
        """Collective: how many leading hashes are stored by every rank."""
        return self._least(lambda: self.service.match_prefix(self.keys(hashes)))

    def create(
        self,
        mode: str,
        hashes: Sequence[HashValue],
        page_indices: Sequence[int] | npt.NDArray[np.int64] | torch.Tensor,
    ) -> CacheTask:
        """Write or read this rank's parts; as `CacheService.create`. No collective: before what a
        read brought is used, all ranks call `loaded`."""
        return self.service.create(mode, self.keys(hashes), page_indices)

    def load(
        self,
        hashes: Sequence[HashValue],
        page_indices: Sequence[int] | npt.NDArray[np.int64] | torch.Tensor,
        timeout: float | None = None,
    ) -> int:
        """Collective: read the blocks, and say how many leading ones every rank has in its pages.

        page_indices   this rank's pages; arguments otherwise as those of `CacheService.create`
        timeout        seconds after which what is not read is given up; None: never

        Pages behind the agreed length hold anything. Raises InvalidArgumentError and
        PageIndexError, and LockTimeoutError when a stopped worker may still write to the pages.
        """
        return self._least(lambda: self._load(hashes, page_indices, timeout))

    def loaded(self, task: CacheTask) -> int:
        """Collective: how many leading blocks of their reads all ranks may use; for servers that
        poll a task of `create` themselves. It is ready, on every rank."""
        return self._least(lambda: finished_prefix(task))

    def _load(self, hashes: Sequence[HashValue], pages: Any, timeout: float | None) -> int:
        if timeout is not None:
            timeout = blocks.seconds("timeout", timeout)  # before anything is under way
        try:
            task = self.create("read", hashes, pages)
        except (TaskTableFullError, LockTimeoutError, ServiceClosedError) as error:
            self._limited.warning("a load is left out: %s", str(error))
            return 0
        if not task.wait(timeout):
            self.service.abort(task)
        return finished_prefix(task)

    def _least(self, count: Callable[[], int]) -> int:
        try:
            mine = count()
        except Exception:
            self._agree(0)
            raise
        agreed = self._agree(mine)
        if not 0 <= agreed <= mine:
            raise InvalidArgumentError(
                f"agree is to give the least of all ranks' numbers: {agreed} for {mine}",
                agreed=agreed,
                mine=mine,
            )
        return agreed
