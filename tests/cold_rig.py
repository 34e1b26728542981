"""Stores whose blocks are not in the page cache, and what reads of them ask the device for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from light_mem.engine import page_cache, shard_file
from light_mem.engine.direct_reads import DirectReads
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.read_ahead import Span
from light_mem.engine.settings import EngineSettings
from light_mem.index.lookup import Location
from tests.cached import can_forget, forget_all
from tests.engine_helpers import COPIED_AND_STORED, Block, Rig, open_local

MIB = 1 << 20
DATA = "shard-000.data"


@pytest.fixture(autouse=True)
def cache_that_forgets(tmp_path: Path) -> None:
    if not can_forget(tmp_path):
        pytest.skip("this file system drops no pages")


@pytest.fixture(params=["O_DIRECT", "without O_DIRECT"])
def direct(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system has O_DIRECT."""
    has: bool = request.param == "O_DIRECT"
    if not has:
        monkeypatch.setattr(shard_file, "open_direct", lambda *_: -1)
    return has


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the spans that a device was waited for."""
    found: list[int] = []
    read = DirectReads.read

    def spy(self: DirectReads, span: Span, *rest: Any) -> None:
        found.append(span.nbytes)
        read(self, span, *rest)

    monkeypatch.setattr(DirectReads, "read", spy)
    return found


@pytest.fixture
def all_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "hold_each", lambda addresses: [False] * len(addresses))


def make(directory: Path, blocks: list[Block], page_bytes: int) -> None:
    """A store of these blocks, none of them in the page cache."""
    pages = sum(block.pages for block in blocks)
    engine = open_local(directory, pages, page_bytes=page_bytes)
    assert Rig(engine, page_bytes).write(*blocks) == [COPIED_AND_STORED] * len(blocks)
    engine.close()
    del engine  # with its mappings: mapped pages stay
    forget_all(directory / DATA)


@contextmanager
def opened(directory: Path, page_bytes: int, verify: bool = True) -> Iterator[Rig]:
    engine = LocalStorageEngine(directory, kind="worker", settings=EngineSettings(verify=verify))
    yield Rig(engine, page_bytes)
    engine.close()


def bring_in(engine: Any) -> int:
    """Let an engine do all that can wait; in how many steps."""
    steps = 0
    while engine.bring_in():
        steps += 1
    return steps


def located(engine: LocalStorageEngine, blocks: list[Block]) -> list[Location]:
    """Where blocks lie, in the order of the file."""
    found = [engine.lookup.locate(engine.lookup.find_one(b.key, 0), b.key, 0) for b in blocks]
    return sorted((where for where in found if where is not None), key=lambda where: where.slot)
