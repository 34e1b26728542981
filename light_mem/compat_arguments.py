"""Arguments of the drop-in interface, checked: lists of tokens or hashes, rows of pages."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from light_mem.errors import InvalidArgumentError

if TYPE_CHECKING:
    import torch

    Integers: TypeAlias = Sequence[int] | npt.NDArray[Any] | torch.Tensor

TOKENS, HASH_128S = "tokens", "hash_128s"
LIMITS = {TOKENS: 1 << 64, HASH_128S: 1 << 128}


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
        raise InvalidArgumentError(f"{name}: a list of ints, not {type(values).__name__}")
    try:
        row = list(map(operator.index, values))  # no float: 1.2 and 1.7 would be one token
    except TypeError as error:
        raise InvalidArgumentError(f"{name}: a list of ints, but {error}") from None
    if row and (min(row) < 0 or max(row) >= limit):
        at = next(at for at, value in enumerate(row) if not 0 <= value < limit)
        raise InvalidArgumentError(
            f"{name}: value {row[at]} at {at} is outside 0 <= value < 2**{limit.bit_length() - 1}",
            value=row[at],
            position=at,
        )
    return row


def page_row(pages: Any) -> npt.NDArray[Any]:
    """One-dimensional, to be cut at blocks; `create` of the service checks what is in it."""
    try:
        row = np.asarray(pages.detach().cpu().numpy() if hasattr(pages, "detach") else pages)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgumentError(f"kv_page_indexer is no row of page numbers: {error}") from None
    if row.ndim != 1:
        raise InvalidArgumentError(
            f"kv_page_indexer has one dimension, not shape {row.shape}", shape=row.shape
        )
    return row
