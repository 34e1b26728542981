"""Blocks that are not in the page cache are read past it, and brought into it afterwards."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from light_mem import State
from light_mem.engine import bring_in, device_reads, page_cache, read_ahead, shard_file
from light_mem.engine.base import BlockIO, Outcome
from light_mem.engine.bring_in import BringIn
from light_mem.engine.copy import Copier
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
        monkeypatch.setattr(shard_file, "open_direct", lambda _: -1)
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
    monkeypatch.setattr(page_cache, "holds", lambda *_: False)


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


def rest(engine: Any) -> int:
    """Let an engine do all that can wait; in how many steps."""
    steps = 0
    while engine.rest():
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
        # The first one is surely asked for, and then all are.
        cold = [where[n] for n in (0, 3, 4, 5, 6, 22)]
        start = r.engine.file(0).address(0)  # type: ignore[attr-defined]
        ends = {start + w.slot * 4096 + w.nbytes - 1 for w in cold}
        monkeypatch.setattr(page_cache, "holds", lambda address, _: address not in ends)
        assert r.read(*blocks[::-1]) == [Outcome.LOADED] * 24
    assert reads == [w.nbytes for w in cold]


@pytest.mark.usefixtures("_all_cold")
def test_a_block_of_another_length_is_missing_and_not_begun(
    tmp_path: Path, reads: list[int]
) -> None:
    make(tmp_path / "s", [Block(1, 4), Block(2, 4)], 4096)
    with opened(tmp_path / "s", 4096) as r:
        wanted = [Outcome.MISSING, Outcome.LOADED, Outcome.MISSING]
        assert r.read(Block(1, 2), Block(2, 4), Block(1, 5)) == wanted
    assert reads == [4 * 4096]


def test_what_is_in_the_page_cache_goes_through_the_mapping(
    tmp_path: Path, reads: list[int]
) -> None:
    blocks = [Block(n, 4) for n in range(6)]
    make(tmp_path / "s", blocks, 4096)
    (tmp_path / "s" / DATA).read_bytes()
    with opened(tmp_path / "s", 4096) as r:
        assert r.read(*blocks) == [Outcome.LOADED] * 6
        assert not rest(r.engine) > r.engine.geometry.shards  # nothing but the shards to open
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
        return asked == 3

    with opened(tmp_path / "s", page) as r:
        assert r.read(Block(1, 2), stop=stop) == [Outcome.STOPPED]
        assert asked == 3
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
    put, calls = Copier._put, 0

    def scribble(self: Copier, memory: Any, rows: Any, source: Any) -> None:
        nonlocal calls
        put(self, memory, rows, source)
        calls += 1
        memory[rows[0], 7] ^= 1

    monkeypatch.setattr(Copier, "_put", scribble)
    outcomes: list[Outcome] = []
    with opened(tmp_path / "s", 4096) as r:
        place = Rows(np.zeros((8, 4096), np.uint8), np.arange(0, 8, 2))
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
        m.setattr(page_cache, "holds", lambda *_: False)
        r = Rig(engine, 4096)
        assert r.read(Block(1, 4), Block(2, 4)) == [outcome, Outcome.LOADED]
        rest(engine)  # what cannot be brought in harms nothing
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
    monkeypatch.setattr(page_cache, "holds", lambda *_: False)
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

    def refuse(self: DirectReads, spans: list[Span]) -> None:
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


def test_of_short_blocks_some_are_asked_for_and_all_where_one_is_cold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = [Block(n, 2) for n in range(10)]
    engine = open_local(tmp_path / "s", 20, page_bytes=4096)
    assert Rig(engine, 4096).write(*short) == [COPIED_AND_STORED] * 10
    asked: list[int] = []
    cold: set[int] = set()

    def holds(address: int, nbytes: int) -> bool:
        assert nbytes == 1
        slot, byte = divmod(address - engine.file(0).address(0), 4096)
        assert byte == 4095  # the last one of a block
        asked.append(slot // 2)
        return slot // 2 not in cold

    monkeypatch.setattr(page_cache, "holds", holds)
    device = engine._reader._device
    blocks = list(enumerate(located(engine, short)))

    def look(blocks: list[tuple[int, Location]]) -> tuple[list[int], list[int]]:
        asked.clear()
        device.begin(blocks)
        return asked[:], [at for at, _ in blocks if device.waits_for(at)]

    assert look(blocks) == ([0, 4, 8, 9], [])
    cold = {1}
    assert look(blocks) == ([0, 4, 8, 9], [])  # read by faults, for once
    cold = {1, 9}
    assert look(blocks) == ([0, 4, 8, 9, *range(10)], [1, 9])
    assert look(blocks[1:2]) == ([1], [1])
    monkeypatch.setattr(device_reads, "_ASK_ALWAYS_BYTES", 8192)
    assert look(blocks) == (list(range(10)), [1, 9])
    monkeypatch.undo()
    engine.close()


def located(engine: LocalStorageEngine, blocks: list[Block]) -> list[Location]:
    """Where blocks lie, in the order of the file."""
    found = [engine.lookup.locate(engine.lookup.find_one(b.key, 0), b.key, 0) for b in blocks]
    return sorted((where for where in found if where is not None), key=lambda where: where.slot)


@pytest.mark.usefixtures("_all_cold")
def test_every_run_of_what_is_cold_is_planned_in_the_order_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[Span] = []
    monkeypatch.setattr(DirectReads, "plan", lambda _, spans: planned.extend(spans))

    def at(shard: int, *runs: tuple[int, int], nbytes: int) -> Location:
        return Location(0, shard, runs[0][0], 0, 0, nbytes, list(runs))

    engine = open_local(tmp_path / "s", 32, page_bytes=4096, shards=2)
    device = engine._reader._device
    blocks = [
        at(0, (0, 1), (4, 2), nbytes=9000),
        at(0, (6, 1), nbytes=4096),
        at(1, (11, 1), nbytes=4000),
    ]
    device.begin(list(enumerate(blocks)))
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
    monkeypatch.setattr(page_cache, "holds", lambda *_: not cold)
    seen: list[bool] = []

    def before_stores(_: object, places: list[Rows]) -> None:
        seen.extend(not place.memory.any() for place in places)

    monkeypatch.setattr("light_mem.engine.first_touch.FirstTouch.before_stores", before_stores)
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
        rest(r.engine)
        assert r.read(blocks[1]) == [Outcome.LOADED]
        assert not cached(tmp_path / "s" / DATA).any()  # the device was asked for this block alone
        assert rest(r.engine) == 2  # 1.5 MiB
        there = cached(tmp_path / "s" / DATA)
        where = located(r.engine, [blocks[1]])[0]  # type: ignore[arg-type]
        first = 1 + where.slot * page // 4096
        assert there[first : first + 3 * page // 4096].all()
        assert reads == [3 * page]
        assert r.read(blocks[1]) == [Outcome.LOADED]
        assert reads == [3 * page]  # from the page cache
        assert not rest(r.engine)


def test_without_o_direct_what_was_read_is_in_the_page_cache_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[int]
) -> None:
    monkeypatch.setattr(shard_file, "open_direct", lambda _: -1)
    make(tmp_path / "s", [Block(1, 4)], 4096)
    with opened(tmp_path / "s", 4096) as r:
        rest(r.engine)
        assert r.read(Block(1, 4)) == [Outcome.LOADED]
        assert cached(tmp_path / "s" / DATA)[1:5].all()
        assert not rest(r.engine)
    assert reads


def test_what_was_read_last_is_brought_in_and_an_error_ends_a_span() -> None:
    pieces: list[tuple[int, int]] = []
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, 4 * MIB)
    later = BringIn(limit=3 * MIB)
    read = os.preadv

    def preadv(fd: int, buffers: Any, at: int) -> int:
        pieces.append((at, sum(map(len, buffers))))
        if at == 2 * MIB:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(fd, buffers, at)

    for at, nbytes in ((0, MIB), (MIB, MIB // 2), (3 * MIB, 2 * MIB), (2 * MIB, MIB)):
        later.add(Span(descriptor, at, nbytes))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(bring_in.os, "preadv", preadv)
        steps = 0
        while later.next():
            steps += 1
    # The first two were too many; the third one's second half lies behind the end of the file.
    assert pieces == [(3 * MIB, MIB), (4 * MIB, MIB), (2 * MIB, MIB)]
    assert steps == 3
    later.add(Span(descriptor, 0, MIB))
    later.clear()
    assert not later.next()
    os.close(descriptor)


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
