"""A batch for several shards of which something fails: what is wrong with one shard is no other's
concern."""

from __future__ import annotations

import errno
import gc
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from light_mem.engine import direct_writes, page_cache
from light_mem.engine.base import BlockIO, Outcome
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.pieces import PIECE_BYTES
from light_mem.engine.places import Rows
from light_mem.engine.settings import EngineSettings
from light_mem.index import keys as keymath
from tests.engine_helpers import COPIED_AND_STORED, PAGE, Rig, let_go, open_local
from tests.parts_rig import (
    SHARDS,
    SLOTS,
    around_changes,
    engine,
    is_clean,
    keeping,
    of_shard,
    opened,
)

__all__ = ["engine", "keeping"]  # fixtures


def test_a_device_that_fails_one_shard_costs_only_its_blocks(
    engine: LocalStorageEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of the second shard; in a group with the others, which are copied before and after."""
    bad = {os.fstat(engine.file(1)._data_fd).st_ino}

    def failing(call: Callable[..., int]) -> Callable[..., int]:
        def write(descriptor: int, *rest: Any) -> int:
            if os.fstat(descriptor).st_ino in bad:
                raise OSError(errno.EIO, "no device")
            return call(descriptor, *rest)

        return write

    blocks = [block for shard in range(SHARDS) for block in of_shard(shard, 2)]
    rig = Rig(engine)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", failing(os.pwritev))
        patch.setattr(os, "pwrite", failing(os.pwrite))
        told = rig.write(*blocks)
    good = [0, 1, 4, 5]
    assert [told[at] for at in good] == [COPIED_AND_STORED] * 4
    assert [told[at][-1] for at in (2, 3)] == [Outcome.FAILED] * 2
    assert all(len(each) == len(set(each)) for each in told)
    assert is_clean(engine)
    assert rig.read(*(blocks[at] for at in good)) == [Outcome.LOADED] * 4
    assert rig.find(*blocks[2:4]) == [False, False]
    assert rig.write(*blocks[2:4]) == [COPIED_AND_STORED] * 2


def test_what_failed_keeps_no_memory(
    keeping: LocalStorageEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "no device")

    memory = np.zeros((2, PAGE), np.uint8)
    kept = weakref.ref(memory)
    batch = [
        BlockIO(
            *keymath.as_key(of_shard(shard, 1)[0].key), Rows(memory, np.array([shard], np.intp))
        )
        for shard in range(2)
    ]
    told: list[Outcome] = []
    gc.collect()
    gc.disable()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", fail)
            keeping.write(batch, lambda _, outcome: told.append(outcome))
        keeping._gatherer.forget()
        del batch, memory
        assert kept() is None
    finally:
        gc.enable()
    assert told == [Outcome.FAILED] * 2


class Slow:
    """Requests past the page cache that take a while."""

    def __init__(self, patch: pytest.MonkeyPatch, error: OSError | None = None) -> None:
        self.begun = self.ended = 0
        self._store = direct_writes._store
        self._error = error
        self._count = threading.Lock()
        self.has_begun = threading.Event()
        patch.setattr(direct_writes, "_store", self)

    def __call__(self, *args: Any) -> bool:
        with self._count:
            self.begun += 1
        self.has_begun.set()
        threading.Event().wait(0.2)
        result = self._store(*args)
        with self._count:
            self.ended += 1
        if self._error is not None:
            raise OSError(self._error.errno, "of a request")
        return result


LONG = 2 * PIECE_BYTES  # a page of more than a buffer


def opened_past(directory: Path) -> LocalStorageEngine:
    open_local(directory, SLOTS, shards=SHARDS, page_bytes=LONG).close()
    return LocalStorageEngine(directory, kind="worker", settings=EngineSettings(page_cache="drop"))


@pytest.mark.parametrize("error", [None, OSError(errno.EIO, "no device")])
def test_whatever_breaks_a_part_past_the_page_cache_waits_for_the_requests_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError | None
) -> None:
    """Their slots are given back then, and must not be written over; requests may fail as well."""
    engine = opened_past(tmp_path / "store")
    blocks = [of_shard(shard, 1)[0] for shard in range(SHARDS)]
    rig = Rig(engine, LONG)
    with monkeypatch.context() as patch:
        slow = Slow(patch, error)

        def broken(*_: object) -> None:
            assert slow.has_begun.wait(20)
            raise RuntimeError("not an OSError")

        patch.setattr(engine.file(2), "plan", broken)
        with pytest.raises(RuntimeError, match="not an OSError"):
            rig.write(*blocks)
        assert slow.begun == slow.ended >= 2
    assert rig.write(*blocks) == [COPIED_AND_STORED] * SHARDS
    assert rig.read(*blocks) == [Outcome.LOADED] * SHARDS
    engine.close()
    let_go(engine, rig)


def test_what_fails_past_the_page_cache_is_given_back_when_nothing_of_it_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first block of a part is on its way to the device when the second one fails."""
    engine = opened_past(tmp_path / "store")
    first, second = of_shard(1, 2)
    blocks = [*of_shard(0, 1), first._replace(pages=3), second]
    rig = Rig(engine, LONG)
    with monkeypatch.context() as patch:
        slow, sink, sinks = Slow(patch), direct_writes.DirectWrites.sink, 0

        def second_fails(writes: direct_writes.DirectWrites, *args: Any) -> Any:
            nonlocal sinks
            sinks += 1
            if sinks == 3:
                assert slow.has_begun.wait(20)
                raise OSError(errno.ENOMEM, "no memory")
            return sink(writes, *args)

        def given_back(shard: int, _: float) -> None:
            if shard == 1 and sinks >= 3:
                looks.append(slow.begun - slow.ended)

        looks: list[int] = []
        patch.setattr(direct_writes.DirectWrites, "sink", second_fails)
        around_changes(engine, patch, given_back)
        told = rig.write(*blocks)
    assert [each[-1] for each in told] == [Outcome.STORED] + [Outcome.FAILED] * 2
    assert looks
    assert looks[0] == 0
    assert is_clean(engine)
    engine.close()
    let_go(engine, rig)


def test_a_hint_that_fails_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = opened(tmp_path / "store", "drop")
    hints = 0

    def fail(*_: object) -> None:
        nonlocal hints
        hints += 1
        raise OSError(errno.EIO, "no device")

    monkeypatch.setattr(page_cache, "read_edges", fail)
    assert Rig(engine).write(*of_shard(0, 2)) == [COPIED_AND_STORED] * 2
    assert hints
    engine.close()
    let_go(engine)
