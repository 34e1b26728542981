"""What a process announces that it is filling: all of it, also beside what failed."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from light_mem.engine.base import BlockIO, Outcome
from light_mem.engine.intents import MOST_BLOCKS
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.places import Rows
from light_mem.engine.settings import EngineSettings
from light_mem.engine.shard_file import ShardFile
from light_mem.errors import LockTimeoutError
from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.index.recovery import states_of
from tests.engine_helpers import (
    COPIED_AND_STORED,
    PAGE,
    Block,
    Rig,
    blocks_of_shard,
    let_go,
    open_local,
)
from tests.payload import block_bytes_of

SHARDS = 4


def announced(engine: LocalStorageEngine) -> set[int]:
    """First slots as places in the index: shards one after the other."""
    words = engine._owners.records["intents"][engine._owner.number].tolist()
    slots = engine.geometry.slots
    return {(word - 1 >> 32) * slots + (word - 1 & 0xFFFFFFFF) for word in words if word}


def being_written(engine: LocalStorageEngine) -> set[int]:
    return set(np.flatnonzero(states_of(engine._index.entries) == fmt.WRITING).tolist())


def count_changes(engine: LocalStorageEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The shards that are changed from now on, in turn."""
    shards: list[int] = []
    change = engine._open.change

    def note(shard: int, timeout: float) -> AbstractContextManager[Any]:
        shards.append(shard)
        return change(shard, timeout)

    monkeypatch.setattr(engine._open, "change", note)
    return shards


def test_as_many_blocks_as_a_worker_claims_take_two_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(open_local(tmp_path / "store", MOST_BLOCKS))
    changes = count_changes(rig.engine, monkeypatch)  # type: ignore[arg-type]
    assert rig.write(*map(Block, range(MOST_BLOCKS))) == [COPIED_AND_STORED] * MOST_BLOCKS
    assert changes == [0, 0]
    rig.engine.close()
    let_go(rig.engine, rig)


@pytest.mark.parametrize(("bad", "shards_of_store"), [(1, 4), (2, 4), (3, 4), (12, 14)])
def test_what_failed_stays_announced_whatever_is_written_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int, shards_of_store: int
) -> None:
    """Of the first shards nothing can be published: their slots stay marked, and are announced
    while the blocks of the other shards are written, some at a time, as long as they can be."""
    engine = open_local(tmp_path / "store", 2 * MOST_BLOCKS, shards=shards_of_store)
    change = engine._open.change
    copied: set[int] = set()  # shards, in turn: the first copied to are the bad ones

    def fail(shard: int, timeout: float) -> AbstractContextManager[Any]:
        if shard in list(order)[:bad] and shard in copied:
            raise LockTimeoutError("stopped", path=str(shard), timeout=timeout)
        return change(shard, timeout)

    count = shards_of_store * MOST_BLOCKS
    memory = np.concatenate([block_bytes_of(n, 1, PAGE) for n in range(count)])
    batch = [
        BlockIO(*keymath.as_key(n), Rows(memory, np.array([n], np.intp))) for n in range(count)
    ]
    mixed = keymath.MixedKeys.of(block[:2] for block in batch).mixed
    shards = [keymath.shard_of(m, shards_of_store) for m in mixed]
    order = dict.fromkeys(shards)
    told: list[list[Outcome]] = [[] for _ in batch]
    looks = 0

    def report(positions: Sequence[int], outcome: Outcome) -> None:
        nonlocal looks
        for at in positions:
            told[at].append(outcome)
            if outcome is Outcome.COPIED:
                copied.add(shards[at])
        assert being_written(engine) <= announced(engine)
        looks += 1

    with monkeypatch.context() as patch:
        patch.setattr(engine._open, "change", fail)
        engine.write(batch, report)
    assert looks >= bad * 2
    full = len(announced(engine)) == fmt.MAX_INTENTS
    assert full == (bad > 7)
    for at, shard in enumerate(shards):
        if shard in list(order)[:bad] or full:
            assert told[at][-1] is Outcome.FAILED
        else:
            assert told[at] == [*COPIED_AND_STORED]
    assert being_written(engine)
    assert Rig(engine).write(Block(count)) == [COPIED_AND_STORED]  # gives back what failed
    assert not being_written(engine)
    assert not announced(engine)
    engine.close()
    let_go(engine)


def of_shard(shard: int, first: int) -> list[Block]:
    """As many blocks as are written at a time."""
    return blocks_of_shard(shard, SHARDS, MOST_BLOCKS, first)


def test_one_failure_does_not_slow_what_is_written_to_other_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_local(tmp_path / "store", 2 * MOST_BLOCKS, shards=SHARDS)
    rig, change = Rig(engine), engine._open.change
    refused = [0, 0]

    def refuse_to_publish(shard: int, timeout: float) -> AbstractContextManager[Any]:
        if shard == 0 and being_written(engine) and refused[0] < refused[1]:
            refused[0] += 1
            raise LockTimeoutError("stopped", path=str(shard), timeout=timeout)
        return change(shard, timeout)

    monkeypatch.setattr(engine._open, "change", refuse_to_publish)
    refused[1] = 2  # also when its slots are to be given back, right after
    assert rig.write(*of_shard(0, 0)) == [(Outcome.COPIED, Outcome.FAILED)] * MOST_BLOCKS
    assert refused == [2, 2]
    assert len(announced(engine)) == MOST_BLOCKS
    changes = count_changes(engine, monkeypatch)
    assert rig.write(*of_shard(1, 10_000)) == [COPIED_AND_STORED] * MOST_BLOCKS
    assert changes == [0, 1, 1]
    assert not announced(engine)
    engine.close()
    let_go(engine, rig)


def test_slots_that_cannot_be_given_back_at_the_close_are_by_who_opens_the_store_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The record of who was filling them stays, as that of a dead process."""
    engine = open_local(tmp_path / "store", 4)
    other = open_local(tmp_path / "store", 4)
    change = engine._open.change

    def refuse(shard: int, timeout: float) -> AbstractContextManager[Any]:
        if being_written(engine):
            raise LockTimeoutError("stopped", path=str(shard), timeout=timeout)
        return change(shard, timeout)

    with monkeypatch.context() as patch:
        patch.setattr(engine._open, "change", refuse)
        told = Rig(engine).write(*map(Block, range(3)))
        assert told == [(Outcome.COPIED, Outcome.FAILED)] * 3
        left = announced(engine)
        assert len(left) == 3
        engine.close()
    assert "is left with slots of failed writes" in caplog.text
    assert other.owners() == []
    assert being_written(other) == left
    other.close()
    let_go(engine, other)
    engine = open_local(tmp_path / "store", 4)
    assert not being_written(engine)
    assert engine.stats()["used_slots"] == 0
    assert Rig(engine).write(*map(Block, range(4))) == [COPIED_AND_STORED] * 4
    engine.close()
    let_go(engine)


@pytest.mark.parametrize("drops", [False, True])
def test_a_full_device_leaves_no_slot_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drops: bool
) -> None:
    """However many shards a copy fails in: nobody is in the way of giving their slots back."""
    shards = 20
    open_local(tmp_path / "store", 40, shards=shards).close()
    policy = "drop" if drops else "keep"
    engine = LocalStorageEngine(
        tmp_path / "store", kind="worker", settings=EngineSettings(page_cache=policy)
    )

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fail)
        patch.setattr(os, "pwrite", fail)
        told = Rig(engine).write(*map(Block, range(20 * shards)))
    assert all(outcomes[-1] is Outcome.FAILED for outcomes in told)
    assert not being_written(engine)
    assert not announced(engine)
    assert Rig(engine).write(*map(Block, range(shards))) == [COPIED_AND_STORED] * shards
    engine.close()
    let_go(engine)


@pytest.mark.parametrize("begun", [True, False])
def test_what_fails_on_its_way_to_the_device_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """Of every shard but one; nobody is in the way, and the last one's blocks are stored."""
    shards = 2 * MOST_BLOCKS
    open_local(tmp_path / "store", 40, shards=shards).close()
    engine = LocalStorageEngine(
        tmp_path / "store", kind="worker", settings=EngineSettings(page_cache="drop")
    )
    land, good = ShardFile.land, shards - 1

    def fail(file: ShardFile, group: Any) -> None:
        land(file, group)
        if file.shard != good:
            raise OSError(errno.EIO, "no device")

    monkeypatch.setattr(ShardFile, "land", fail)
    shard_of = {
        n: keymath.shard_of(keymath.mix_one(*keymath.as_key(n)), shards) for n in range(4000)
    }
    bad = [n for n, shard in shard_of.items() if shard != good][: 2 * MOST_BLOCKS]
    last = [n for n, shard in shard_of.items() if shard == good][:8]
    rig = Rig(engine)
    if begun:
        told = rig.write(*map(Block, bad + last))
    else:
        told = [outcome for n in bad + last for outcome in rig.write(Block(n))]
    assert [each[-1] for each in told] == [Outcome.FAILED] * len(bad) + [Outcome.STORED] * 8
    assert not being_written(engine)
    assert not announced(engine)
    engine.close()
    let_go(engine, rig)
