"""A small store of several shards, its changes watched, and whether all of it is in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.settings import EngineSettings
from light_mem.index import format as fmt
from light_mem.index.recovery import states_of
from tests.engine_helpers import Block, assert_consistent, blocks_of_shard, lent, open_local

SHARDS = 3
SLOTS = 6  # of each shard


def of_shard(shard: int, count: int, first: int = 0) -> list[Block]:
    return blocks_of_shard(shard, SHARDS, count, first)


def opened(directory: Path, policy: str = "keep") -> LocalStorageEngine:
    if not directory.exists():
        open_local(directory, SLOTS, shards=SHARDS).close()
    return LocalStorageEngine(directory, kind="worker", settings=EngineSettings(page_cache=policy))


@pytest.fixture(params=["keep", "drop"])
def engine(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[LocalStorageEngine]:
    yield from lent(opened(tmp_path / "store", request.param))


@pytest.fixture
def keeping(tmp_path: Path) -> Iterator[LocalStorageEngine]:
    yield from lent(opened(tmp_path / "store"))


Change = Callable[[int, float], AbstractContextManager[Any]]


def around_changes(
    engine: LocalStorageEngine, patch: pytest.MonkeyPatch, before: Callable[[int, float], None]
) -> None:
    """Call `before` with the shard and the timeout of each change."""
    change: Change = engine._open.change

    def changed(shard: int, timeout: float) -> AbstractContextManager[Any]:
        before(shard, timeout)
        return change(shard, timeout)

    patch.setattr(engine._open, "change", changed)


def is_clean(engine: LocalStorageEngine) -> bool:
    """Whether nothing is marked or announced any more."""
    assert_consistent(engine._index)
    announced = engine._owners.records["intents"][engine._owner.number].any()
    return not announced and fmt.WRITING not in states_of(engine._index.entries)
