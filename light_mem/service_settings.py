"""What a LocalCacheService was asked for, checked before anything is opened or made."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from light_mem import blocks
from light_mem.engine import page_cache
from light_mem.engine.affinity import place_workers
from light_mem.engine.opening import MAX_SHARDS, check_descriptors, check_sizes
from light_mem.engine.settings import EngineSettings
from light_mem.engine.table_layout import MAX_BLOCKS, MAX_WORKERS
from light_mem.errors import InvalidArgumentError
from light_mem.index.description import check_slots

if TYPE_CHECKING:
    import torch


class ServiceSettings(NamedTuple):
    """The arguments of `LocalCacheService`, whose docstring describes them, as they are used."""

    directory: Path
    storage_size: int
    num_of_shard: int
    num_workers: int
    page_bytes: int
    num_pages: int
    pages_per_block: int
    engine: EngineSettings
    cpus: list[tuple[int, ...]] | None  # of each worker
    small_read_bytes: int  # 0: `create` reads nothing itself
    small_write_bytes: int
    max_blocks: int

    @classmethod
    def checked(
        cls,
        file: str | os.PathLike[str],
        storage_size: int,
        num_of_shard: int,
        kvcache: torch.Tensor,
        num_workers: int,
        engine: EngineSettings,
        *,
        worker_cpus: str | Sequence[int] | Sequence[Sequence[int]] | None,
        small_read_bytes: int | None,
        small_write_bytes: int | None,
        max_blocks: int,
    ) -> ServiceSettings:
        """Raises InvalidArgumentError."""
        blocks.yes_or_no("verify", engine.verify)
        num_workers = blocks.whole_number("num_workers", num_workers, 1, MAX_WORKERS - 1)
        num_of_shard = blocks.whole_number("num_of_shard", num_of_shard, 1, MAX_SHARDS)
        storage_size = blocks.whole_number("storage_size", storage_size, 1, 2**63 - 1)
        max_blocks = blocks.whole_number("max_blocks", max_blocks, 1, MAX_BLOCKS)
        if engine.durability not in ("kernel", "flush"):
            raise InvalidArgumentError(
                f'durability is "kernel" or "flush", not {engine.durability!r}',
                durability=engine.durability,
            )
        engine = engine._replace(page_cache=page_cache.choose(engine.page_cache))
        cpus = place_workers(worker_cpus, num_workers)
        time_to_live = engine.time_to_live
        if time_to_live is not None and not blocks.seconds("time_to_live", time_to_live):
            raise InvalidArgumentError("time_to_live is more than 0 seconds, or None")
        small_read_bytes = blocks.small_read_bytes(small_read_bytes)
        small_write_bytes = blocks.small_write_bytes(small_write_bytes)
        directory = blocks.store_path(file)
        page_bytes, num_pages = blocks.tensor_sizes(kvcache)
        pages_per_block = blocks.pages_per_block(page_bytes)
        check_sizes(page_bytes, num_of_shard, storage_size, pages_per_block)
        check_slots(storage_size, num_of_shard, page_bytes)
        check_descriptors(num_of_shard)
        # Where blocks are to leave the page cache, or to be on the device, workers see to that.
        keep = engine.page_cache == page_cache.KEEP
        return cls(
            directory,
            storage_size,
            num_of_shard,
            num_workers,
            page_bytes,
            num_pages,
            pages_per_block,
            engine,
            cpus,
            small_read_bytes if keep else 0,
            small_write_bytes if keep and engine.durability == "kernel" else 0,
            max_blocks,
        )
