"""Engines that leave nothing in the page cache, and how much of a store is in there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from light_mem.engine import page_cache
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.settings import EngineSettings
from tests.cached import cached, can_forget
from tests.engine_helpers import Rig

SHARD = "shard-000.data"


@pytest.fixture(autouse=True)
def cache_that_drops(tmp_path: Path) -> None:
    if not page_cache.can_drop() or not can_forget(tmp_path):
        pytest.skip("this system or file system drops no pages")


def open_dropping(directory: Path, pages: int, page_bytes: int, **options: Any) -> Rig:
    LocalStorageEngine.open_store(
        directory,
        page_bytes=page_bytes,
        num_of_shard=1,
        storage_size=pages * page_bytes,
        block_pages=1,
    ).close()
    engine = LocalStorageEngine(
        directory, kind="worker", settings=EngineSettings(page_cache="drop", **options)
    )
    return Rig(engine, page_bytes)


def in_cache(directory: Path) -> int:
    """Kernel pages of the shard's data in the cache, its header aside."""
    return int(cached(directory / SHARD)[1:].sum())
