"""What the tests of times to live, pins and views share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from light_mem import maintenance
from light_mem.engine.keeping import Leased
from light_mem.engine.local import LocalStorageEngine
from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.index import retention
from light_mem.index.recovery import states_of
from tests.engine_helpers import Block, Rig, let_go, open_local
from tests.payload import block_bytes_of

START = 1_800_000_000.0  # seconds since 1970
A, B, C, D = (Block(key, 2) for key in range(1, 5))


class Clock:
    """The time that `retention` goes by, as the test says."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = START
        patch.setattr(retention, "clock", lambda: self.now)


class Store:
    """An engine on a store of `pages` slots in one shard, and its rig."""

    def __init__(self, directory: Path, pages: int, block_pages: int = 8) -> None:
        self.engine: LocalStorageEngine = open_local(directory, pages, block_pages=block_pages)
        self.rig = Rig(self.engine)

    def write(self, *blocks: Block, time_to_live: float | None = None) -> list[str]:
        """Write blocks; the last outcome of each, by name."""
        self.engine.time_to_live = time_to_live
        outcomes = self.rig.write(*blocks)
        self.engine.time_to_live = None
        return [each[-1].name for each in outcomes]

    def stored(self, *blocks: Block) -> list[int]:
        """Keys of those that are stored; not counted as use."""
        return [b.key for b, found in zip(blocks, self.rig.find(*blocks), strict=True) if found]

    def states(self) -> list[int]:
        """How many entries are in each state, FREE left out."""
        states = states_of(self.engine._index.entries)
        return [int(np.count_nonzero(states == state)) for state in range(1, fmt.HELD + 1)]

    def close(self) -> None:
        """Close it, and drop what fixtures would hold."""
        self.engine.close()
        let_go(self.engine, self.rig, self)


def keys_of(*blocks: Block) -> keymath.KeyArray:
    return keymath.as_keys([block.key for block in blocks])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A full store of A to D, used in this order."""
    store = Store(tmp_path / "store", 8)
    store.write(A, B, C, D)
    yield store
    store.close()


def pinned(store: Store) -> tuple[int, int]:
    stats = store.engine.stats()
    return stats["pinned_blocks"], stats["pinned_slots"]


Two = tuple[Store, Store]


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    """Two processes' engines on a full store of A to D, used in this order."""
    two = Store(tmp_path / "store", 8), Store(tmp_path / "store", 8)
    two[0].write(A, B, C, D)
    yield two
    for store in two:
        store.close()
    assert maintenance.verify(tmp_path / "store").clean


def lease(store: Store, block: Block) -> Leased:
    found = store.engine.lease(*keymath.as_key(block.key))
    assert found is not None
    return found


def holds(store: Store, leased: Leased, block: Block) -> bool:
    """Whether the slots of a lease are the bytes of its block."""
    [(start, length)] = leased.runs
    found = store.engine.file(0).read_only(start, length)
    return bool(np.array_equal(found, block_bytes_of(block.key, block.pages, 64).reshape(-1)))
