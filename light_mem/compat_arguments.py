"""Arguments of the drop-in interface, checked: lists of tokens or hashes, rows of pages, how many
shards."""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy.typing as npt

from light_mem import blocks
from light_mem.errors import InvalidArgumentError
from light_mem.index import description
from light_mem.index.keys import is_bool

if TYPE_CHECKING:
    import torch

    Integers: TypeAlias = Sequence[int] | npt.NDArray[Any] | torch.Tensor

TOKENS, HASH_128S = "tokens", "hash_128s"
LIMITS = {TOKENS: 1 << 64, HASH_128S: 1 << 128}

# Where the number of shards is ours to choose. Keys fill shards unevenly: with one block a shard a
# third of the room would stay empty while blocks are evicted.
BLOCKS_A_SHARD = 8

log = logging.getLogger("light_mem")


def argument(
    method: str, values: Integers | None, tokens: Integers | None, hash_128s: Integers | None
) -> tuple[str, list[int]]:
    """The one of three that was given, checked; its name is "" for the unnamed one. Raises
    TypeError unless it is one, InvalidArgumentError for wrong values."""
    given = [
        (name, value)
        for name, value in (("", values), (TOKENS, tokens), (HASH_128S, hash_128s))
        if value is not None
    ]
    if len(given) != 1:
        raise TypeError(f"{method}() takes tokens or hash_128s, one of them; got {len(given)}")
    name, value = given[0]
    return name, integers(name or "tokens or hash_128s", value, LIMITS[name or HASH_128S])


def reading_of(row: list[int]) -> str:
    """What an unnamed list is; see `compat`."""
    return HASH_128S if row and max(row) >= LIMITS[TOKENS] else TOKENS


def integers(name: str, values: Any, limit: int) -> list[int]:
    """A list of ints below `limit`; raises InvalidArgumentError for anything else."""
    if hasattr(values, "tolist"):
        values = values.tolist()  # numpy, torch
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise InvalidArgumentError(
            f"{name}: a list of ints, not {type(values).__name__}", argument=name, value=values
        )
    values = list(values)
    flag = None if set(map(type, values)) == {int} else next(filter(is_bool, values), None)
    if flag is not None:
        raise InvalidArgumentError(
            f"{name}: a list of ints, but {flag!r} is a bool", argument=name, value=flag
        )
    try:
        row = list(map(operator.index, values))  # no float: 1.2 and 1.7 would be one token
    except TypeError as error:
        raise InvalidArgumentError(
            f"{name}: a list of ints, but {error}", argument=name, reason=str(error)
        ) from None
    if row and (min(row) < 0 or max(row) >= limit):
        at = next(at for at, value in enumerate(row) if not 0 <= value < limit)
        raise InvalidArgumentError(
            f"{name}: value {row[at]} at {at} is outside 0 <= value < 2**{limit.bit_length() - 1}",
            argument=name,
            value=row[at],
            position=at,
        )
    return row


def page_row(pages: Any) -> npt.NDArray[Any]:
    """One-dimensional, to be cut at blocks; `create` of the service checks what is in it."""
    row = blocks.array_of("kv_page_indexer", pages)
    if row.ndim != 1:
        raise InvalidArgumentError(
            f"kv_page_indexer has one dimension, not shape {row.shape}", shape=row.shape
        )
    return row


def shards_that_fit(directory: Path, storage_size: int, num_shard: int, page_bytes: int) -> int:
    """`num_shard`, or fewer: the original takes any number that leaves room for one block at all.

    The answer depends on the arguments and the block size, so the next start opens the same store.
    A store that is there keeps its number, so that a larger `storage_size` can be given later.
    """
    found = description.load(directory) if directory.is_dir() else None
    if found is not None and found.shards <= num_shard:
        return found.shards
    room = storage_size // (page_bytes * blocks.pages_per_block(page_bytes))
    if room >= num_shard:
        return num_shard
    fewer = max(1, room // BLOCKS_A_SHARD)  # 1 even without room: the store says what it needs
    log.warning(
        "storage_size %d has room for %d full blocks: %d shards instead of %d",
        storage_size,
        room,
        fewer,
        num_shard,
    )
    return fewer
