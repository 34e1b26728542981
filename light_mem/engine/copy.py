"""Copies between the KV memory and slots, with the checksum in the same pass: what `gather.py`
(pages to slots) and `scatter.py` (slots to pages) have in common.

A copy pushes the interpreter out of the processor's caches: right after it a step takes four to
five times as long as elsewhere. So copies are planned, those of a whole batch at once, down to the
calls that make them, and then made by loops that do nothing else (`copy_loops.py`).

The work goes in pieces that fit the caches, each copied and then checksummed from there, for a copy
reads memory ahead better than the checksum does. Two rules keep wrong bytes from being believed:

gather   the checksum is taken from the *source* (or a private copy of it) and never from the
         mapped slots: were another process to scribble over the slots, the block would not verify
scatter  copy first, then checksum the mapped slots: what is checksummed is as new as what was
         copied or newer, so a change of the slots during the copy shows in the checksum; or
         checksum a private copy, and copy that
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import xxhash

from light_mem.engine.copy_loops import Loop, Steps
from light_mem.engine.pieces import PIECE_BYTES, pieces_of
from light_mem.engine.places import RowNumbers
from light_mem.index.keys import key_bytes

# Copied between two looks whether to stop, at most: some 700 us.
ROUND_BYTES = 4 << 20
_ROUND_STEPS = ROUND_BYTES // PIECE_BYTES  # a step copies a piece at most

Update = Callable[[Any], None]  # adds bytes to a checksum
Stopping = Callable[[], bool] | None  # whether to stop now; None: there is nobody to say so


class Stopped(Exception):
    """Internal: the copy was aborted between two rounds."""


def new_checksum(low: int, high: int) -> xxhash.xxh3_64:
    """A checksum that has seen the key; feed it the block's bytes in order."""
    return xxhash.xxh3_64(key_bytes(low, high))


class Plan:
    """Steps, in the order in which they are made."""

    def __init__(self) -> None:
        self._parts: list[tuple[Loop, Steps]] = []
        self._loop: Loop | None = None  # of the last part

    def steps(self, loop: Loop) -> Steps:
        """Where steps that this loop makes are added."""
        if loop is not self._loop:
            self._loop = loop
            self._parts.append((loop, []))
        return self._parts[-1][1]

    def run(self, stopped: Stopping) -> None:
        """Make the steps; raises Stopped, and what they raise."""
        for loop, steps in self._parts:
            for at in range(0, len(steps), _ROUND_STEPS):
                if stopped is not None and stopped():
                    raise Stopped
                loop(steps[at : at + _ROUND_STEPS])


def pieces_of_rows(numbers: RowNumbers, row_bytes: int) -> Iterator[tuple[RowNumbers, int]]:
    """The rows of each piece, and where in the block it begins, in bytes."""
    for a, b in pieces_of(len(numbers), PIECE_BYTES // row_bytes):
        yield numbers[a:b], a * row_bytes
