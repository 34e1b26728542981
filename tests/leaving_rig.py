"""A store of two shards that an engine is to leave, blocks of each of them, and views of these."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from light_mem import maintenance
from light_mem.engine.local import LocalStorageEngine
from light_mem.index import keys as keymath
from light_mem.index.locks import PathLock, lock_path
from light_mem.views import BlockView, open_view
from tests.engine_helpers import Block, Rig, let_go, open_local


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LocalStorageEngine]:
    """On a store of two shards with blocks in both."""
    engine = open_local(tmp_path / "store", 16, shards=2)
    Rig(engine).write(*(Block(key) for key in range(1, 17)))
    yield engine
    engine.close()
    let_go(engine)
    assert maintenance.verify(tmp_path / "store").clean


def in_shard(shard: int) -> list[Block]:
    """Blocks of the fixture's store that are in one of its shards."""
    found = [
        Block(key)
        for key in range(1, 17)
        if keymath.shard_of(keymath.mix_one(*keymath.as_key(key)), 2) == shard
    ]
    assert len(found) > 3
    return found


def view(engine: LocalStorageEngine, block: Block) -> BlockView:
    found = open_view(engine, *keymath.as_key(block.key))
    assert found is not None
    return found


def lock_of(engine: LocalStorageEngine, shard: int) -> PathLock:
    return PathLock(lock_path(engine.directory, f"shard-{shard:03}"))
