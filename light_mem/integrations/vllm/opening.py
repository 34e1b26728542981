"""A service whose pages are the rows of vLLM's primary tier."""

from __future__ import annotations

import os

import torch

from light_mem.errors import InvalidArgumentError
from light_mem.integrations.settings import started
from light_mem.local_service import LocalCacheService


def rows_of(view: memoryview) -> torch.Tensor:
    """The rows of a view [num_chunks, row_bytes] as a uint8 tensor over the same memory.

    The view cannot be released while the tensor lives. Raises InvalidArgumentError for a view of
    another form, or one that may not be written to.
    """
    if view.ndim != 2 or not view.c_contiguous or view.readonly or not view.nbytes:
        raise InvalidArgumentError(
            "the primary tier is a writable, contiguous view [num_chunks, row_bytes], not "
            f"{'a read-only' if view.readonly else 'a'} one of shape {view.shape} and strides "
            f"{view.strides}",
            shape=view.shape,
            strides=view.strides,
            readonly=view.readonly,
        )
    rows = len(view)
    return torch.frombuffer(view, dtype=torch.uint8).view(rows, view.nbytes // rows)


def open_service(
    view: memoryview,
    file: str | os.PathLike[str],
    storage_size: int,
    *,
    num_of_shard: int,
    num_workers: int,
    verify: bool,
    durability: str,
    page_cache: str = "keep",
    time_to_live: float | None = None,
) -> LocalCacheService:
    """A running service over the rows of `view`, which must be a shared mapping.

    Its `create` never waits for room. Errors are those of LocalCacheService.
    """
    service = LocalCacheService(
        file,
        storage_size,
        num_of_shard,
        rows_of(view),
        num_workers,
        verify=verify,
        durability=durability,
        page_cache=page_cache,
        time_to_live=time_to_live,
        create_timeout=0.0,
    )
    return started(service)
