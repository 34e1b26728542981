"""Blocks that are not in the page cache are read past it, and brought into it afterwards."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from light_mem import State
from light_mem.engine import bring_in as bringing
from light_mem.engine import copy_loops, page_cache, read_ahead, shard_file
from light_mem.engine.base import BlockIO, Outcome, never
from light_mem.engine.bring_in import BringIn
from light_mem.engine.direct_reads import DirectReads
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.places import Regions, Rows
from light_mem.engine.read_ahead import Span
from light_mem.index import keys as keymath
from light_mem.index.lookup import Location
from tests.cached import cached, can_forget, forget, forget_all
from tests.conftest import wait_until
from tests.engine_helpers import COPIED_AND_STORED, Block, Rig, collect, open_local
from tests.service_rig import rig

MIB = 1 << 20
DATA = "shard-000.data"


@pytest.fixture(autouse=True)
def _cache_that_forgets(tmp_path: Path) -> None:
    if not can_forget(tmp_path):
        pytest.skip("this file system drops no pages")


@pytest.fixture(params=["O_DIRECT", "without O_DIRECT"])
def direct(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system has O_DIRECT."""
    has: bool = request.param == "O_DIRECT"
    if not has:
        monkeypatch.setattr(shard_file, "open_direct", lambda *_: -1)
    return has


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the spans that a device was waited for."""
    found: list[int] = []
    read = DirectReads.read

    def spy(self: DirectReads, span: Span, *rest: Any) -> None:
        found.append(span.nbytes)
        read(self, span, *rest)

    monkeypatch.setattr(DirectReads, "read", spy)
    return found


@pytest.fixture
def _all_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "hold_each", lambda addresses: [False] * len(addresses))


def make(directory: Path, blocks: list[Block], page_bytes: int) -> None:
    """A store of these blocks, none of them in the page cache."""
    pages = sum(block.pages for block in blocks)
    engine = open_local(directory, pages, page_bytes=page_bytes)
    assert Rig(engine, page_bytes).write(*blocks) == [COPIED_AND_STORED] * len(blocks)
    engine.close()
    del engine  # with its mappings: mapped pages stay
    forget_all(directory / DATA)


@contextmanager
def opened(directory: Path, page_bytes: int, verify: bool = True) -> Iterator[Rig]:
    engine = LocalStorageEngine(directory, kind="worker", verify=verify)
    yield Rig(engine, page_bytes)
    engine.close()


def bring_in(engine: Any) -> int:
    """Let an engine do all that can wait; in how many steps."""
    steps = 0
    while engine.bring_in():
        steps += 1
    return steps


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


@pytest.mark.usefixtures("_all_cold")
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


@pytest.mark.usefixtures("_all_cold", "direct")
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


@pytest.mark.usefixtures("direct")
def test_a_flipped_bit_on_the_device_is_damage(tmp_path: Path, reads: list[int]) -> None:
    make(tmp_path / "s", [Block(1, 4), Block(2, 4)], 4096)
    with (tmp_path / "s" / DATA).open("r+b") as file:
        file.seek(4096 + 5000)
        byte = file.read(1)[0]
        file.seek(4096 + 5000)
        file.write(bytes([byte ^ 4]))
    forget_all(tmp_path / "s" / DATA)
    with opened(tmp_path / "s", 4096) as r:
        outcomes = {r.read(block)[0] for block in (Block(1, 4), Block(2, 4))}
        assert outcomes == {Outcome.DAMAGED, Outcome.LOADED}
        assert sum(r.find(Block(1), Block(2))) == 1
    assert reads


@pytest.mark.usefixtures("_all_cold")
def test_who_writes_to_the_pages_meanwhile_makes_no_block_look_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "s", [Block(1, 4)], 4096)
    memory, calls = np.zeros((8, 4096), np.uint8), 0

    def scribble(steps: copy_loops.Steps) -> None:
        nonlocal calls
        for _, put, rows, elements, piece, update in steps:
            put(rows, elements)
            memory[rows[0], 7] ^= 1
            update(piece)
            calls += 1

    for loop in ("scatter_small_rows", "scatter_rows"):  # which, the processor decides
        monkeypatch.setattr(copy_loops, loop, scribble)
    outcomes: list[Outcome] = []
    with opened(tmp_path / "s", 4096) as r:
        place = Rows(memory, np.arange(0, 8, 2))
        r.engine.read([BlockIO(*keymath.as_key(1), place)], collect(outcomes))
        assert calls
        assert outcomes == [Outcome.LOADED]
        assert r.find(Block(1)) == [True]


@pytest.mark.parametrize("policy", ["keep", "drop"])
@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (errno.EIO, Outcome.DAMAGED),
        (errno.ENODATA, Outcome.DAMAGED),
        (errno.ENOMEM, Outcome.FAILED),
    ],
)
def test_a_block_that_the_device_has_lost_is_dropped_and_can_be_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, error: int, outcome: Outcome
) -> None:
    make(tmp_path / "s", [Block(1, 4), Block(2, 4)], 4096)
    engine = LocalStorageEngine(tmp_path / "s", kind="worker", page_cache=policy)
    engine.file(0).past_cache((0, 1), 1)  # asks the file system for O_DIRECT, by reading
    read = os.preadv
    lost = engine.lookup.locate(engine.lookup.find_one(1, 0), 1, 0)
    assert lost is not None
    lost_at = engine.file(0).span(lost.runs[0], 1).at

    def preadv(fd: int, buffers: Any, at: int, flags: int = 0) -> int:
        if at == lost_at:
            raise OSError(error, os.strerror(error))
        return read(fd, buffers, at, flags)

    with monkeypatch.context() as m:
        m.setattr(read_ahead.os, "preadv", preadv)
        m.setattr(page_cache, "hold_each", lambda addresses: [False] * len(addresses))
        r = Rig(engine, 4096)
        assert r.read(Block(1, 4), Block(2, 4)) == [outcome, Outcome.LOADED]
        bring_in(engine)  # what cannot be brought in harms nothing
    dropped = outcome is Outcome.DAMAGED
    assert r.find(Block(1), Block(2)) == [not dropped, True]
    assert engine.stats()["damaged"] == dropped
    assert r.write(Block(1, 4)) == [COPIED_AND_STORED if dropped else (Outcome.PRESENT,)]
    assert r.read(Block(1, 4)) == [Outcome.LOADED]
    engine.close()


@pytest.mark.usefixtures("_all_cold")
@pytest.mark.parametrize("verify", [True, False])
def test_a_block_whose_slots_another_gets_while_it_is_on_its_way_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    make(tmp_path / "s", [Block(1, 4)], 4096)
    other = Rig(open_local(tmp_path / "s", 4, page_bytes=4096), 4096)
    read, late = os.preadv, [False, True]

    def preadv(fd: int, buffers: Any, at: int, flags: int = 0) -> int:
        took_over = other.write(Block(2, 4)) if late.pop() else None
        done = read(fd, buffers, at, flags)
        if took_over is None:
            took_over = other.write(Block(1, 4))
        assert took_over == [COPIED_AND_STORED]
        return done

    with opened(tmp_path / "s", 4096, verify) as r:
        r.engine.file(0).past_cache((0, 1), 1)  # type: ignore[attr-defined]
        monkeypatch.setattr(read_ahead.os, "preadv", preadv)
        assert r.read(Block(1, 4)) == [Outcome.LOST]  # its slots were taken before the bytes came
        assert r.read(Block(2, 4)) == [Outcome.LOST]  # ... and after
    other.engine.close()
    assert not late


@pytest.mark.usefixtures("_all_cold")
def test_an_error_for_slots_that_another_has_by_now_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "s", [Block(1, 4)], 4096)
    other = Rig(open_local(tmp_path / "s", 4, page_bytes=4096), 4096)

    def preadv(fd: int, buffers: Any, at: int, flags: int = 0) -> int:
        if other.find(Block(1)) == [True]:
            assert other.write(Block(2, 4)) == [COPIED_AND_STORED]
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with opened(tmp_path / "s", 4096) as r:
        r.engine.file(0).past_cache((0, 1), 1)  # type: ignore[attr-defined]
        with monkeypatch.context() as m:
            m.setattr(read_ahead.os, "preadv", preadv)
            assert r.read(Block(1, 4)) == [Outcome.LOST]
        assert r.engine.stats()["damaged"] == 0
        assert r.read(Block(2, 4)) == [Outcome.LOADED]
    other.engine.close()


def test_a_file_cut_short_is_an_error_and_no_bus_error(tmp_path: Path, reads: list[int]) -> None:
    make(tmp_path / "s", [Block(1, 4)], 4096)
    with opened(tmp_path / "s", 4096) as r:
        r.engine.file(0)  # type: ignore[attr-defined]  # mapped while it was whole
        os.truncate(tmp_path / "s" / DATA, 3 * 4096)
        assert r.read(Block(1, 4)) == [Outcome.FAILED]
    assert reads == [4 * 4096]


def test_a_shard_that_cannot_be_opened_spoils_no_block_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_local(tmp_path / "s", 24, page_bytes=4096, shards=2)
    blocks = [Block(n, 2) for n in range(12)]
    assert Rig(engine, 4096).write(*blocks) == [COPIED_AND_STORED] * 12
    shard = {b: engine.lookup.find_one(b.key, 0) // engine.geometry.slots for b in blocks}
    engine.close()
    del engine
    os.truncate(tmp_path / "s" / "shard-001.data", 2 * 4096)
    monkeypatch.setattr(page_cache, "hold_each", lambda addresses: [False] * len(addresses))
    wanted = [Outcome.FAILED if shard[b] else Outcome.LOADED for b in blocks]
    assert wanted.count(Outcome.LOADED) > 2
    assert Outcome.FAILED in wanted
    with opened(tmp_path / "s", 4096) as r:
        assert r.read(*blocks) == wanted


@pytest.mark.usefixtures("_all_cold")
def test_a_plan_that_fails_fails_no_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [Block(n, 2) for n in range(8)]
    make(tmp_path / "s", blocks, 4096)
    plan, failed = DirectReads.plan, []

    def refuse(self: DirectReads, spans: list[Span], more: bool) -> None:
        if not failed:
            failed.append(spans)
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        plan(self, spans)

    monkeypatch.setattr(DirectReads, "plan", refuse)
    with opened(tmp_path / "s", 4096) as r:
        assert r.read(*blocks[::2]) == [Outcome.LOADED] * 4
    assert failed


@pytest.mark.usefixtures("_all_cold")
def test_a_system_without_preadv_reads_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[int]
) -> None:
    blocks = [Block(n, 2) for n in range(8)]
    make(tmp_path / "s", blocks, 4096)
    monkeypatch.delattr(os, "preadv")
    with opened(tmp_path / "s", 4096) as r:
        assert r.read(*blocks[::2]) == [Outcome.LOADED] * 4
    assert not reads


def located(engine: LocalStorageEngine, blocks: list[Block]) -> list[Location]:
    """Where blocks lie, in the order of the file."""
    found = [engine.lookup.locate(engine.lookup.find_one(b.key, 0), b.key, 0) for b in blocks]
    return sorted((where for where in found if where is not None), key=lambda where: where.slot)


@pytest.mark.usefixtures("_all_cold")
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


# --- bringing in ----------------------------------------------------------------------------------


def test_a_cold_block_is_in_the_page_cache_once_there_is_nothing_else_to_do(
    tmp_path: Path, reads: list[int]
) -> None:
    blocks = [Block(n, 3) for n in range(4)]
    page = MIB // 2
    make(tmp_path / "s", blocks, page)
    with opened(tmp_path / "s", page) as r:
        assert r.read(blocks[1]) == [Outcome.LOADED]
        assert not cached(tmp_path / "s" / DATA).any()  # the device was asked for this block alone
        assert bring_in(r.engine) > 1
        assert not r.engine.has_later  # type: ignore[attr-defined]
        there = cached(tmp_path / "s" / DATA)
        where = located(r.engine, [blocks[1]])[0]  # type: ignore[arg-type]
        first = 1 + where.slot * page // 4096
        assert there[first : first + 3 * page // 4096].all()
        assert reads == [3 * page]
        assert r.read(blocks[1]) == [Outcome.LOADED]
        assert reads == [3 * page]  # from the page cache
        assert not bring_in(r.engine)


def test_without_o_direct_what_was_read_is_in_the_page_cache_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[int]
) -> None:
    monkeypatch.setattr(shard_file, "open_direct", lambda *_: -1)
    make(tmp_path / "s", [Block(1, 4)], 4096)
    with opened(tmp_path / "s", 4096) as r:
        assert r.read(Block(1, 4)) == [Outcome.LOADED]
        assert cached(tmp_path / "s" / DATA)[1:5].all()
        assert not bring_in(r.engine)
    assert reads


def test_a_block_that_is_read_cold_again_comes_through_the_page_cache(
    tmp_path: Path, reads: list[int]
) -> None:
    """Where a worker never rests, nothing is brought in."""
    blocks = [Block(n, 4) for n in range(4)]
    make(tmp_path / "s", blocks, 64 << 10)
    with opened(tmp_path / "s", 64 << 10) as r:
        for _ in range(2):
            assert not cached(tmp_path / "s" / DATA).any()
            assert r.read(*blocks) == [Outcome.LOADED] * 4
        assert cached(tmp_path / "s" / DATA)[1:].all()
        assert not r.engine.has_later  # type: ignore[attr-defined]
        assert len(reads) == 8
        assert r.read(*blocks) == [Outcome.LOADED] * 4
    assert len(reads) == 8


@pytest.mark.usefixtures("_all_cold")
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


def test_a_closed_engine_reads_nothing_more_and_has_no_threads(tmp_path: Path) -> None:
    make(tmp_path / "s", [Block(1, 4)], MIB)
    with opened(tmp_path / "s", MIB) as r:
        assert r.read(Block(1, 4)) == [Outcome.LOADED]
        assert r.engine.has_later  # type: ignore[attr-defined]
        assert any(thread.name.startswith("lightmem-read") for thread in threading.enumerate())
        held = r.engine._reader._device._later  # type: ignore[attr-defined]
    assert not held
    assert not any(thread.name.startswith("lightmem-read") for thread in threading.enumerate())


@contextmanager
def pieces(
    error_at: int = -1, seconds: float = 0.0, most: int = 1 << 40
) -> Iterator[tuple[list[tuple[int, int]], int]]:
    """The pieces that are brought in, as (start, bytes), and a file of 4 MiB. A call takes so many
    seconds of a clock that stands still otherwise, and gives no more bytes than `most`."""
    asked: list[tuple[int, int]] = []
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, 4 * MIB)
    read, now = os.preadv, 50.0

    def preadv(fd: int, buffers: Any, at: int) -> int:
        nonlocal now
        now += seconds
        asked.append((at, len(buffers[0])))
        if at == error_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(fd, [buffers[0][:most]], at)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(bringing.os, "preadv", preadv)
        m.setattr(bringing.time, "monotonic", lambda: now)
        yield asked, descriptor
    os.close(descriptor)


KIB = 1 << 10


def test_pieces_grow_while_they_take_no_time() -> None:
    with pieces() as (asked, descriptor):
        later = BringIn()
        later.add(Span(descriptor, 4096, 3 * MIB))
        later.add(Span(descriptor, 0, 4096))
        while later.next():
            pass
        lengths = [128 * KIB, 256 * KIB, 512 * KIB, MIB, MIB, 128 * KIB, 4096]
        starts = [4096 + sum(lengths[:n]) for n in range(6)] + [0]
        assert asked == list(zip(starts, lengths, strict=True))
        assert not later


def test_pieces_shrink_where_they_take_long_and_a_device_that_is_too_slow_is_left_alone() -> None:
    with pieces(seconds=0.003) as (asked, descriptor):
        later = BringIn()
        later._piece_bytes = 512 * KIB
        later.add(Span(descriptor, 0, 2 * MIB))
        for _ in range(4):
            assert later.next()
        assert [nbytes for _, nbytes in asked] == [512 * KIB, 256 * KIB, 128 * KIB, 128 * KIB]
        assert later
    with pieces(seconds=0.03) as (asked, descriptor):
        later = BringIn()
        later.add(Span(descriptor, 0, 2 * MIB))
        later.add(Span(descriptor, 3 * MIB, MIB))
        assert later.next()
        assert not later
        assert not later.next()
        assert len(asked) == 1


def test_a_short_read_goes_on_where_it_ended_and_an_error_ends_a_span() -> None:
    with pieces(error_at=2 * MIB, most=100_000) as (asked, descriptor):
        later = BringIn()
        later.add(Span(descriptor, 2 * MIB, MIB))
        later.add(Span(descriptor, 0, 250_000))
        later.add(Span(descriptor, 4 * MIB, 5000))  # behind the end of the file
        while later.next():
            pass
        assert [at for at, _ in asked] == [2 * MIB, 0, 100_000, 200_000, 4 * MIB]


def test_what_was_read_last_is_brought_in_and_each_span_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pieces() as (asked, descriptor):
        later = BringIn(limit=3 * MIB)
        for at in (0, MIB, 2 * MIB, 0, 3 * MIB):  # the second one is too much, the first was again
            later.add(Span(descriptor, at, MIB))
        assert later.take(Span(descriptor, 2 * MIB, MIB))
        assert not later.take(Span(descriptor, 2 * MIB, MIB))
        while later.next():
            pass
        assert sorted({at // MIB for at, _ in asked}) == [0, 3]
        assert later._nbytes == 0
        monkeypatch.setattr(bringing, "LIMIT_SPANS", 3)
        for at in range(5):
            later.add(Span(descriptor, at, 1))
        asked.clear()
        while later.next():
            pass
        assert [at for at, _ in asked] == [2, 3, 4]


def test_without_memory_nothing_is_brought_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise MemoryError

    with pieces() as (asked, descriptor):
        later = BringIn()
        later.add(Span(descriptor, 0, MIB))
        monkeypatch.setattr(bringing.np, "empty", none)
        assert later.next()
        assert not later.next()
        assert not asked


@pytest.mark.parametrize("policy", ["keep", "drop"])
def test_a_started_service_reads_what_is_cold_and_its_workers_bring_it_in(
    tmp_path: Path, policy: str
) -> None:
    keys, data = list(range(24)), tmp_path / "store" / DATA
    with rig(tmp_path, workers=2) as r:
        r.write(keys, keys)
    del r  # with its mappings: mapped pages stay
    forget_all(data)
    with rig(tmp_path, workers=2, page_cache=policy) as r:
        pages = keys[::-1]
        task = r.read(keys, pages)
        assert task.state() == [State.Finished] * 24
        assert all(r.holds(key, [page]) for key, page in zip(keys, pages, strict=True))

        def all_there() -> bool:
            return int(cached(data).sum()) >= 24

        if policy == "keep":
            wait_until(all_there)
        else:
            r.read(keys, pages)  # a worker that is asked again has rested since
            assert not all_there()
        assert not r.service.check().damaged
