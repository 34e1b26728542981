"""A small store whose process is killed while it writes, and what the next one must find in it."""

from __future__ import annotations

from pathlib import Path

from light_mem.engine.base import Outcome
from tests.engine_helpers import Block, Rig, assert_whole_after_death, open_local

PAGES = 12
BEFORE = [Block(key, 2 if key < 2 else 1) for key in range(9)]
FRESH = [Block(100, 3), Block(101, 2), Block(102, 1)]
EVERY = [*BEFORE, *FRESH]
KEPT = {2, 4, 6, 7, 8}  # keys that are stored, without the oldest


def opened(directory: Path, verify: bool = True) -> Rig:
    return Rig(open_local(directory, PAGES, block_pages=8, verify=verify))


def prepared(directory: Path) -> Rig:
    """Blocks 0 to 8 without 3 and 5, whose slots are holes; 0 and 1 are the oldest."""
    rig = opened(directory)
    for block in BEFORE:
        assert rig.write(block)[0][-1] is Outcome.STORED
    rig.delete(BEFORE[3], BEFORE[5])
    return rig


def check(directory: Path, kept: set[int], verify: bool) -> None:
    """Open the store as the next process does, and look at every block."""
    rig = opened(directory, verify)
    assert_whole_after_death(rig, EVERY, kept)
    rig.engine.close()
