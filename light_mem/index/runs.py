"""Runs of slots: which bytes of a block lie in which of its runs, and how many slots it needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    import numpy.typing as npt

Run = tuple[int, int]  # first slot, slots

# Slots that one numpy call goes over: the other threads of a server wait for some of these calls.
PIECE = 1 << 16


def cut_at_runs(runs: Sequence[Run], nbytes: int, page_bytes: int) -> list[tuple[Run, int, int]]:
    """A block of `nbytes` bytes, cut at the ends of its runs: each run, in order, and the bytes
    `[start, end)` of the block that lie in it. Pure; any thread."""
    parts = []
    start = 0
    for run in runs:
        end = min(nbytes, start + run[1] * page_bytes)
        parts.append((run, start, end))
        start = end
    return parts


def pieces(slots: int) -> Iterator[slice]:
    """All slots, PIECE at a time."""
    return (slice(first, min(slots, first + PIECE)) for first in range(0, slots, PIECE))


@overload
def slots_needed(nbytes: int, page_bytes: int) -> int: ...


@overload
def slots_needed(nbytes: npt.NDArray[Any], page_bytes: int) -> npt.NDArray[Any]: ...


def slots_needed(nbytes: Any, page_bytes: int) -> Any:
    """Slots of `page_bytes` bytes that a block of `nbytes` bytes takes; of several blocks, of a
    signed or floating dtype, shape [n] to [n]. Pure; any thread."""
    return -(-nbytes // page_bytes)
