"""A store after its process was killed at any store: no repair, no scan, no wrong byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from light_mem.engine.base import Outcome
from light_mem.engine.local import LocalStorageEngine
from light_mem.index import file as index_file
from light_mem.index import format as fmt
from light_mem.index.recovery import states_of
from light_mem.index.shard import ShardIndex
from tests.deaths import Files, moments, restore
from tests.engine_helpers import Block, Rig, open_local
from tests.killed_store import BEFORE, FRESH, KEPT, PAGES, check, opened, prepared


def write_now(rig: Rig, block: Block) -> None:
    assert isinstance(rig.engine, LocalStorageEngine)
    assert rig.engine.write_now(rig._batch([block], fill=True)[0]) is Outcome.STORED


Scenario = tuple[Callable[[Rig], object], set[int]]  # and the keys it does not touch
SCENARIOS: dict[str, Scenario] = {
    "write into pieces, evicting": (lambda rig: rig.write(*FRESH), KEPT - {2}),
    "write twice": (lambda rig: rig.write(FRESH[2], FRESH[2]), KEPT | {0, 1}),
    "stopped write": (lambda rig: rig.write(*FRESH[:2], stop=lambda at: at == 0), KEPT - {2}),
    "write now": (lambda rig: write_now(rig, FRESH[2]), KEPT | {0, 1}),
    "write now into pieces, evicting": (lambda rig: write_now(rig, FRESH[0]), KEPT | {1}),
    "delete": (lambda rig: rig.delete(BEFORE[0], BEFORE[4]), KEPT - {4} | {1}),
    "clear": (lambda rig: rig.engine.clear(), set()),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_kill_at_any_store_costs_only_what_was_in_flight(tmp_path: Path, name: str) -> None:
    call, kept = SCENARIOS[name]
    rig = prepared(tmp_path / "store")
    seen = moments(tmp_path / "store", lambda: call(rig))
    rig.engine.close()
    assert len(seen) > 15
    for at, files in enumerate(seen):
        check(restore(files, tmp_path / "store", tmp_path / str(at)), kept, verify=at % 2 == 0)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_kill_that_takes_the_index_along_costs_no_more(tmp_path: Path, name: str) -> None:
    call, kept = SCENARIOS[name]
    rig = prepared(tmp_path / "store")
    seen = moments(tmp_path / "store", lambda: call(rig))
    rig.engine.close()
    for at, files in enumerate(seen):
        files = {name: content for name, content in files.items() if name != "index"}
        check(restore(files, tmp_path / "store", tmp_path / str(at)), kept, verify=at % 2 == 0)


def test_a_kill_while_a_dead_process_is_reclaimed_is_reclaimed_as_well(tmp_path: Path) -> None:
    rig = prepared(tmp_path / "store")
    seen = moments(tmp_path / "store", lambda: rig.write(*FRESH))
    rig.engine.close()
    tried = 0
    for at in range(3, len(seen), 11):
        directory = restore(seen[at], tmp_path / "store", tmp_path / str(at))
        engine = LocalStorageEngine(directory, kind="tool")  # has not reclaimed anybody yet
        for step, files in enumerate(moments(directory, engine.reclaim)):
            check(restore(files, directory, tmp_path / f"{at}-{step}"), KEPT - {2}, verify=False)
            tried += 1
        engine.close()
    assert tried > 30


class Killed(BaseException):
    """Stands for a kill: nothing that catches errors sees it."""


def test_records_of_a_holder_that_died_do_not_come_back_over_others_bytes(tmp_path: Path) -> None:
    """A block is taken out of the index, and its holder dies before its record is cleared. Others
    write over its slots and delete that again; then the index is lost. Without verification the
    record's checksum is no help."""
    rig = prepared(tmp_path / "store")
    engine = rig.engine
    assert isinstance(engine, LocalStorageEngine)
    real = ShardIndex.remove

    def die(index: ShardIndex, slot: int) -> None:
        real(index, slot)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardIndex, "remove", die)
        with pytest.raises(Killed):
            rig.delete(BEFORE[0])
    assert rig.write(Block(200, 1), Block(201, 1), Block(202, 1))[2][-1] is Outcome.STORED
    rig.delete(Block(200), Block(201), Block(202))
    engine.close()
    (tmp_path / "store" / index_file.NAME).unlink()
    rig = opened(tmp_path / "store", verify=False)
    assert rig.read(BEFORE[0], BEFORE[1]) == [Outcome.MISSING, Outcome.LOADED]
    rig.engine.close()


def test_the_moments_of_a_write_are_the_documented_ones(tmp_path: Path) -> None:
    """The order of docs/format.md, seen from outside: what changes first in each file."""
    rig = prepared(tmp_path / "store")
    seen = moments(tmp_path / "store", lambda: rig.write(FRESH[2]))
    rig.engine.close()

    def first(condition: Callable[[Files], object]) -> int:
        return next(at for at, files in enumerate(seen) if condition(files))

    def entries(files: Files) -> np.ndarray:
        at = fmt.index_layout(1, PAGES)[2]
        return np.frombuffer(files["index"], fmt.ENTRY, PAGES, at)

    def intents(files: Files) -> np.ndarray:
        return np.frombuffer(files["owners"], fmt.OWNER)["intents"]

    before = seen[0]
    slot = int(np.flatnonzero(entries(seen[-1])["low"] == FRESH[2].key)[0])

    def state(files: Files) -> int:
        return int(entries(files)["tag"][slot]) & fmt.STATE_MASK

    order = [
        first(lambda files: np.frombuffer(files["index"], fmt.CONTROL, 1, 4096)["dirty"][0]),
        first(lambda files: intents(files).any()),
        first(lambda files: state(files) == fmt.WRITING),
        first(lambda files: files["shard-000.data"] != before["shard-000.data"]),
        first(lambda files: files["shard-000.slots"] != before["shard-000.slots"]),
        first(lambda files: entries(files)["low"][slot] == FRESH[2].key),
        first(lambda files: state(files) == fmt.LIVE),
        first(lambda files: slot + 1 in np.frombuffer(files["index"], "<u4", 64, 8192)),
    ]
    assert order == sorted(set(order))
    assert not intents(seen[-1]).any()


def test_a_kill_leaves_no_record_of_a_victim_whose_slot_begins_a_further_run(
    tmp_path: Path,
) -> None:
    blocks = [Block(key) for key in range(8)]
    store = tmp_path / "store"
    rig = Rig(open_local(store, 8, block_pages=8))
    rig.write(*blocks)
    rig.find(*[b for b in blocks if b.key not in (2, 6)], touch=True)  # not neighbours, the oldest
    seen = moments(store, lambda: rig.write(Block(100, 2)))
    rig.engine.close()
    assert len(seen) > 15
    for at, files in enumerate(seen):
        again = Rig(open_local(restore(files, store, tmp_path / f"{at}"), 8, block_pages=8))
        engine = again.engine
        assert isinstance(engine, LocalStorageEngine)
        with engine.change(0):
            pass
        live = np.flatnonzero(states_of(engine._index.entries) == fmt.LIVE)
        assert np.flatnonzero(engine.file(0).records["tag"] == fmt.LIVE).tolist() == live.tolist()
        again.read(*blocks, Block(100, 2))
        engine.close()
