"""An engine's write of one block in the caller's thread that must not go over all entries."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from light_mem.engine import open_store
from light_mem.engine.base import Outcome
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.write_now import WriteNow
from light_mem.index import keys as keymath
from light_mem.index import order as order_module
from light_mem.index import retention
from light_mem.index.allocation import MOST_EVICTED
from light_mem.index.format import JOURNAL_LENGTH, KEEP_PINNED, LIVE
from light_mem.index.replica import NEAR_CHANGES, SpaceReplica, free_runs
from light_mem.index.retention import Retention
from light_mem.index.space import FreeRuns
from light_mem.index.taking import Taking
from tests.engine_helpers import Block, Rig, assert_consistent, open_local

SCANS = [
    (SpaceReplica, "read"),
    (order_module.EvictionOrder, "_evictable"),
    (Taking, "put_in_order"),
    (Retention, "take_expired"),
    (Retention, "expect_next"),
    (Retention, "recount"),
]


class Ahead:
    """Notes what a ScansAhead is told."""

    def __init__(self) -> None:
        self.refusals = 0
        self.low: list[bool] = []
        self.scan: Callable[[], bool] | None = None  # as it was told last

    def refused(self, shard: int, scan: Callable[[], bool] | None = None) -> None:
        self.refusals += 1
        self.scan = scan

    def wrote(self, shard: int, scan: Callable[[], bool] | None = None) -> None:
        self.low.append(scan is not None)
        self.scan = scan


@pytest.fixture(autouse=True)
def no_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a write that must not scan nothing is scanned."""
    inside = threading.local()
    write: Any = WriteNow.write

    def noting(self: WriteNow, block: Any, ahead: Any = None) -> Outcome | None:
        inside.it = ahead is not None
        try:
            outcome: Outcome | None = write(self, block, ahead)
            return outcome
        finally:
            inside.it = False

    def spied(owner: type, name: str) -> None:
        real = getattr(owner, name)

        def scan(self: Any, *arguments: Any) -> Any:
            result = real(self, *arguments)  # unless it refuses
            assert not getattr(inside, "it", False), f"{owner.__name__}.{name}"
            return result

        monkeypatch.setattr(owner, name, scan)

    monkeypatch.setattr(WriteNow, "write", noting)
    for owner, name in SCANS:
        spied(owner, name)


def now(r: Rig, block: Block, ahead: Ahead) -> Outcome | None:
    engine = r.engine
    assert isinstance(engine, LocalStorageEngine)
    return engine.write_now(r._batch([block], fill=True)[0], ahead)  # type: ignore[arg-type]


def opened(tmp_path: Path, slots: int, **options: Any) -> tuple[LocalStorageEngine, Rig, Ahead]:
    engine = open_local(tmp_path / "s", slots, **options)
    engine.prepare()
    return engine, Rig(engine), Ahead()


def another(tmp_path: Path) -> tuple[LocalStorageEngine, Rig]:
    engine = LocalStorageEngine(tmp_path / "s", kind="worker")
    return engine, Rig(engine)


def test_a_shard_is_refused_until_it_was_scanned(tmp_path: Path) -> None:
    engine, r, ahead = opened(tmp_path, 8)
    assert now(r, Block(1), ahead) is None
    assert ahead.refusals == 1
    assert not engine._index.control["dirty"].any()
    assert not engine.prepare_shard(0)  # there is room, and nothing to evict
    assert now(r, Block(1), ahead) is Outcome.STORED
    assert now(r, Block(1), ahead) is Outcome.PRESENT
    assert (ahead.refusals, ahead.low) == (1, [False])
    assert r.read(Block(1)) == [Outcome.LOADED]
    engine.close()


def test_a_full_shard_gives_the_oldest_blocks_and_says_when_it_runs_low(tmp_path: Path) -> None:
    engine, r, ahead = opened(tmp_path, 16)
    r.write(*[Block(n) for n in range(16)])
    r.find(Block(0), touch=True)
    assert now(r, Block(100), ahead) is None  # its free space is known, the order is not
    assert engine.prepare_shard(0)
    for n in range(15):
        assert now(r, Block(100 + n), ahead) is Outcome.STORED
        assert r.find(*[Block(k) for k in (0, n + 1)]) == [True, False]
    assert ahead.low == [False] * 11 + [True] * 4
    assert now(r, Block(115), ahead) is Outcome.STORED
    assert r.find(Block(0)) == [False]
    assert now(r, Block(116), ahead) is None
    assert ahead.scan is not None
    assert ahead.scan()  # without the lock, for its free space is known
    assert r.write(Block(116)) == [(Outcome.COPIED, Outcome.STORED)]
    assert now(r, Block(117), ahead) is Outcome.STORED
    assert r.find(Block(100), Block(101), Block(102)) == [False, False, True]
    assert_consistent(engine._index)
    engine.close()


def test_who_was_away_for_many_changes_is_refused(tmp_path: Path) -> None:
    engine, r, ahead = opened(tmp_path, 64)
    engine.prepare_shard(0)
    other, busy = another(tmp_path)
    for changes, outcome in (NEAR_CHANGES, Outcome.STORED), (NEAR_CHANGES + 2, None):
        for _ in range(changes // 2):  # one taken, one freed
            busy.write(Block(1000))
            assert busy.delete(Block(1000))
        assert now(r, Block(changes), ahead) is outcome
    engine.prepare_shard(0)
    assert now(r, Block(1), ahead) is Outcome.STORED
    assert ahead.refusals == 1
    other.close()
    engine.close()


def test_damage_is_left_to_who_may_scan(tmp_path: Path) -> None:
    engine, r, ahead = opened(tmp_path, 8, block_pages=2)
    r.write(*[Block(n, 2) for n in range(4)])
    engine.prepare_shard(0)
    oldest = engine.lookup.find_one(*keymath.as_key(0), touch=False)
    engine._index.entries["run"][oldest] = 0
    assert now(r, Block(9, 2), ahead) is None
    assert now(r, Block(9, 2), ahead) is None  # to be put in order
    assert r.write(Block(9, 2)) == [(Outcome.COPIED, Outcome.STORED)]
    assert r.read(*[Block(n, 2) for n in (1, 2, 3, 9)]) == [Outcome.LOADED] * 4
    assert_consistent(engine._index)
    engine.prepare_shard(0)
    assert now(r, Block(10, 2), ahead) is Outcome.STORED
    engine.close()


def test_a_journal_that_makes_no_sense_is_left_to_who_may_scan(tmp_path: Path) -> None:
    engine, r, ahead = opened(tmp_path, 8)
    engine.prepare_shard(0)
    other, others = another(tmp_path)
    others.write(Block(1))
    epoch = int(engine._index.control["epoch"][0])
    engine._index.control["journal"][0, epoch - 1] = 0
    assert now(r, Block(2), ahead) is None
    assert r.write(Block(3))[0][-1] is Outcome.STORED
    assert now(r, Block(2), ahead) is Outcome.STORED
    assert r.read(*[Block(n) for n in (1, 2, 3)]) == [Outcome.LOADED] * 3
    assert_consistent(engine._index)
    other.close()
    engine.close()


def test_expired_blocks_are_taken_out_by_who_may_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, r, ahead = opened(tmp_path, 4)
    engine.prepare_shard(0)
    engine.time_to_live = 10.0
    assert [now(r, Block(n), ahead) for n in range(4)] == [Outcome.STORED] * 4
    engine.prepare_shard(0)
    later = retention.clock() + 100
    monkeypatch.setattr(retention, "clock", lambda: later)
    assert now(r, Block(4), ahead) is None
    # Also where their time is up after the first look.
    due = iter([False, True])
    with monkeypatch.context() as patch:
        patch.setattr(Retention, "is_due", lambda _: next(due))
        assert now(r, Block(4), ahead) is None
    assert r.write(Block(4))[0][-1] is Outcome.STORED
    assert now(r, Block(5), ahead) is Outcome.STORED
    engine.close()


@pytest.mark.parametrize("seed", range(6))
def test_the_least_recently_used_block_goes_whatever_other_processes_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Another process writes, evicts, uses, deletes and pins blocks of one to three pages between
    the scan and the write."""
    monkeypatch.setattr(order_module, "MIN_BATCH", 16)
    rng = np.random.default_rng(seed)
    engine, r, ahead = opened(tmp_path, 192, block_pages=3)
    other, others = another(tmp_path)
    index, stored, evicting = engine._index, 0, 0
    lengths: dict[int, int] = {}
    for key in range(1500):
        operation = int(rng.integers(0, 12))
        some = Block(int(rng.integers(max(0, key - 150), key + 1)))
        block = Block(key, int(rng.integers(1, 4)))
        if operation < 6:
            lengths[key] = block.pages
            can_go = (index.entries["tag"] & np.uint64(0xFF) == LIVE) & (
                index.entries["keep"] < KEEP_PINNED
            )
            slots = np.flatnonzero(can_go)
            in_order = slots[np.argsort(index.uses[slots], kind="stable")]
            before = [tuple(index.entries[["low", "high"]][slot].tolist()) for slot in in_order]
            outcome = now(r, block, ahead)
            if outcome is None:
                others.write(block)
                continue
            stored += 1
            left = [engine.lookup.find_one(*key, touch=False) >= 0 for key in before]
            evicting += not all(left)
            assert left == sorted(left), "a block went before an older one"
        elif operation == 6:
            engine.prepare_shard(0)
        elif operation < 9:
            others.find(some, touch=True)
        elif operation == 9:
            lengths[key] = block.pages
            others.write(block)
        elif operation == 10:
            others.delete(some)
        else:
            keys = keymath.as_keys([some.key])
            if not other.pin(keys) or rng.random() < 0.9:
                other.unpin(keys)
    assert stored > 300
    assert evicting > 100
    listed = [Block(key, pages) for key, pages in lengths.items() if r.find(Block(key)) == [True]]
    assert set(r.read(*listed)) == {Outcome.LOADED}
    assert_consistent(index)
    other.close()
    engine.close()


def test_a_shard_whose_free_space_is_in_many_pieces_is_not_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To note them all would stop the server's other threads."""
    monkeypatch.setattr(open_store, "MOST_RUNS", 3)
    rig = Rig(open_local(tmp_path / "store", 32))
    other = open_local(tmp_path / "store", 32)
    blocks = [Block(key) for key in range(32)]
    Rig(other).write(*blocks)
    engine = rig.engine
    assert isinstance(engine, LocalStorageEngine)
    engine.prepare()
    assert engine.prepare_shard(0)
    for freed, is_prepared in ((1, True), (4, False)):
        Rig(other).delete(*blocks[: 2 * freed : 2])
        with other.change(0) as (index, _):  # further than the journal reaches
            index.control["epoch"] += JOURNAL_LENGTH + 1
        assert engine.prepare_shard(0) is is_prepared
        assert not engine._index.control["dirty"][0]
        assert engine.is_near(0) is is_prepared
    with engine.change(0) as (index, _):
        assert index.has_room(1)
        assert not index.has_room(2)
    assert_consistent(engine._index)
    for each in (other, engine):
        each.close()


def test_a_write_that_would_evict_many_blocks_is_left_to_the_workers(tmp_path: Path) -> None:
    pages = 2 * MOST_EVICTED
    rig = Rig(open_local(tmp_path / "store", pages, block_pages=pages))
    engine = rig.engine
    assert isinstance(engine, LocalStorageEngine)
    rig.write(*[Block(key) for key in range(pages)])
    engine.prepare()
    few, many = Block(1000, MOST_EVICTED), Block(1001, pages)
    [block] = rig._batch([few], fill=True)
    assert engine.write_now(block) is Outcome.STORED
    before = engine.stats()["evictions"]
    rig.write(*[Block(key) for key in range(pages)])
    before = engine.stats()["evictions"]
    [block] = rig._batch([many], fill=True)
    assert engine.write_now(block) is None
    assert engine.stats()["evictions"] - before <= MOST_EVICTED
    assert_consistent(engine._index)
    assert rig.write(many) == [(Outcome.COPIED, Outcome.STORED)]
    assert rig.read(many) == [Outcome.LOADED]
    engine.close()


@pytest.mark.parametrize("at", [0, 1, 5])
def test_free_space_is_read_anew_after_a_replay_that_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The hold ends as it began, and what was replayed by then must not be replayed again."""
    rig = Rig(open_local(tmp_path / "store", 32))
    other = Rig(open_local(tmp_path / "store", 32))
    rig.write(Block(100))
    for key in range(0, 16, 2):
        other.write(Block(key), Block(key + 1))
        other.delete(Block(key))
    engine = rig.engine
    assert isinstance(engine, LocalStorageEngine)
    calls = 0
    remove = FreeRuns.remove

    def interrupted(self: FreeRuns, start: int, length: int) -> bool:
        nonlocal calls
        calls += 1
        if calls > at:
            raise KeyboardInterrupt
        return remove(self, start, length)

    with monkeypatch.context() as once:
        once.setattr(FreeRuns, "remove", interrupted)
        with pytest.raises(KeyboardInterrupt), engine.change(0):
            pass
    assert calls == at + 1
    with engine.change(0) as (index, _):
        assert index._space.runs.runs() == free_runs(index.entries).runs()
    assert_consistent(engine._index)
    for each in (rig, other):
        each.engine.close()
