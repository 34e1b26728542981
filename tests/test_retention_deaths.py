"""Pins, leases and expiry after a kill at any store: nothing wrong, nothing lost, nothing stuck."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from light_mem import maintenance
from light_mem.engine.base import Outcome
from light_mem.engine.keeping import Leased
from light_mem.engine.local import LocalStorageEngine
from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.index.recovery import states_of
from tests.deaths import Files, moments, restore
from tests.engine_helpers import Block, Rig, open_local
from tests.retention_helpers import START, Clock, keys_of

PAGES = 12
BEFORE = [Block(key, 2 if key < 2 else 1) for key in range(9)]  # 0 and 1 are the oldest
FRESH = [Block(100, 3), Block(101, 2), Block(102, 1)]
EVERY = [*BEFORE, *FRESH]
KEPT = {0, 1, 2, 4, 6, 7, 8}


def opened(directory: Path) -> Rig:
    return Rig(open_local(directory, PAGES, block_pages=8))


def prepared(directory: Path) -> Rig:
    """Blocks 0 to 8 without 3 and 5, whose slots are holes: three slots are free."""
    rig = opened(directory)
    for block in BEFORE:
        rig.write(block)
    rig.delete(BEFORE[3], BEFORE[5])
    return rig


def local(rig: Rig) -> LocalStorageEngine:
    assert isinstance(rig.engine, LocalStorageEngine)
    return rig.engine


def lease(rig: Rig, key: int) -> Leased:
    found = local(rig).lease(*keymath.as_key(key))
    assert found is not None
    return found


class Scenario(NamedTuple):
    before: Callable[[Rig, Clock], object]  # not watched; what it returns goes to `call`
    call: Callable[[Rig, object], object]
    kept: set[int]  # the keys that are stored whatever happens
    pinned: frozenset[int] = frozenset()  # how many pinned blocks there may be
    expired: frozenset[int] = frozenset()  # keys that count as absent and may be listed


def _nothing(rig: Rig, clock: Clock) -> None:
    pass


def _end(rig: Rig, leased: object) -> None:
    assert isinstance(leased, Leased)
    local(rig).end_lease(leased)


def _lease_and_delete(rig: Rig, clock: Clock) -> Leased:
    leased = lease(rig, 1)
    rig.delete(BEFORE[1])
    return leased


def _delete_and_end(rig: Rig, leased: object) -> None:
    rig.delete(BEFORE[1], BEFORE[4])
    _end(rig, leased)


def _expire(rig: Rig, clock: Clock) -> Leased:
    """Blocks 1, 2 and 6 written anew to live ten seconds, which have passed; 2 is leased."""
    engine = local(rig)
    rig.delete(BEFORE[1], BEFORE[2], BEFORE[6])
    engine.time_to_live = 10
    rig.write(BEFORE[1], BEFORE[2], BEFORE[6])
    engine.time_to_live = None
    leased = lease(rig, 2)
    clock.now = START + 10
    return leased


def _pin(*numbers: int) -> Callable[[Rig, object], object]:
    return lambda rig, _: local(rig).pin(keys_of(*(BEFORE[n] for n in numbers)))


def _unpin(*numbers: int) -> Callable[[Rig, object], object]:
    return lambda rig, _: local(rig).unpin(keys_of(*(BEFORE[n] for n in numbers)))


def _pinned(*numbers: int) -> Callable[[Rig, Clock], object]:
    return lambda rig, _: local(rig).pin(keys_of(*(BEFORE[n] for n in numbers)))


SCENARIOS: dict[str, Scenario] = {
    "pin": Scenario(_nothing, _pin(0, 4, 6), KEPT, frozenset(range(4))),
    "unpin": Scenario(_pinned(0, 4, 6), _unpin(0, 4, 6), KEPT, frozenset(range(4))),
    "evict with pins": Scenario(
        _pinned(0, 1), lambda rig, _: rig.write(*FRESH), {0, 1, 7, 8}, frozenset({2})
    ),
    "delete pinned": Scenario(
        _pinned(0, 4),
        lambda rig, _: rig.delete(BEFORE[0], BEFORE[4]),
        KEPT - {0, 4},
        frozenset(range(3)),
    ),
    "lease": Scenario(_nothing, lambda rig, _: lease(rig, 0), KEPT),
    "end of a lease": Scenario(lambda rig, _: lease(rig, 0), _end, KEPT),
    "delete while leased, and the end": Scenario(
        lambda rig, _: lease(rig, 1), _delete_and_end, KEPT - {1, 4}
    ),
    "end of a lease on what was deleted": Scenario(_lease_and_delete, _end, KEPT - {1}),
    "evict with leases": Scenario(
        lambda rig, _: [lease(rig, 0), lease(rig, 1)], lambda rig, _: rig.write(*FRESH), {0, 1, 8}
    ),
    "clear with leases": Scenario(
        lambda rig, _: [lease(rig, 0), lease(rig, 4)], lambda rig, _: local(rig).clear(), set()
    ),
    "expiry": Scenario(
        _expire, lambda rig, _: rig.write(*FRESH), {0, 4, 7, 8}, expired=frozenset({1, 2, 6})
    ),
}


def check(directory: Path, scenario: Scenario) -> None:
    """Open the store as the next process does, and look at every block and every file."""
    rig = opened(directory)
    engine = local(rig)
    outcomes = dict(zip(EVERY, rig.read(*EVERY), strict=True))
    assert set(outcomes.values()) <= {Outcome.LOADED, Outcome.MISSING}
    loaded = {block.key for block, outcome in outcomes.items() if outcome is Outcome.LOADED}
    assert scenario.kept <= loaded
    assert not loaded & scenario.expired
    with engine.change(0):
        pass
    states = states_of(engine._index.entries)
    assert fmt.WRITING not in states
    assert fmt.HELD not in states  # its viewer is dead
    listed = {int(low) for low in engine._index.entries["low"][states == fmt.LIVE]}
    assert loaded <= listed <= loaded | scenario.expired
    stats = engine.stats()
    assert stats["used_slots"] == sum(block.pages for block in EVERY if block.key in listed)
    assert stats["pinned_blocks"] in (scenario.pinned or {0})
    keeps = engine._index.entries["keep"][states == fmt.LIVE]
    assert stats["pinned_blocks"] == np.count_nonzero(keeps >= fmt.KEEP_PINNED)
    engine.close()
    report = maintenance.verify(directory, jobs=1)
    assert report.clean, report.findings


def at_every_moment(tmp_path: Path, name: str, clock: Clock) -> list[Files]:
    scenario = SCENARIOS[name]
    rig = prepared(tmp_path / "store")
    state = scenario.before(rig, clock)
    seen = moments(tmp_path / "store", lambda: scenario.call(rig, state))
    engine = local(rig)
    engine.leases.dropped.extend([*engine.leases._held])  # else it would stay a member
    engine.close()
    assert len(seen) > 3
    return seen


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("lost", ["", "index"], ids=["", "and the index is lost"])
def test_a_kill_at_any_store_costs_only_what_was_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, lost: str
) -> None:
    clock = Clock(monkeypatch)
    seen = at_every_moment(tmp_path, name, clock)
    for at, files in enumerate(seen):
        if lost and at % 2:
            continue
        left = {name: content for name, content in files.items() if name != lost}
        check(restore(left, tmp_path / "store", tmp_path / str(at)), SCENARIOS[name])


@pytest.mark.parametrize("name", ["delete while leased, and the end", "clear with leases"])
def test_a_kill_while_a_dead_viewer_is_reclaimed_is_reclaimed_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    clock = Clock(monkeypatch)
    seen = at_every_moment(tmp_path, name, clock)
    tried = held = 0
    for at in range(len(seen) // 3, len(seen), 7):
        directory = restore(seen[at], tmp_path / "store", tmp_path / str(at))
        engine = LocalStorageEngine(directory, kind="tool")  # has not reclaimed anybody yet
        held += fmt.HELD in states_of(engine._index.entries)
        for step, files in enumerate(moments(directory, engine.reclaim)):
            check(restore(files, directory, tmp_path / f"{at}-{step}"), SCENARIOS[name])
            tried += 1
        engine.close()
    assert held
    assert tried > 10


def test_a_pin_whose_holder_died_is_in_both_files_or_in_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entry comes first; the next holder of the lock makes the record follow it."""
    seen = at_every_moment(tmp_path, "pin", Clock(monkeypatch))
    differ = 0
    for at, files in enumerate(seen):
        directory = restore(files, tmp_path / "store", tmp_path / str(at))
        engine = LocalStorageEngine(directory, kind="tool")
        live = states_of(engine._index.entries) == fmt.LIVE
        keeps, records = engine._index.entries["keep"], engine.file(0).records["keep"]
        differ += bool((keeps[live] != records[live]).any())
        with engine.change(0):
            pass
        assert (keeps[live] == records[live]).all()
        engine.close()
    assert differ >= 3


def test_what_replaces_a_pinned_block_is_pinned_whoever_dies_when(tmp_path: Path) -> None:
    rig = prepared(tmp_path / "store")
    local(rig).pin(keys_of(BEFORE[0]))
    seen = moments(tmp_path / "store", lambda: rig.write(Block(0, 1)))
    rig.engine.close()
    lengths = set()
    for at, files in enumerate(seen):
        rig = opened(restore(files, tmp_path / "store", tmp_path / str(at)))
        engine = local(rig)
        with engine.change(0):
            pass
        entry = engine.lookup.find_one(*keymath.as_key(0))
        assert engine.stats()["pinned_blocks"] == (entry >= 0)
        if entry >= 0:
            assert int(engine._index.entries["keep"][entry]) >= fmt.KEEP_PINNED
            lengths.add(int(engine._index.entries["nbytes"][entry]))
        engine.close()
        assert maintenance.verify(engine.directory, jobs=1).clean
    assert len(lengths) == 2
