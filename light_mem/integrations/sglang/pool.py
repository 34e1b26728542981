"""HostPool: where the pages of one of SGLang's host pools lie in memory.

A pool says it itself: `get_page_buffer_meta(indices)` gives the addresses and lengths of a page's
pieces (in the layout `page_first`: K and V of a multi-head pool, one piece of an MLA pool). The
buffers that they lie in are what LightMem's workers map.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from light_mem.engine.maps import find_region
from light_mem.errors import InvalidArgumentError, KVCacheMemoryError

_HOW_TO_SHARE = (
    'LightMem\'s workers must be able to map it: put "allocator": "shm" into '
    "--hicache-storage-backend-extra-config, as JSON on the command line (SGLang does not look for "
    "this key in an @file)"
)


class Buffer(NamedTuple):
    """Memory of a pool that holds the pieces `pieces` (positions in a page) of every page.

    memory      uint8 [pages, page_bytes] over all of it
    page_bytes  bytes that a page has in it
    """

    memory: torch.Tensor
    pieces: npt.NDArray[np.int64]
    page_bytes: int


class HostPool:
    """The geometry of one pool. Immutable; any thread.

    name         SGLang's name of the pool: "kv" or a side pool's
    page_tokens  host indices that SGLang gives for a page
    piece_bytes  int64 [pieces]: lengths of a page's pieces
    buffers      Buffer of each mapping that the pieces lie in; none for a pool that SGLang keeps
                 for its indices only

    Raises InvalidArgumentError for a pool that cannot give its pages in place, KVCacheMemoryError
    when its memory is private.
    """

    def __init__(self, name: str, pool: Any) -> None:
        self.name = name
        self.page_tokens = int(getattr(pool, "logical_page_size", pool.page_size))
        self._pool = pool
        self.buffers: tuple[Buffer, ...] = ()
        self.piece_bytes = np.empty(0, np.int64)
        found = self._ask(torch.arange(self.page_tokens, dtype=torch.int64))
        if found is not None:
            addresses, self.piece_bytes = found
            self.buffers = tuple(self._buffers(addresses))

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return int(self.piece_bytes.sum())

    def regions(self, indices: torch.Tensor, pages: int) -> list[npt.NDArray[np.int64]]:
        """Where pages lie: for each buffer an array [pages, pieces, 2] of offset and length.

        indices   integer tensor [pages * page_tokens]: SGLang's host indices

        Raises InvalidArgumentError when they are of another number, or the pool has changed.
        """
        if indices.dim() != 1 or len(indices) != pages * self.page_tokens:
            raise InvalidArgumentError(
                f"{pages} pages of the pool {self.name} have {pages * self.page_tokens} host "
                f"indices, not {tuple(indices.shape)}",
                pool=self.name,
                shape=tuple(indices.shape),
                needed=pages * self.page_tokens,
            )
        found = self._ask(indices)
        if found is None or len(found[1]) != pages * len(self.piece_bytes):
            raise InvalidArgumentError(
                f"the pool {self.name} gives no addresses of its pages", pool=self.name
            )
        addresses, lengths = (part.reshape(pages, -1) for part in found)
        if (lengths != self.piece_bytes).any():
            raise InvalidArgumentError(
                f"the pages of the pool {self.name} have changed their size", pool=self.name
            )
        return [
            np.stack(
                (
                    addresses[:, buffer.pieces] - buffer.memory.data_ptr(),
                    lengths[:, buffer.pieces],
                ),
                axis=2,
            )
            for buffer in self.buffers
        ]

    def _ask(
        self, indices: torch.Tensor
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None:
        try:
            found = self._pool.get_page_buffer_meta(indices)
        except (AttributeError, NotImplementedError, ValueError) as error:
            layout = getattr(self._pool, "layout", None)
            raise InvalidArgumentError(
                f"the host pool {self.name} ({type(self._pool).__name__}, layout {layout}) cannot "
                f"give its pages in place: {error}. Try --hicache-mem-layout page_first",
                pool=self.name,
                layout=layout,
                reason=str(error),
            ) from error
        if found is None:
            return None
        addresses, lengths = found
        return np.array(addresses, np.int64), np.array(lengths, np.int64)

    def _buffers(self, addresses: npt.NDArray[np.int64]) -> Iterator[Buffer]:
        placed = np.zeros(len(addresses), bool)
        for memory in _memories(self._pool):
            start = memory.data_ptr()
            inside = (addresses >= start) & (addresses < start + memory.nbytes) & ~placed
            placed |= inside
            if inside.any():
                pieces = np.flatnonzero(inside)
                page_bytes = int(self.piece_bytes[pieces].sum())
                self._check(memory, page_bytes)
                yield Buffer(memory.view(-1, page_bytes), pieces, page_bytes)
        if not placed.all():
            raise InvalidArgumentError(
                f"pages of the host pool {self.name} ({type(self._pool).__name__}) lie outside of "
                "the buffers that it names",
                pool=self.name,
            )

    def _check(self, memory: torch.Tensor, page_bytes: int) -> None:
        if memory.device.type != "cpu" or memory.nbytes % page_bytes:
            raise InvalidArgumentError(
                f"a buffer of the host pool {self.name} ({type(self._pool).__name__}) is not a "
                f"whole number of pages of {page_bytes} bytes in CPU memory: {memory.nbytes} bytes "
                f"on {memory.device}",
                pool=self.name,
                page_bytes=page_bytes,
                size=memory.nbytes,
                device=str(memory.device),
            )
        try:
            region = find_region(memory.data_ptr(), memory.nbytes)
        except OSError as error:
            raise KVCacheMemoryError(
                f"nothing tells what the host pool {self.name} lies in: {error}",
                pool=self.name,
                reason=str(error),
            ) from error
        if not region.shared:  # LightMem could move it, and SGLang's pointers would not follow
            raise KVCacheMemoryError(
                f"the host pool {self.name} lies in private memory. {_HOW_TO_SHARE}",
                pool=self.name,
                path=region.path,
            )


def cannot_map(pool: HostPool, error: KVCacheMemoryError) -> KVCacheMemoryError:
    """The error for a pool whose memory turns out not to be mappable, with what to do."""
    return KVCacheMemoryError(
        f"the host pool {pool.name}: {error}. {_HOW_TO_SHARE}", **error.values, pool=pool.name
    )


def _memories(pool: Any) -> list[torch.Tensor]:
    """The memory behind a pool's tensors, each mapping once, uint8 [bytes]."""
    name_buffers = getattr(pool, "get_hybrid_pool_buffer", None)
    buffers = name_buffers() if name_buffers is not None else pool.kv_buffer
    if isinstance(buffers, torch.Tensor):
        buffers = [buffers]
    storages: dict[int, torch.UntypedStorage] = {}
    for buffer in buffers:
        if isinstance(buffer, torch.Tensor) and buffer.nbytes:
            storage = buffer.untyped_storage()
            storages.setdefault(storage.data_ptr(), storage)
    return [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in storages.values()]
