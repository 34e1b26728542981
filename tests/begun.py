"""Batches that are begun and not ended yet: what was told of their blocks, a gate to the device."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from light_mem.engine import direct_writes
from light_mem.engine.base import BlockIO, Outcome
from light_mem.engine.direct_writes import LEAST_BYTES
from light_mem.engine.read_ahead import Span
from tests.dropping_rig import open_dropping
from tests.engine_helpers import Block, Rig, let_go
from tests.payload import block_bytes_of

PAGE = LEAST_BYTES


class Begun:
    """A batch of a rig, and what was told of each block."""

    def __init__(self, rig: Rig, blocks: Sequence[Block], *, fill: bool) -> None:
        self.blocks = list(blocks)
        self.io: list[BlockIO] = rig._batch(self.blocks, fill)
        self.told: list[list[Outcome]] = [[] for _ in blocks]
        self.page_bytes = rig.page_bytes

    def report(self, positions: Sequence[int], outcome: Outcome) -> None:
        for at in positions:
            self.told[at].append(outcome)

    def holds(self, at: int) -> bool:
        block, io = self.blocks[at], self.io[at]
        wanted = block_bytes_of(block.key, block.pages, self.page_bytes)
        return bool(np.array_equal(io.place.memory[io.place.numbers], wanted))


def begin_write(rig: Rig, *blocks: Block) -> Begun:
    begun = Begun(rig, blocks, fill=True)
    rig.engine.begin_write(begun.io, begun.report)
    return begun


def begin_read(rig: Rig, *blocks: Block, stop: Any = lambda _: False) -> Begun:
    begun = Begun(rig, blocks, fill=False)
    rig.engine.begin_read(begun.io, begun.report, stop)
    return begun


class Gate:
    """Lets requests to the device pass when it is open; the test may fail some."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.open = threading.Event()
        self.open.set()
        self.bad: set[int] = set()  # places in the file
        self.begun: list[Span] = []

    def __call__(self, first: Any, second: Any, *rest: Any) -> Any:
        span = first if isinstance(first, Span) else second
        self.begun.append(span)
        assert self.open.wait(30)
        if span.at in self.bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self.call(first, second, *rest)


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate(direct_writes._store)
    monkeypatch.setattr(direct_writes, "_store", gate)
    return gate


@pytest.fixture
def dropping(tmp_path: Path) -> Iterator[Rig]:
    """Room for 16 pages."""
    rig = open_dropping(tmp_path / "store", 16, PAGE)
    yield rig
    rig.engine.close()
    let_go(rig.engine, rig)


def used(rig: Rig) -> int:
    return int(rig.engine.stats()["used_slots"])
