"""LocalStorageEngine beyond the contract: damage, want of room, failures, several engines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from light_mem.engine import writing
from light_mem.engine.base import Outcome
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.shard_file import ShardFile
from light_mem.errors import LockTimeoutError
from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.index.locks import PathLock, lock_path
from light_mem.index.recovery import states_of
from light_mem.index.shard import ShardIndex
from tests.engine_helpers import COPIED_AND_STORED, PAGE, Block, Rig, assert_consistent, open_local
from tests.local_rig import PAGES, another, local_of, rig, states

__all__ = ["rig"]  # fixtures


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [1, 4])
def test_flipped_bytes_are_damage_once_and_then_a_miss(rig: Rig, pages: int) -> None:
    rig.write(Block(1, pages), Block(2, pages))
    path = local_of(rig).directory / "shard-000.data"
    for at in (0, pages * PAGE - 1):
        with path.open("r+b") as file:
            file.seek(4096 + at)
            byte = file.read(1)[0]
            file.seek(4096 + at)
            file.write(bytes([byte ^ 0x10]))
        assert rig.read(Block(1, pages), Block(2, pages)) == [Outcome.DAMAGED, Outcome.LOADED]
        assert rig.read(Block(1, pages)) == [Outcome.MISSING]
        assert rig.find(Block(1)) == [False]
        assert rig.write(Block(1, pages)) == [COPIED_AND_STORED]
        assert rig.read(Block(1, pages)) == [Outcome.LOADED]
    assert rig.engine.stats()["damaged"] == 2
    assert rig.engine.stats()["removals"] == 2


@pytest.mark.parametrize("field", ["run", "next_run", "nbytes"])
def test_a_block_with_a_damaged_entry_can_be_written_again(rig: Rig, field: str) -> None:
    rig.write(Block(1, 3), Block(2, 3))
    entry = int(local_of(rig).lookup.find(keymath.as_keys([1]))[0])
    local_of(rig)._index.entries[field][entry] = 4
    # It is listed, so a write would be "present" for good if the read did not take it out.
    assert rig.read(Block(1, 3), Block(2, 3)) == [Outcome.DAMAGED, Outcome.LOADED]
    assert rig.write(Block(1, 3)) == [COPIED_AND_STORED]
    assert rig.read(Block(1, 3), Block(2, 3)) == [Outcome.LOADED, Outcome.LOADED]
    assert_consistent(local_of(rig)._index)


def test_without_verification_a_flipped_byte_is_not_noticed(tmp_path: Path) -> None:
    engine = open_local(tmp_path / "store", 4, verify=False)
    rig = Rig(engine)
    rig.write(Block(1))
    with (tmp_path / "store" / "shard-000.data").open("r+b") as file:
        file.seek(4096)
        file.write(bytes(PAGE))
    with pytest.raises(AssertionError, match="wrong bytes"):
        rig.read(Block(1))
    engine.close()


# --- want of room ---------------------------------------------------------------------------------


@contextmanager
def half_written(engine: LocalStorageEngine, pages: int) -> Iterator[None]:
    """While another owner is copying into `pages` slots of shard 0."""
    with engine.change(0) as (index, _):
        where = index.allocate(pages, [])
        assert where is not None
        index.mark(where.runs, owner=1000)
    yield
    with engine.change(0) as (index, _):
        index.give_back(where.slot)


def test_a_block_without_room_waits_and_is_refused_in_time(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writing, "ROOM_SECONDS", 0.1)
    with half_written(local_of(rig), PAGES):
        started = time.monotonic()
        assert rig.write(Block(1), Block(2)) == [(Outcome.NO_ROOM,)] * 2
        assert 0.1 < time.monotonic() - started < 5
    [said] = caplog.messages
    assert f"of its {PAGES} slots 0 are pinned and 0 viewed, and others are being written" in said
    assert rig.write(Block(1)) == [COPIED_AND_STORED]


def test_a_block_that_waits_for_room_gets_what_others_give_back(rig: Rig) -> None:
    hold = half_written(local_of(rig), PAGES)
    hold.__enter__()
    asked = 0

    def stop(_: int) -> bool:
        nonlocal asked
        asked += 1
        if asked == 5:
            hold.__exit__(None, None, None)
        return False

    assert rig.write(Block(1, 4), stop=stop) == [COPIED_AND_STORED]


def test_a_block_stopped_while_it_waits_does_not_spoil_the_others(rig: Rig) -> None:
    hold = half_written(local_of(rig), PAGES)
    hold.__enter__()
    asked = 0

    def stop(at: int) -> bool:
        nonlocal asked
        asked += 1
        if asked == 8:
            hold.__exit__(None, None, None)
        return at == 0

    outcomes = rig.write(Block(1), Block(2), Block(3), stop=stop)
    assert outcomes == [(Outcome.STOPPED,), COPIED_AND_STORED, COPIED_AND_STORED]


# --- failures -------------------------------------------------------------------------------------


@contextmanager
def publishing_fails(engine: LocalStorageEngine, holds: int) -> Iterator[None]:
    """The shard's lock is free for the allocation and not for so many holds from then on: the
    publication, and giving the slots back."""
    real = engine.change
    calls = 0

    def change(shard: int, timeout: float = 10) -> object:
        nonlocal calls
        calls += 1
        if 2 <= calls < 2 + holds:
            raise LockTimeoutError("not free", path="x", timeout=0.0)
        return real(shard, timeout)

    engine.change = change  # type: ignore[method-assign, assignment]
    yield
    del engine.change  # type: ignore[method-assign]


@pytest.mark.parametrize("holds", [1, 2])
def test_slots_of_a_batch_whose_lock_failed_are_given_back(rig: Rig, holds: int) -> None:
    rig.write(Block(9))
    with publishing_fails(local_of(rig), holds):
        outcomes = rig.write(Block(1, 2), Block(9), Block(2, 2))
    failed = (Outcome.COPIED, Outcome.FAILED)
    assert outcomes == [failed, (Outcome.PRESENT,), failed]
    assert states(rig).count(fmt.WRITING) == (0 if holds == 1 else 2)
    assert rig.find(Block(1), Block(2)) == [False, False]
    assert rig.write(Block(3)) == [COPIED_AND_STORED]  # gives them back first
    assert states(rig).count(fmt.WRITING) == 0
    assert rig.engine.stats()["used_slots"] == 2
    records = local_of(rig).file(0).records
    assert np.count_nonzero(records["tag"]) == 2  # nor would a new index list them


@pytest.mark.parametrize("stopped", [False, True])
def test_an_engine_that_closes_after_a_failure_leaves_no_slots_behind(
    tmp_path: Path, stopped: bool
) -> None:
    engine = open_local(tmp_path / "store", PAGES)
    with publishing_fails(engine, 2):
        assert Rig(engine).write(Block(1, 2))[0][-1] is Outcome.FAILED
    if stopped:  # not even closing gets the lock: its record stays for the next to reclaim
        with PathLock(lock_path(tmp_path / "store", "shard-000")).hold():
            engine.close()
    else:
        engine.close()
    with another(tmp_path) as other:
        assert other.stats()["used_slots"] == 0
        assert not states_of(other._index.entries).any()
        assert np.count_nonzero(other._owners.records["pid"]) == 1


def test_a_sync_that_fails_is_a_failed_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_local(tmp_path / "store", PAGES, durability="flush")
    rig = Rig(engine)

    def sync(_: ShardFile) -> None:
        raise OSError(5, "Input/output error")

    assert rig.write(Block(1)) == [COPIED_AND_STORED]
    with monkeypatch.context() as patch:
        patch.setattr(ShardFile, "sync", sync)
        assert rig.write(Block(1), Block(2)) == [
            (Outcome.PRESENT,),
            (Outcome.COPIED, Outcome.FAILED),
        ]
    assert rig.find(Block(1), Block(2)) == [True, False]
    assert rig.write(Block(2)) == [COPIED_AND_STORED]
    assert engine.stats()["used_slots"] == 2
    engine.close()


def test_an_exception_inside_a_change_leaves_a_shard_that_works(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.write(Block(1), Block(2))

    def mark(*_: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(ShardIndex, "mark_many", mark)
        with pytest.raises(ZeroDivisionError):
            rig.write(Block(3, 7))  # evicts the first, then fails
    assert rig.find(Block(1), Block(2)) == [False, True]
    assert rig.write(Block(3, 7)) == [COPIED_AND_STORED]
    assert_consistent(local_of(rig)._index)


def test_a_block_is_stored_in_its_own_length_alone(rig: Rig) -> None:
    """What a dead worker has copied is Finished only if that very block is there."""
    rig.write(Block(1, 2))
    low, high = keymath.as_key(1)
    engine = local_of(rig)
    asked = [2 * PAGE + off for off in (-PAGE, -1, 0, 1, PAGE)]
    assert [engine.is_stored(low, high, n) for n in asked] == [False, False, True, False, False]
    assert not engine.is_stored(low + 1, high, 2 * PAGE)
    assert not engine.is_stored(low, high + 1, 2 * PAGE)


# --- several engines ------------------------------------------------------------------------------


def test_two_engines_of_one_process_see_each_others_blocks(rig: Rig, tmp_path: Path) -> None:
    with another(tmp_path) as engine:
        other = Rig(engine)
        assert rig.write(Block(1, 2)) == [COPIED_AND_STORED]
        assert other.read(Block(1, 2)) == [Outcome.LOADED]
        assert other.write(Block(1, 2), Block(2, 4)) == [(Outcome.PRESENT,), COPIED_AND_STORED]
        assert rig.read(Block(2, 4), Block(1, 2)) == [Outcome.LOADED] * 2
        assert other.write(Block(3, 4)) == [COPIED_AND_STORED]  # evicts 2, which was read first
        assert rig.read(Block(2, 4), Block(1, 2)) == [Outcome.MISSING, Outcome.LOADED]
        assert rig.delete(Block(3)) == 1
        assert other.read(Block(3, 4)) == [Outcome.MISSING]
        assert [o.kind for o in engine.owners()] == ["server"]
    assert rig.read(Block(1, 2)) == [Outcome.LOADED]
