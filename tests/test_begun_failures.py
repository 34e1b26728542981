"""What fails of a batch that is begun before the last one has ended is told once, of it alone."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from light_mem.engine import direct_writes
from light_mem.engine.base import Outcome
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.settings import EngineSettings
from light_mem.errors import LockTimeoutError
from light_mem.index import keys as keymath
from light_mem.index.locks import LOCK_TIMEOUT_SECONDS
from tests.begun import PAGE, Begun, Gate, begin_write, dropping, stores, used
from tests.cold_rig import cache_that_forgets
from tests.engine_helpers import COPIED_AND_STORED, Block, Rig

__all__ = ["cache_that_forgets", "dropping", "stores"]  # fixtures


def test_a_device_that_fails_fails_the_blocks_it_was_given_and_no_others(
    dropping: Rig, stores: Gate
) -> None:
    stores.bad = {4096}  # the first slots
    first = begin_write(dropping, Block(1, 4))
    second = begin_write(dropping, Block(2, 4))
    assert first.told == [[Outcome.COPIED, Outcome.FAILED]]
    dropping.engine.finish_writes()
    assert second.told == [[*COPIED_AND_STORED]]
    stores.bad = set()
    third = begin_write(dropping, Block(3, 4))  # gives back what failed
    dropping.engine.finish_writes()
    assert third.told == [[*COPIED_AND_STORED]]
    assert used(dropping) == 8
    assert dropping.read(Block(1, 4), Block(2, 4), Block(3, 4)) == [
        Outcome.MISSING, Outcome.LOADED, Outcome.LOADED,
    ]  # fmt: skip


def test_what_fails_beside_a_begun_batch_leaves_its_slots_alone(
    dropping: Rig, stores: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one shard: those of the failed batch go back, those on their way do not."""
    first = begin_write(dropping, Block(1, 4))
    with monkeypatch.context() as patch:
        broken = OSError(errno.ENOMEM, "no memory")
        patch.setattr(direct_writes.DirectWrites, "sink", _raise(broken))
        second = begin_write(dropping, Block(2, 4))
    assert second.told == [[Outcome.FAILED]]
    assert first.told == [[*COPIED_AND_STORED]]  # not left for later, where something failed
    third = begin_write(dropping, Block(3, 4))
    stores.open.clear()
    fourth = Begun(dropping, [Block(4, 4)], fill=True)
    with monkeypatch.context() as patch:
        failing = _raise(broken, stores.open)
        patch.setattr(dropping.engine.file(0), "plan", lambda *_: failing)
        dropping.engine.begin_write(fourth.io, fourth.report)
    assert fourth.told == [[Outcome.FAILED]]
    fifth = begin_write(dropping, Block(5, 4))
    dropping.engine.finish_writes()
    assert third.told == fifth.told == [[*COPIED_AND_STORED]]
    assert used(dropping) == 12
    assert dropping.read(Block(1, 4), Block(3, 4), Block(5, 4)) == [Outcome.LOADED] * 3


def _raise(error: Exception, first: threading.Event | None = None) -> Any:
    def call(*_: Any, **__: Any) -> Any:
        if first is not None:
            first.set()
        raise error

    return call


def test_where_a_batch_has_failed_the_next_ones_are_not_left_for_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slots are announced until its shard's lock is free: there is room for one more."""
    LocalStorageEngine.open_store(
        tmp_path / "s", page_bytes=PAGE, num_of_shard=2, storage_size=32 * PAGE, block_pages=1
    ).close()
    rig = Rig(
        LocalStorageEngine(
            tmp_path / "s", kind="worker", settings=EngineSettings(page_cache="drop")
        ),
        PAGE,
    )
    keys = np.arange(64, dtype=np.uint64)
    shards = keymath.shards_of(keymath.mix(keymath.as_keys(keys.tolist())), 2)
    of_0, of_1 = ([Block(int(key), 2) for key in keys[shards == n]] for n in (0, 1))
    opened = rig.engine._open  # type: ignore[attr-defined]
    change = opened.change

    def unless_free(shard: int, timeout: float) -> Any:
        if not timeout:
            raise LockTimeoutError("not free", path=str(shard), timeout=timeout)
        return change(shard, timeout)

    with monkeypatch.context() as patch:
        patch.setattr(opened, "change", unless_free)
        with monkeypatch.context() as broken:
            no_disk = _raise(OSError(errno.EIO, "no disk"))
            broken.setattr(direct_writes.DirectWrites, "sink", no_disk)
            assert begin_write(rig, of_1[0]).told == [[Outcome.FAILED]]
        assert begin_write(rig, of_0[0]).told == [[*COPIED_AND_STORED]]
    assert begin_write(rig, of_1[1]).told == [[Outcome.COPIED]]  # and what failed went back
    rig.engine.close()
    assert rig.engine.stats()["used_slots"] == 4


def test_blocks_of_a_part_that_fails_in_the_middle_are_told_once(
    dropping: Rig, stores: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four find room and are copied; the lock is not to be had for the others."""
    change = dropping.engine._open.change
    timeouts: list[float] = []

    def fail_to_allocate_again(shard: int, timeout: float) -> Any:
        timeouts.append(timeout)
        if len(timeouts) in (2, 4):
            raise LockTimeoutError("not free", path="the shard", timeout=timeout)
        return change(shard, timeout)

    monkeypatch.setattr(dropping.engine._open, "change", fail_to_allocate_again)
    begun = begin_write(dropping, *[Block(n, 4) for n in range(6)])
    assert begun.told == [[*COPIED_AND_STORED]] * 4 + [[Outcome.FAILED]] * 2
    assert not dropping.engine.has_begun_writes
    # Room; room again, with what was copied in hand; that is published; and room again.
    assert timeouts[1] < 1
    assert [timeouts[n] for n in (0, 2, 3)] == [LOCK_TIMEOUT_SECONDS] * 3
    assert len(timeouts) == 4


def test_a_part_whose_shard_cannot_be_changed_any_more_tells_no_block_twice(
    dropping: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even of those that were copied before: a cell of theirs may be another task's."""
    change, calls = dropping.engine._open.change, 0

    def fail_second(shard: int, timeout: float) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return change(shard, timeout)

    monkeypatch.setattr(dropping.engine._open, "change", fail_second)
    begun = begin_write(dropping, *[Block(n, 4) for n in range(6)])
    assert begun.told == [[*COPIED_AND_STORED]] * 4 + [[Outcome.FAILED]] * 2


def test_a_device_error_while_the_lock_is_not_free_fails_no_block_twice(
    dropping: Rig, stores: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores.bad = {4096}
    change, calls = dropping.engine._open.change, 0

    def fail_second(shard: int, timeout: float) -> Any:
        nonlocal calls
        calls += 1
        if calls >= 2:
            raise LockTimeoutError("not free", path="the shard", timeout=timeout)
        return change(shard, timeout)

    with monkeypatch.context() as patch:
        patch.setattr(dropping.engine._open, "change", fail_second)
        begun = begin_write(dropping, *[Block(n, 4) for n in range(6)])
    assert begun.told == [[Outcome.COPIED, Outcome.FAILED]] * 4 + [[Outcome.FAILED]] * 2
