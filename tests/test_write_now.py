"""An engine's write of one block that waits for nothing: stored at once, or left to the workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from light_mem.engine.base import BlockIO, Outcome
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.places import Regions
from light_mem.engine.shard_file import ShardFile
from light_mem.engine.sinks import MappedSink
from light_mem.index import retention
from tests.engine_helpers import Block, Rig, open_local


def now(r: Rig, block: Block) -> Outcome | None:
    engine = r.engine
    assert isinstance(engine, LocalStorageEngine)
    return engine.write_now(r._batch([block], fill=True)[0])


def test_a_shard_that_is_not_open_yet_is_left_alone(tmp_path: Path) -> None:
    engine = open_local(tmp_path / "s", 8)
    r = Rig(engine)
    engine.close()
    engine = LocalStorageEngine(tmp_path / "s", kind="server")
    r = Rig(engine)
    assert now(r, Block(1)) is None
    engine.prepare()
    assert now(r, Block(1)) is Outcome.STORED
    assert now(r, Block(1)) is Outcome.PRESENT
    assert r.read(Block(1)) == [Outcome.LOADED]
    engine.close()


def test_no_store_goes_to_a_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could be SIGBUS, which ends the server."""
    r = Rig(open_local(tmp_path / "s", 8, block_pages=8))
    stored: list[int] = []
    storing = MappedSink.storing

    def note(sink: MappedSink, at: int, nbytes: int) -> Any:
        stored.append(nbytes)
        return storing(sink, at, nbytes)

    def fail(*_: object) -> None:
        pytest.fail("a store to a mapping")

    with monkeypatch.context() as patch:
        patch.setattr(MappedSink, "storing", note)
        while not stored:  # until these slots go through the mapping
            r.write(Block(0, 8))
            r.delete(Block(0))
    monkeypatch.setattr(MappedSink, "storing", fail)
    monkeypatch.setattr(MappedSink, "storing_rows", fail)
    assert now(r, Block(0, 8)) is Outcome.STORED
    r.delete(Block(0))
    assert now(r, Block(1, 3)) is Outcome.STORED
    assert now(r, Block(2)) is Outcome.STORED
    assert r.read(Block(1, 3), Block(2)) == [Outcome.LOADED] * 2
    r.engine.close()


def test_one_of_another_length_is_left_to_the_workers(tmp_path: Path) -> None:
    r = Rig(open_local(tmp_path / "s", 8, block_pages=2))
    r.write(Block(1, 2))
    assert now(r, Block(1, 1)) is None
    assert r.read(Block(1, 2)) == [Outcome.LOADED]
    r.engine.close()


def test_where_nothing_may_go_nothing_is_left_behind(tmp_path: Path) -> None:
    engine = open_local(tmp_path / "s", 4)
    r = Rig(engine)
    r.write(*[Block(n) for n in range(4)])
    with engine.change(0) as (index, file):  # as if a worker were filling three of the four slots
        for slot in (0, 1, 2):
            index.remove(slot)
        file.clear_records([0, 1, 2])
        taken = index.allocate(3, [])
        assert taken is not None
        index.mark(taken.runs, owner=9)
    assert now(r, Block(7, 2)) is None  # it has evicted the fourth for that
    records = engine.file(0).records
    assert not (records["tag"] == 2).any()
    assert engine.stats()["blocks"] == 0
    assert now(r, Block(8)) is Outcome.STORED
    assert r.read(Block(8)) == [Outcome.LOADED]
    engine.close()


def test_expired_blocks_are_taken_out_by_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_local(tmp_path / "s", 4)
    r = Rig(engine)
    engine.prepare()
    engine.time_to_live = 10.0
    assert [now(r, Block(n)) for n in range(3)] == [Outcome.STORED] * 3
    # The record says it as well: an index made anew lets it expire too.
    assert (engine.file(0).records["keep"][:3] == engine._index.entries["keep"][:3]).all()
    assert engine.file(0).records["keep"][:3].all()
    later = retention.clock() + 100
    monkeypatch.setattr(retention, "clock", lambda: later)
    assert now(r, Block(3)) is Outcome.STORED  # there is room
    assert now(r, Block(4)) is None
    assert now(r, Block(1)) is None
    assert r.write(*[Block(n) for n in range(5, 9)])[3][-1] is Outcome.STORED
    assert now(r, Block(9)) is Outcome.STORED
    engine.close()


def test_a_shard_that_is_to_be_put_in_order_is_left_to_the_workers(tmp_path: Path) -> None:
    r = Rig(open_local(tmp_path / "s", 8))
    engine = r.engine
    assert isinstance(engine, LocalStorageEngine)
    r.write(Block(1))
    engine._index.control["dirty"][0] = 1  # its holder has died
    assert now(r, Block(2)) is None
    r.write(Block(3))
    assert now(r, Block(2)) is Outcome.STORED
    engine.close()


def test_what_a_failed_batch_left_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object) -> int:
        raise Killed

    engine = open_local(tmp_path / "s", 8)
    r = Rig(engine)
    r.write(Block(1))
    with monkeypatch.context() as patch:
        patch.setattr(ShardFile, "plan", die)
        with pytest.raises(Killed):
            r.write(Block(2), Block(3))
    assert engine.stats()["used_slots"] == 3
    assert now(r, Block(4)) is Outcome.STORED
    assert engine.stats()["used_slots"] == 2
    assert not engine._owners.records["intents"][engine._owner.number].any()
    assert r.read(Block(1), Block(4)) == [Outcome.LOADED] * 2
    engine.close()


def test_a_block_of_regions_in_several_runs_comes_back(tmp_path: Path) -> None:
    engine = open_local(tmp_path / "s", 16, block_pages=16)
    r = Rig(engine)
    r.write(*[Block(n) for n in range(16)])
    r.delete(*[Block(n) for n in range(0, 16, 2)])
    memory = np.random.default_rng(3).integers(0, 256, 1 << 16, np.uint8)
    page = engine.geometry.page_bytes
    wanted = [(7, page + 3), (5 * page, 2 * page)]
    block = BlockIO(99, 0, Regions(memory, wanted))
    assert engine.write_now(block) is Outcome.STORED
    where = engine.lookup.locate(engine.lookup.find_one(99, 0), 99, 0)
    assert where is not None
    assert len(where.runs) > 1
    expected = [memory[a : a + n].copy() for a, n in wanted]
    memory[:] = 0
    outcomes: list[Outcome] = []
    engine.read([block], lambda _, outcome: outcomes.append(outcome))
    assert outcomes == [Outcome.LOADED]
    assert all(
        np.array_equal(memory[a : a + n], e) for (a, n), e in zip(wanted, expected, strict=True)
    )
    engine.close()
