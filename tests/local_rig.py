"""A small store of one shard, a second engine on it, and what its entries are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from light_mem.engine.local import LocalStorageEngine
from light_mem.index.recovery import states_of
from tests.engine_helpers import Rig, let_go, open_local

PAGES = 8


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    engine = open_local(tmp_path / "store", PAGES, block_pages=PAGES)
    yield Rig(engine)
    engine.close()
    let_go(engine)


@contextmanager
def another(tmp_path: Path) -> Iterator[LocalStorageEngine]:
    """A second engine on the same store, as another service would have."""
    engine = open_local(tmp_path / "store", PAGES, block_pages=PAGES)
    try:
        yield engine
    finally:
        engine.close()


def local_of(rig: Rig) -> LocalStorageEngine:
    assert isinstance(rig.engine, LocalStorageEngine)
    return rig.engine


def states(rig: Rig) -> list[int]:
    return states_of(local_of(rig)._index.entries).tolist()
