"""A batch for several shards: each step is made for all of its parts before the next one, and what
is held up or aborted of one holds up no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from light_mem.engine import copy_loops, writing
from light_mem.engine.base import Outcome
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.mapped_writes import MappedWrites
from light_mem.engine.shard_file import ShardFile
from light_mem.errors import LockTimeoutError
from tests.deaths import moments, restore
from tests.engine_helpers import COPIED_AND_STORED, Rig, assert_whole_after_death, open_local
from tests.parts_rig import SHARDS, SLOTS, around_changes, engine, is_clean, keeping, of_shard

__all__ = ["engine", "keeping"]  # fixtures


def test_all_get_room_then_all_are_copied_then_all_are_published(
    keeping: LocalStorageEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[object] = []
    around_changes(keeping, monkeypatch, lambda shard, _: steps.append(shard))
    plan, loop = ShardFile.plan, copy_loops.gather_whole

    def planned(file: ShardFile, *args: Any, **named: Any) -> Any:
        steps.append("plan")
        return plan(file, *args, **named)

    def copied(made: copy_loops.Steps) -> None:
        steps.append("copy")
        loop(made)

    monkeypatch.setattr(ShardFile, "plan", planned)
    monkeypatch.setattr(copy_loops, "gather_whole", copied)
    blocks = [block for shard in range(SHARDS) for block in of_shard(shard, 2)]
    assert Rig(keeping).write(*blocks) == [COPIED_AND_STORED] * 6
    assert steps == [0, 1, 2, *["plan"] * 3, *["copy"] * 3, 0, 1, 2]
    assert is_clean(keeping)


def test_what_writes_cost_is_learned_from_each_shards_own_copies(
    keeping: LocalStorageEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page faults are counted from when a shard's copies begin until they were made."""
    steps: list[object] = []
    loop, start, was_put = copy_loops.gather_whole, MappedWrites.start, MappedWrites.was_put
    files = [keeping.file(shard)._writes for shard in range(2)]

    def copied(made: copy_loops.Steps) -> None:
        steps.append("copy")
        loop(made)

    def started(writes: MappedWrites) -> None:
        steps.append(("start", files.index(writes)))
        start(writes)

    def put(writes: MappedWrites, *args: Any) -> None:
        steps.append(("put", files.index(writes)))
        was_put(writes, *args)

    monkeypatch.setattr(copy_loops, "gather_whole", copied)
    monkeypatch.setattr(MappedWrites, "start", started)
    monkeypatch.setattr(MappedWrites, "was_put", put)
    blocks = [of_shard(shard, 1)[0] for shard in range(2)]
    assert Rig(keeping).write(*blocks) == [COPIED_AND_STORED] * 2
    assert steps == [
        step for shard in range(2) for step in (("start", shard), "copy", ("put", shard))
    ]


@pytest.mark.parametrize("busy", range(SHARDS))
def test_who_has_a_lock_holds_up_only_its_blocks(
    engine: LocalStorageEngine, monkeypatch: pytest.MonkeyPatch, busy: int
) -> None:
    """It is given back once the other shards' blocks are stored, which do not wait for it. (The
    first shard's lock is waited for while nothing is in hand.)"""
    rig = Rig(engine)
    blocks = [block for shard in range(SHARDS) for block in of_shard(shard, 2)]
    others = [block for at, block in enumerate(blocks) if at // 2 != busy]
    waits: list[float] = []

    def refuse(shard: int, timeout: float) -> None:
        if shard != busy or all(rig.find(*others)):
            return
        waits.append(timeout)
        if timeout < writing.LOCK_TIMEOUT_SECONDS:
            raise LockTimeoutError("held", path=str(shard), timeout=timeout)
        assert busy == 0  # what was given room before does not wait as long

    around_changes(engine, monkeypatch, refuse)
    assert rig.write(*blocks) == [COPIED_AND_STORED] * 6
    assert waits
    assert is_clean(engine)


def test_a_lock_that_stays_taken_fails_its_blocks_when_the_others_are_stored(
    engine: LocalStorageEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(engine)
    blocks = [block for shard in range(SHARDS) for block in of_shard(shard, 2)]
    timeouts: list[float] = []

    def refuse(shard: int, timeout: float) -> None:
        if shard:
            timeouts.append(timeout)
            raise LockTimeoutError("held", path=str(shard), timeout=timeout)

    with monkeypatch.context() as patch:
        around_changes(engine, patch, refuse)
        told = rig.write(*blocks)
    assert told == [COPIED_AND_STORED] * 2 + [(Outcome.FAILED,)] * 4
    # Once in vain for the first, not at all for the second; then, with nothing in hand, for both.
    brief = [timeout for timeout in timeouts if timeout < writing.LOCK_TIMEOUT_SECONDS]
    assert brief[:2] == [writing.SHORT_SECONDS, 0]
    assert timeouts[-2:] == [writing.LOCK_TIMEOUT_SECONDS] * 2
    assert is_clean(engine)


def test_what_finds_no_room_comes_after_what_is_in_its_way(engine: LocalStorageEngine) -> None:
    """More blocks of one shard than it has slots, between others' of shards that are full."""
    rig = Rig(engine)
    for shard in range(SHARDS):
        assert rig.write(*of_shard(shard, SLOTS, 20_000)) == [COPIED_AND_STORED] * SLOTS
    many = of_shard(1, 2 * SLOTS + 1)
    blocks = [*of_shard(0, 2), *many, *of_shard(2, 2)]
    assert rig.write(*blocks) == [COPIED_AND_STORED] * len(blocks)
    assert rig.find(*many) == [False] * (SLOTS + 1) + [True] * SLOTS
    assert rig.read(*many[-SLOTS:], *of_shard(0, 2), *of_shard(2, 2)) == [Outcome.LOADED] * 10
    assert is_clean(engine)


def test_an_abort_in_the_middle_leaves_the_others_of_all_shards(
    keeping: LocalStorageEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen while the second shard's blocks are copied: the first's are copied again."""
    gone: set[int] = set()
    loop, calls = copy_loops.gather_whole, 0

    def copied(made: copy_loops.Steps) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            gone.add(3)
        loop(made)

    monkeypatch.setattr(copy_loops, "gather_whole", copied)
    blocks = [block for shard in range(SHARDS) for block in of_shard(shard, 2)]
    rig = Rig(keeping)
    told = rig.write(*blocks, stop=gone.__contains__)
    assert told[3] == (Outcome.STOPPED,)
    assert [each for at, each in enumerate(told) if at != 3] == [COPIED_AND_STORED] * 5
    assert calls == 1 + SHARDS
    assert rig.find(*blocks) == [True, True, True, False, True, True]
    assert is_clean(keeping)


@pytest.mark.parametrize("without", ["", "index"])
def test_a_kill_at_any_store_of_a_batch_costs_what_it_was_to_evict(
    tmp_path: Path, without: str
) -> None:
    rig = Rig(open_local(tmp_path / "store", SLOTS, shards=SHARDS))
    before = [block for shard in range(SHARDS) for block in of_shard(shard, SLOTS, 20_000)]
    rig.write(*before)
    kept = {block.key for at, block in enumerate(before) if at % SLOTS >= 2}
    blocks = [block for shard in range(SHARDS) for block in of_shard(shard, 2)]
    seen = moments(tmp_path / "store", lambda: rig.write(*blocks))
    rig.engine.close()
    assert len(seen) > 60
    for at, files in enumerate(seen):
        files = {name: content for name, content in files.items() if name != without}
        directory = restore(files, tmp_path / "store", tmp_path / str(at))
        rig = Rig(open_local(directory, SLOTS, shards=SHARDS))
        assert_whole_after_death(rig, [*before, *blocks], kept)
        rig.engine.close()
