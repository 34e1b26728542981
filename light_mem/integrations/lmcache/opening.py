"""A service over the L1 pool of LMCache: whole pages of it, objects by offset and length."""

from __future__ import annotations

import ctypes

import torch

from light_mem.errors import InvalidArgumentError, KVCacheMemoryError
from light_mem.integrations.lmcache.options import AdapterOptions
from light_mem.integrations.settings import started
from light_mem.local_service import LocalCacheService

_HOW_TO_SHARE = (
    "LMCache's L1 pool must lie in shared memory. Start its server with --no-l1-use-lazy and "
    "--shm-name NAME, without --l1-use-hugepages and --l1-devdax-path; /dev/shm must have room for "
    "the pool"
)


class Pool:
    """The L1 pool: `nbytes` from `address` on, which LMCache keeps mapped until the adapter is
    closed. What does not fill a page at its end is left out."""

    def __init__(self, address: int, nbytes: int, slot_bytes: int) -> None:
        """Raises InvalidArgumentError for a pool smaller than a page of `slot_bytes`."""
        pages = nbytes // slot_bytes
        if pages < 1:
            raise InvalidArgumentError(
                f"the L1 pool has {nbytes} bytes, fewer than slot_bytes: {slot_bytes}",
                size=nbytes,
                slot_bytes=slot_bytes,
            )
        self.nbytes = pages * slot_bytes
        self._address = address
        memory = (ctypes.c_uint8 * self.nbytes).from_address(address)
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8).view(pages, slot_bytes)

    def region(self, address: int, nbytes: int) -> tuple[int, int] | None:
        """Offset and length of an object; None: it does not lie in the pool, or in its rest."""
        offset = address - self._address
        if offset < 0 or nbytes <= 0 or offset + nbytes > self.nbytes:
            return None
        return offset, nbytes


def open_service(pool: Pool, options: AdapterOptions) -> LocalCacheService:
    """A running service over the pool. Its `create` never waits for room.

    Errors are those of LocalCacheService; KVCacheMemoryError says how LMCache is to be started.
    """
    try:
        service = LocalCacheService(
            options.file,
            options.storage_size,
            options.num_of_shard,
            pool.tensor,
            options.num_workers,
            verify=options.verify,
            durability=options.durability,
            page_cache=options.page_cache,
            time_to_live=options.time_to_live,
            create_timeout=0.0,
        )
    except KVCacheMemoryError as error:
        raise KVCacheMemoryError(f"{_HOW_TO_SHARE}. ({error})", **error.values) from error
    return started(service)
