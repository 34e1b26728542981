"""Blocks that are not in the page cache are read past it, each with its own bytes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from light_mem.engine import page_cache
from light_mem.engine.base import BlockIO, Outcome, never
from light_mem.engine.direct_reads import DirectReads
from light_mem.engine.places import Regions, Rows
from light_mem.engine.read_ahead import Span
from light_mem.index import keys as keymath
from light_mem.index.lookup import Location
from tests.cached import forget, forget_all
from tests.cold_rig import (
    DATA,
    MIB,
    all_cold,
    bring_in,
    cache_that_forgets,
    direct,
    located,
    make,
    opened,
    reads,
)
from tests.engine_helpers import COPIED_AND_STORED, Block, Rig, collect, open_local

__all__ = ["all_cold", "cache_that_forgets", "direct", "reads"]  # fixtures


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize("page_bytes", [64, 3840, 4096, 61440, 5 * MIB + 100])
@pytest.mark.parametrize("verify", [True, False])
def test_cold_blocks_come_back_right(
    tmp_path: Path, reads: list[int], page_bytes: int, verify: bool
) -> None:
    blocks = [Block(n, 1 + n % 4) for n in range(6)]
    make(tmp_path / "s", blocks, page_bytes)
    with opened(tmp_path / "s", page_bytes, verify) as r:
        # One at a time and dropped in between: the device reads neighbours too.
        for block in blocks:
            assert r.read(block) == [Outcome.LOADED]
            forget(tmp_path / "s" / DATA)
    assert reads[0] == page_bytes  # how many more depends on what the device reads beside it
    assert set(reads) <= {block.pages * page_bytes for block in blocks}


@pytest.mark.usefixtures("direct")
def test_a_batch_of_cold_and_other_blocks_comes_back_right(
    tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [Block(n, 1 + n % 5) for n in range(24)]
    make(tmp_path / "s", blocks, 4096)
    with opened(tmp_path / "s", 4096) as r:
        where = located(r.engine, blocks)  # type: ignore[arg-type]
        cold = [where[n] for n in (0, 3, 4, 5, 6, 22)]
        start = r.engine.file(0).address(0)  # type: ignore[attr-defined]
        # Of each block the middle is asked for: its ends may have been read with its neighbours.
        middles = {start + w.slot * 4096 + w.nbytes // 2 for w in cold}
        monkeypatch.setattr(
            page_cache,
            "hold_each",
            lambda addresses: [address not in middles for address in addresses],
        )
        assert r.read(*blocks[::-1]) == [Outcome.LOADED] * 24
    assert reads == [w.nbytes for w in cold]


@pytest.mark.usefixtures("all_cold")
def test_for_a_block_that_is_not_wanted_the_device_is_not_asked(
    tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "s", [Block(1, 4), Block(2, 4), Block(3, 4)], 4096)
    planned: list[Span] = []
    monkeypatch.setattr(DirectReads, "plan", lambda _, spans, more: planned.extend(spans))
    with opened(tmp_path / "s", 4096) as r:
        wanted = [Outcome.MISSING, Outcome.LOADED, Outcome.MISSING, Outcome.STOPPED]
        asked = [Block(1, 2), Block(2, 4), Block(1, 5), Block(3, 4)]
        assert r.read(*asked, stop=lambda at: at == 3) == wanted
    assert reads == [4 * 4096]
    assert [span.nbytes for span in planned] == [4 * 4096]


def test_what_is_in_the_page_cache_goes_through_the_mapping(
    tmp_path: Path, reads: list[int]
) -> None:
    blocks = [Block(n, 4) for n in range(6)]
    make(tmp_path / "s", blocks, 4096)
    (tmp_path / "s" / DATA).read_bytes()
    with opened(tmp_path / "s", 4096) as r:
        assert r.read(*blocks) == [Outcome.LOADED] * 6
        assert not bring_in(r.engine)
    assert not reads


@pytest.mark.usefixtures("all_cold", "direct")
def test_what_is_dirty_in_the_page_cache_is_read_all_the_same(
    tmp_path: Path, reads: list[int]
) -> None:
    """Another process has just written it, through its mapping, and nothing of it is synced."""
    other = Rig(open_local(tmp_path / "s", 64, page_bytes=4096), 4096)
    blocks = [Block(n, 8) for n in range(8)]
    with opened(tmp_path / "s", 4096) as r:
        for key in range(3):
            written = [Block(block.key + 100 * key, 8) for block in blocks]
            assert other.write(*written) == [COPIED_AND_STORED] * 8
            assert r.read(*written) == [Outcome.LOADED] * 8
    other.engine.close()
    assert len(reads) == 24


@pytest.mark.parametrize("scattered", [False, True])
def test_a_block_of_many_regions_comes_back_right(
    tmp_path: Path, reads: list[int], scattered: bool
) -> None:
    page, singles = 4096, [Block(n) for n in range(64)]
    engine = open_local(tmp_path / "s", 64, page_bytes=page)
    rig = Rig(engine, page)
    if scattered:  # the block then lies in several runs of slots, one a page
        rig.write(*singles)
        assert rig.delete(*singles[::2]) == 32
    rng = np.random.default_rng(5)
    memory = rng.integers(0, 256, 1 << 18, np.uint8)
    regions = [(n * 97, 79) for n in range(1500)]
    low, high = keymath.as_key("many")
    outcomes: list[Outcome] = []
    report = collect(outcomes)
    engine.write([BlockIO(low, high, Regions(memory, regions))], report)
    assert outcomes[-1] is Outcome.STORED
    where = engine.lookup.locate(engine.lookup.find_one(low, high), low, high)
    assert where is not None
    assert (len(where.runs) > 1) == scattered
    engine.close()
    del engine, rig
    forget_all(tmp_path / "s" / DATA)
    with opened(tmp_path / "s", page) as r:
        found = np.zeros_like(memory)
        block = BlockIO(low, high, Regions(found, regions))
        r.engine.read([block], report)
        assert outcomes[-1] is Outcome.LOADED
        assert all(np.array_equal(found[a : a + n], memory[a : a + n]) for a, n in regions)
        assert found.sum() == sum(int(memory[a : a + n].sum()) for a, n in regions)
    assert sum(reads) == 1500 * 79
    assert (len(reads) > 1) == scattered


def test_a_cold_read_stops_between_two_pieces(tmp_path: Path) -> None:
    page = 5 * MIB
    make(tmp_path / "s", [Block(1, 2)], page)
    asked = 0

    def stop(at: int) -> bool:
        nonlocal asked
        asked += 1
        return asked == 4

    with opened(tmp_path / "s", page) as r:
        assert r.read(Block(1, 2), stop=stop) == [Outcome.STOPPED]
        assert asked == 4  # the first time before the device was asked for anything
        assert r.read(Block(1, 2)) == [Outcome.LOADED]  # what was under way is not mistaken for it


@pytest.mark.usefixtures("all_cold")
def test_a_system_without_preadv_reads_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[int]
) -> None:
    blocks = [Block(n, 2) for n in range(8)]
    make(tmp_path / "s", blocks, 4096)
    monkeypatch.delattr(os, "preadv")
    with opened(tmp_path / "s", 4096) as r:
        assert r.read(*blocks[::2]) == [Outcome.LOADED] * 4
    assert not reads


@pytest.mark.usefixtures("all_cold")
def test_every_run_of_what_is_cold_is_planned_in_the_order_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[Span] = []
    monkeypatch.setattr(DirectReads, "plan", lambda _, spans, more: planned.extend(spans))

    def at(shard: int, *runs: tuple[int, int], nbytes: int) -> Location:
        return Location(0, shard, runs[0][0], 0, 0, nbytes, list(runs))

    engine = open_local(tmp_path / "s", 32, page_bytes=4096, shards=2)
    device = engine._reader._device
    blocks = [
        at(0, (0, 1), (4, 2), nbytes=9000),
        at(0, (6, 1), nbytes=4096),
        at(1, (11, 1), nbytes=4000),
    ]
    device.begin(list(enumerate(blocks)), never)
    first, other = engine.file(0), engine.file(1)
    assert planned == [
        first.past_cache((0, 1), 4096),
        first.past_cache((4, 2), 9000 - 4096),
        first.past_cache((6, 1), 4096),
        other.past_cache((11, 1), 4000),
    ]
    assert {span.descriptor for span in planned}.isdisjoint(
        {first.span((0, 1), 1).descriptor, other.span((0, 1), 1).descriptor}
    )
    engine.close()


@pytest.mark.parametrize("cold", [True, False])
def test_pages_are_touched_before_they_are_stored_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cold: bool
) -> None:
    make(tmp_path / "s", [Block(1, 4)], 4096)
    monkeypatch.setattr(page_cache, "hold_each", lambda addresses: [not cold] * len(addresses))
    seen: list[bool] = []

    def before_copies(_: object, places: list[Rows]) -> None:
        seen.extend(not place.memory.any() for place in places)

    monkeypatch.setattr("light_mem.engine.first_touch.FirstTouch.before_copies", before_copies)
    outcomes: list[Outcome] = []
    with opened(tmp_path / "s", 4096) as r:
        batch = [
            BlockIO(*keymath.as_key(key), Rows(np.zeros((4, 4096), np.uint8), np.arange(4)))
            for key in (1, 99)  # the second is not stored: its pages are let alone
        ]
        r.engine.read(batch, collect(outcomes))
    assert sorted(outcomes) == [Outcome.LOADED, Outcome.MISSING]
    assert seen == [True]


@pytest.mark.usefixtures("all_cold")
def test_in_a_shard_that_is_being_written_nothing_is_read_past_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While O_DIRECT reads from a file, a `pwrite` to it waits for the device."""
    now, direct = 1000.0, []
    monkeypatch.setattr("light_mem.engine.device_reads.time.monotonic", lambda: now)
    read = DirectReads.read

    def spy(self: DirectReads, span: Span, *rest: Any) -> None:
        direct.append(span.descriptor != data)
        read(self, span, *rest)

    monkeypatch.setattr(DirectReads, "read", spy)
    blocks = [Block(n, 2) for n in range(12)]
    make(tmp_path / "s", blocks, 4096)
    with opened(tmp_path / "s", 4096) as r:
        data = r.engine.file(0).span((0, 1), 1).descriptor  # type: ignore[attr-defined]
        assert r.read(blocks[0]) == [Outcome.LOADED]
        with opened(tmp_path / "s", 4096) as other:
            assert other.write(Block(100, 2)) == [COPIED_AND_STORED]
        assert r.read(blocks[-1]) == [Outcome.LOADED]
        now += 0.99
        assert r.read(blocks[-2]) == [Outcome.LOADED]
        now += 0.02
        assert r.read(blocks[-3]) == [Outcome.LOADED]
    assert direct == [True, False, False, True]


def test_another_store_that_lies_where_this_one_did_is_not_read(
    tmp_path: Path, reads: list[int]
) -> None:
    here, block = tmp_path / "s", Block(1, 4)
    make(here, [block], 4096)
    with opened(here, 4096, verify=False) as r:
        r.engine.file(0)  # type: ignore[attr-defined]
        here.rename(tmp_path / "moved")
        make(here, [Block(2, 4)], 4096)
        assert r.read(block) == [Outcome.LOADED]
    assert reads
