"""Batches that are begun before the last one has ended: nothing is told early, late or twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from light_mem.engine import page_cache, writing
from light_mem.engine.base import Outcome
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.settings import EngineSettings
from light_mem.index.format import MAX_INTENTS
from tests.begun import PAGE, Begun, Gate, begin_read, begin_write, dropping, stores, used
from tests.cold_rig import cache_that_forgets
from tests.deaths import moments, restore
from tests.dropping_rig import open_dropping
from tests.engine_helpers import COPIED_AND_STORED, Block, Rig, let_go
from tests.killed_store import FRESH, KEPT, check, prepared

__all__ = ["cache_that_forgets", "dropping", "stores"]  # fixtures


def test_blocks_are_found_when_the_next_ones_were_copied_and_not_before_they_have_landed(
    dropping: Rig, stores: Gate
) -> None:
    stores.open.clear()
    first = begin_write(dropping, Block(1), Block(2))
    assert first.told == [[Outcome.COPIED]] * 2
    assert dropping.find(Block(1), Block(2)) == [False] * 2
    assert not dropping.engine.file(0).records["tag"].any()

    second = Begun(dropping, [Block(3)], fill=True)

    def report(positions: Sequence[int], outcome: Outcome) -> None:
        if outcome is Outcome.COPIED:
            assert first.told == [[Outcome.COPIED]] * 2
            stores.open.set()
        second.report(positions, outcome)

    dropping.engine.begin_write(second.io, report)
    assert first.told == [[*COPIED_AND_STORED]] * 2
    assert second.told == [[Outcome.COPIED]]
    assert dropping.find(Block(1), Block(2), Block(3)) == [True, True, False]
    assert dropping.engine.has_begun_writes
    assert dropping.engine.finish_writes()
    assert second.told == [[*COPIED_AND_STORED]]
    assert not dropping.engine.has_begun_writes
    assert not dropping.engine.finish_writes()
    assert dropping.read(Block(1), Block(2), Block(3)) == [Outcome.LOADED] * 3


def test_the_same_block_in_two_batches_is_stored_once(dropping: Rig) -> None:
    first = begin_write(dropping, Block(1, 4), Block(2))
    second = begin_write(dropping, Block(3), Block(1, 4))
    dropping.engine.finish_writes()
    assert first.told == [[*COPIED_AND_STORED]] * 2
    assert second.told == [[*COPIED_AND_STORED], [Outcome.COPIED, Outcome.PRESENT]]
    assert used(dropping) == 6
    assert dropping.read(Block(1, 4), Block(2), Block(3)) == [Outcome.LOADED] * 3


def test_blocks_that_are_there_already_keep_nothing_waiting(dropping: Rig) -> None:
    begin_write(dropping, Block(1), Block(2))
    dropping.engine.finish_writes()
    begun = begin_write(dropping, Block(3, 4))
    there = begin_write(dropping, Block(1), Block(2), Block(99, 17))  # or are too long
    assert there.told == [[Outcome.PRESENT]] * 2 + [[Outcome.NO_ROOM]]
    assert begun.told == [[*COPIED_AND_STORED]]
    assert not dropping.engine.has_begun_writes


def test_for_want_of_room_the_batch_before_is_stored_and_evicted(
    dropping: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "ROOM_SECONDS", 0.0)  # nobody else gives any back
    first = begin_write(dropping, Block(1, 8), Block(2, 8))
    assert dropping.find(Block(1), Block(2)) == [False] * 2
    second = begin_write(dropping, Block(3, 16))
    dropping.engine.finish_writes()
    assert first.told == [[*COPIED_AND_STORED]] * 2
    assert second.told == [[*COPIED_AND_STORED]]
    assert dropping.read(Block(3, 16)) == [Outcome.LOADED]


def test_a_single_write_leaves_what_was_begun_alone(dropping: Rig, stores: Gate) -> None:
    stores.open.clear()
    begun = begin_write(dropping, Block(1, 4))
    dropping.engine.prepare()
    [block] = dropping._batch([Block(2)], fill=True)
    assert dropping.engine.write_now(block) is None
    assert used(dropping) == 4
    stores.open.set()
    dropping.engine.finish_writes()
    assert begun.told == [[*COPIED_AND_STORED]]


def test_both_batches_are_announced_and_fit(tmp_path: Path, stores: Gate) -> None:
    count = MAX_INTENTS // 2
    rig = open_dropping(tmp_path / "store", 2 * count, PAGE)
    stores.open.clear()
    one = begin_write(rig, *[Block(n) for n in range(count)])
    seen: list[list[int]] = []
    two = Begun(rig, [Block(n) for n in range(count, 2 * count)], fill=True)

    def report(positions: Sequence[int], outcome: Outcome) -> None:
        if outcome is Outcome.COPIED and not seen:
            owners = rig.engine._owners.records
            seen.append(sorted(i - 1 for i in owners["intents"].ravel().tolist() if i))
            stores.open.set()
        two.report(positions, outcome)

    rig.engine.begin_write(two.io, report)
    assert seen == [list(range(2 * count))]
    rig.engine.finish_writes()
    assert one.told + two.told == [[*COPIED_AND_STORED]] * 2 * count
    rig.engine.close()


def test_a_close_ends_what_was_begun(tmp_path: Path) -> None:
    rig = open_dropping(tmp_path / "store", 16, PAGE)
    begun = begin_write(rig, Block(1, 4))
    rig.engine.close()
    assert begun.told == [[*COPIED_AND_STORED]]
    let_go(rig.engine)
    rig = Rig(LocalStorageEngine(tmp_path / "store", kind="worker"), PAGE)
    assert rig.read(Block(1, 4)) == [Outcome.LOADED]
    rig.engine.close()


def test_with_keep_nothing_is_left_for_later(tmp_path: Path) -> None:
    open_dropping(tmp_path / "store", 16, PAGE).engine.close()
    rig = Rig(LocalStorageEngine(tmp_path / "store", kind="worker"), PAGE)
    assert begin_write(rig, Block(1, 4)).told == [[*COPIED_AND_STORED]]
    assert not rig.engine.finish_writes()
    assert begin_read(rig, Block(1, 4)).told == [[Outcome.LOADED]]
    assert not rig.engine.finish_reads()
    rig.engine.close()


@pytest.mark.parametrize("index", ["with", "without"])
def test_a_kill_with_two_batches_in_hand_costs_only_those(tmp_path: Path, index: str) -> None:
    prepared(tmp_path / "store").engine.close()
    rig = Rig(
        LocalStorageEngine(
            tmp_path / "store", kind="worker", settings=EngineSettings(page_cache="drop")
        )
    )

    def write() -> None:
        begun = [begin_write(rig, FRESH[0]), begin_write(rig, FRESH[1], FRESH[2])]
        assert rig.engine.has_begun_writes
        rig.engine.finish_writes()
        assert begun[0].told + begun[1].told == [[*COPIED_AND_STORED]] * 3

    seen = moments(tmp_path / "store", write)
    rig.engine.close()
    assert len(seen) > 30
    for at, files in enumerate(seen):
        if index == "without":
            files = {name: content for name, content in files.items() if name != "index"}
        check(restore(files, tmp_path / "store", tmp_path / str(at)), KEPT - {2}, at % 2 == 0)


@pytest.mark.parametrize("policy", ["drop", "keep"])
@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_batches_gives_right_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, seed: int
) -> None:
    """Writes that evict and reads in turn, as a worker does them, of cold and other blocks."""
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(
        page_cache, "hold_each", lambda addresses: [rng.random() < 0.5 for _ in addresses]
    )
    page_bytes = int(rng.choice([3840, 4096, 61440]))
    open_dropping(tmp_path / "s", 96, page_bytes).engine.close()
    engine = LocalStorageEngine(
        tmp_path / "s", kind="worker", settings=EngineSettings(page_cache=policy)
    )
    rig = Rig(engine, page_bytes)
    pages = {key: int(rng.integers(1, 25)) for key in range(24)}
    begun: list[Begun] = []
    for _ in range(60):
        keys = rng.choice(24, int(rng.integers(1, 6)), replace=False).tolist()
        blocks = [Block(key, pages[key]) for key in keys]
        if rng.random() < 0.5:
            engine.finish_reads()
            begun.append(begin_write(rig, *blocks))
        else:
            begun.append(begin_read(rig, *blocks))
            if rng.random() < 0.7:
                engine.finish_writes()
        if rng.random() < 0.2:
            engine.finish_reads()
            engine.finish_writes()
    engine.finish_reads()
    engine.finish_writes()
    final = {Outcome.STORED, Outcome.PRESENT, Outcome.LOADED, Outcome.MISSING, Outcome.LOST}
    loaded = 0
    for one in begun:
        for at, told in enumerate(one.told):
            assert told[-1] in final
            assert sum(outcome is not Outcome.COPIED for outcome in told) == 1
            if told == [Outcome.LOADED]:
                loaded += 1
                assert one.holds(at)
    assert loaded > 5
    assert engine.stats()["damaged"] == 0
    stored = [key for key in range(24) if rig.find(Block(key))[0]]
    assert rig.read(*[Block(k, pages[k]) for k in stored]) == [Outcome.LOADED] * len(stored)
    assert used(rig) == sum(pages[key] for key in stored)
    engine.close()
