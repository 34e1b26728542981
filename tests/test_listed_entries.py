"""A read that is told where its blocks were listed when the task was made, rightly or not."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from light_mem.engine.base import Outcome
from light_mem.engine.local import LocalStorageEngine
from light_mem.index import keys as keymath
from tests.engine_helpers import (
    COPIED_AND_STORED,
    UNTOUCHED,
    Block,
    Rig,
    let_go,
    open_local,
)
from tests.payload import block_bytes_of
from tests.service_rig import rig as service_rig

SLOTS = 24  # a shard


def local_of(rig: Rig) -> LocalStorageEngine:
    assert isinstance(rig.engine, LocalStorageEngine)
    return rig.engine


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(open_local(tmp_path / "store", SLOTS, shards=2))
    yield rig
    rig.engine.close()
    let_go(rig.engine, rig)


def entries_of(rig: Rig, *blocks: Block) -> list[int]:
    keys = keymath.as_keys([block.key for block in blocks])
    found: list[int] = local_of(rig).find_entries(keys, touch=False).tolist()
    return found


def read(rig: Rig, blocks: list[Block], entries: list[int]) -> list[Outcome]:
    """Outcomes of a read that was told these entries; every loaded byte is looked at."""
    told: list[list[Outcome]] = [[] for _ in blocks]
    batch = rig._batch(blocks, fill=False)

    def report(positions: object, outcome: Outcome) -> None:
        for at in positions:  # type: ignore[attr-defined]
            told[at].append(outcome)

    engine: LocalStorageEngine = local_of(rig)
    engine.begin_read(batch, report, entries=entries)
    engine.finish_reads()
    for block, io, outcomes in zip(blocks, batch, told, strict=True):
        assert len(outcomes) == 1
        found = io.place.memory[io.place.numbers]  # type: ignore[call-overload]
        if outcomes == [Outcome.LOADED]:
            wanted = block_bytes_of(block.key, block.pages, rig.page_bytes)
            assert np.array_equal(found, wanted), f"wrong bytes of {block}"
        else:
            assert (found == UNTOUCHED).all()
    return [outcome for [outcome] in told]


def test_blocks_are_read_from_where_they_were_listed(rig: Rig) -> None:
    blocks = [Block(1, 2), Block(2), Block(3, 3)]
    assert rig.write(*blocks) == [COPIED_AND_STORED] * 3
    entries = entries_of(rig, *blocks)
    engine = local_of(rig)
    used = engine._index.uses.copy()
    assert read(rig, blocks, entries) == [Outcome.LOADED] * 3
    # `create` has counted the use: a reader writes to nothing that others read.
    assert (engine._index.uses == used).all()


def test_a_block_that_lies_elsewhere_by_now_is_found_there(rig: Rig) -> None:
    rig.write(Block(1), Block(2))
    before = entries_of(rig, Block(1))
    rig.delete(Block(1))
    for n in range(10, 10 + SLOTS):  # until another is where it was
        rig.write(Block(n))
        if entries_of(rig, Block(n)) == before:
            break
    rig.write(Block(1))
    assert -1 < entries_of(rig, Block(1))[0] != before[0]
    assert read(rig, [Block(1), Block(2)], [*before, -1]) == [Outcome.LOADED] * 2


def test_a_block_that_is_gone_is_missing_whatever_lies_there_now(rig: Rig) -> None:
    rig.write(Block(1), Block(2))
    entries = entries_of(rig, Block(1), Block(2))
    rig.delete(Block(1))
    assert read(rig, [Block(1), Block(2)], entries) == [Outcome.MISSING, Outcome.LOADED]
    rig.write(*[Block(n) for n in range(10, 16)])
    assert read(rig, [Block(1), Block(2)], entries) == [Outcome.MISSING, Outcome.LOADED]


@pytest.mark.parametrize("seed", range(20))
def test_any_number_does(rig: Rig, seed: int) -> None:
    """Those of other blocks, of no entry, twice the same: each block is its own, or missing."""
    choose = random.Random(seed)
    stored = [Block(n, 1 + n % 3) for n in range(1, 10)]
    assert rig.write(*stored) == [COPIED_AND_STORED] * len(stored)
    absent = [Block(n) for n in range(90, 93)]
    blocks = choose.sample(stored + absent, 9)
    blocks.append(blocks[0])
    wanted = [Outcome.LOADED if b in stored else Outcome.MISSING for b in blocks]
    listed = entries_of(rig, *blocks)
    wrong = [-1, -7, 2 * SLOTS, 2 * SLOTS - 1, 2**31, 2**62, *range(2 * SLOTS)]
    told = [at if choose.random() < 0.4 else choose.choice(wrong) for at in listed]
    assert read(rig, blocks, told) == wanted


def test_a_block_that_expires_while_its_read_waits_is_missing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    local_of(rig).time_to_live = 60
    rig.write(Block(1))
    entries = entries_of(rig, Block(1))
    assert read(rig, [Block(1)], entries) == [Outcome.LOADED]
    monkeypatch.setattr("light_mem.index.retention.has_expired", lambda _: True)
    assert read(rig, [Block(1)], entries) == [Outcome.MISSING]


def test_the_workers_of_a_service_are_told(tmp_path: Path) -> None:
    with service_rig(tmp_path, workers=1) as r:
        keys = [f"block {n}" for n in range(6)]
        r.write(keys, range(6))
        entries = r.service._engine.find_entries(keymath.as_keys(keys), touch=False)
        task = r.service.create("read", [*keys, "absent"], list(range(10, 17)))
        assert task.wait(30)
        cells = r.service._session.table.cells["listed"]
        assert sorted(cells[cells > 0].tolist()) == sorted((entries + 1).tolist())
        assert all(r.holds(key, [10 + n]) for n, key in enumerate(keys))
