"""Blocks that are not in the page cache are read by system calls, and as right as the others."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from light_mem.engine import cold_reads
from light_mem.engine.base import BlockIO, Outcome
from light_mem.engine.cold_reads import ColdReads
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.places import Regions, Rows
from light_mem.engine.read_ahead import Span
from light_mem.index import keys as keymath
from tests.cached import can_forget, forget, forget_all
from tests.engine_helpers import COPIED_AND_STORED, Block, Rig, collect, open_local

MIB = 1 << 20
DATA = "shard-000.data"


@pytest.fixture(autouse=True)
def _cache_that_forgets(tmp_path: Path) -> None:
    if not can_forget(tmp_path):
        pytest.skip("this file system drops no pages")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the spans that were read cold."""
    found: list[int] = []
    read = ColdReads.read

    def spy(self: ColdReads, span: Span, *rest: Any) -> None:
        found.append(span.nbytes)
        read(self, span, *rest)

    monkeypatch.setattr(ColdReads, "read", spy)
    return found


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


def test_a_block_of_another_length_is_missing_and_not_begun(
    tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "s", [Block(1, 4), Block(2, 4)], 4096)
    monkeypatch.setattr(cold_reads.page_cache, "holds", lambda *_: False)
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
    assert not reads


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
    # More regions than a call takes buffers.
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


def test_a_cold_read_stops_between_two_calls(tmp_path: Path) -> None:
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


def test_who_writes_to_the_pages_meanwhile_makes_no_block_look_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "s", [Block(1, 4)], 4096)
    update, calls = os.preadv, 0

    def preadv(fd: int, buffers: Any, at: int, flags: int = 0) -> int:
        nonlocal calls
        done = update(fd, buffers, at, flags)
        if not flags:
            calls += 1
            buffers[0][7] ^= 1
        return done

    monkeypatch.setattr(cold_reads.os, "preadv", preadv)
    outcomes: list[Outcome] = []
    with opened(tmp_path / "s", 4096) as r:
        place = Rows(np.zeros((4, 4096), np.uint8), np.arange(4))
        r.engine.read(
            [BlockIO(*keymath.as_key(1), place)],
            collect(outcomes),
        )
        assert calls
        assert outcomes == [Outcome.LOADED]
        assert r.find(Block(1)) == [True]


@pytest.mark.parametrize("pages", [1, 5])
def test_a_short_read_is_finished_by_further_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pages: int
) -> None:
    make(tmp_path / "s", [Block(1, pages)], 4096)
    read, asked = os.preadv, []

    def preadv(fd: int, buffers: Any, at: int, flags: int = 0) -> int:
        """At most 2,048 bytes, then at most 5,000, ... : inside pages and at their ends."""
        asked.append(sum(map(len, buffers)))
        limit = 2048 if len(asked) % 2 else 5000
        part = np.empty(min(limit, asked[-1]), np.uint8)
        count = read(fd, [part], at, flags)
        done = 0
        for buffer in buffers:
            some = part[done : min(count, done + len(buffer))]
            buffer[: len(some)] = some
            done += len(some)
        return count

    monkeypatch.setattr(cold_reads.os, "preadv", preadv)
    with opened(tmp_path / "s", 4096) as r:
        assert r.read(Block(1, pages)) == [Outcome.LOADED]
    whole = pages * 4096
    assert asked == [left for n in range(9) for left in (whole - 7048 * n, whole - 7048 * n - 2048)
                     if left > 0]  # fmt: skip


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
    engine.file(0)  # asks the file system whether it has O_DIRECT, by reading
    read = os.preadv
    lost = engine.lookup.locate(engine.lookup.find_one(1, 0), 1, 0)
    assert lost is not None
    lost_at = engine.file(0).span(lost.runs[0], 1).at

    def preadv(fd: int, buffers: Any, at: int, flags: int = 0) -> int:
        if at == lost_at:
            raise OSError(error, os.strerror(error))
        return read(fd, buffers, at, flags)

    with monkeypatch.context() as m:
        m.setattr(cold_reads.os, "preadv", preadv)
        m.setattr(cold_reads.page_cache, "holds", lambda *_: False)
        r = Rig(engine, 4096)
        assert r.read(Block(1, 4), Block(2, 4)) == [outcome, Outcome.LOADED]
    dropped = outcome is Outcome.DAMAGED
    assert r.find(Block(1), Block(2)) == [not dropped, True]
    assert engine.stats()["damaged"] == dropped
    assert r.write(Block(1, 4)) == [COPIED_AND_STORED if dropped else (Outcome.PRESENT,)]
    assert r.read(Block(1, 4)) == [Outcome.LOADED]
    engine.close()


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

    monkeypatch.setattr(cold_reads.os, "preadv", preadv)
    monkeypatch.setattr(cold_reads.page_cache, "holds", lambda *_: False)
    with opened(tmp_path / "s", 4096, verify) as r:
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


def test_a_cold_block_speaks_for_the_next_ones_and_a_row_of_warm_ones_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: list[bool] = []
    asked: list[int] = []

    def holds(address: int, nbytes: int) -> bool:
        assert nbytes == 1
        asked.append(address)
        return answers.pop(0) if answers else True

    def look(times: int, nbytes: int = 100) -> tuple[list[bool], int]:
        """What is said of so many blocks, and how many were asked for."""
        before = len(asked)
        return [cold.is_cold(1000, nbytes) for _ in range(times)], len(asked) - before

    monkeypatch.setattr(cold_reads.page_cache, "holds", holds)
    cold = ColdReads()
    assert not cold.going_on
    answers.append(False)
    assert look(1) == ([True], 1)
    assert asked == [1099]
    assert cold.going_on
    # Sixteen MiB that may be on their way.
    assert look(18, MIB) == ([True] * 16 + [False] * 2, 18)
    assert not cold.going_on
    assert look(6) == ([False] * 6, 6)  # the last two were the first in the row
    assert look(8) == ([False] * 8, 0)
    assert look(9) == ([False] * 9, 1)
    answers += [True, True, False]
    assert look(3, MIB) == ([False, False, True], 3)


def test_the_device_is_told_of_the_next_blocks_unless_they_follow_the_one_before(
    tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [Block(n, 2) for n in range(12)]
    make(tmp_path / "s", blocks, 4096)
    told: list[tuple[int, int, int]] = []  # reads begun by then, first page, pages
    advise = os.posix_fadvise

    def note(fd: int, at: int, nbytes: int, advice: int) -> None:
        if advice == os.POSIX_FADV_WILLNEED:
            told.append((len(reads), (at - 4096) // 4096, nbytes // 4096))
        advise(fd, at, nbytes, advice)

    monkeypatch.setattr(cold_reads.page_cache, "holds", lambda *_: False)
    monkeypatch.setattr(cold_reads.os, "posix_fadvise", note)
    with opened(tmp_path / "s", 4096) as r:
        wanted = [blocks[n] for n in (11, 9, 0, 1, 2, 4, 5, 7)]  # in whatever order
        wanted[4:4] = [Block(98, 2), Block(99, 2)]  # which are not stored
        loaded = [Outcome.LOADED] * 8
        assert r.read(*wanted) == [*loaded[:4], Outcome.MISSING, Outcome.MISSING, *loaded[4:]]
        wanted[4:6] = []
        # Not before one is known to be cold, and three ahead of the one that is read.
        assert told == [(1, 8, 2), (2, 14, 2), (3, 18, 2), (4, 22, 2)]
        told.clear()
        monkeypatch.setattr(cold_reads, "_EXPECT_BYTES", 8192)
        assert r.read(*wanted) == [Outcome.LOADED] * 8
        assert not told


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
    monkeypatch.setattr(cold_reads.page_cache, "holds", lambda *_: False)
    wanted = [Outcome.FAILED if shard[b] else Outcome.LOADED for b in blocks]
    assert wanted.count(Outcome.LOADED) > 2
    assert Outcome.FAILED in wanted
    with opened(tmp_path / "s", 4096) as r:
        assert r.read(*blocks) == wanted


def test_what_the_device_is_told_ahead_cannot_fail_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [Block(n, 2) for n in range(8)]
    make(tmp_path / "s", blocks, 4096)
    monkeypatch.setattr(cold_reads.page_cache, "holds", lambda *_: False)

    def refuse(*_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with opened(tmp_path / "s", 4096) as r:
        with monkeypatch.context() as m:
            m.setattr(cold_reads.os, "posix_fadvise", refuse)
            assert r.read(*blocks[::2]) == [Outcome.LOADED] * 4
        assert r.read(*blocks[::2]) == [Outcome.LOADED] * 4


@pytest.mark.parametrize("lacking", ["posix_fadvise", "preadv"])
def test_a_system_without_the_calls_reads_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[int], lacking: str
) -> None:
    """macOS has preadv, but no posix_fadvise."""
    blocks = [Block(n, 2) for n in range(8)]
    make(tmp_path / "s", blocks, 4096)
    monkeypatch.setattr(cold_reads.page_cache, "holds", lambda *_: False)
    monkeypatch.delattr(os, lacking)
    with opened(tmp_path / "s", 4096) as r:
        assert r.read(*blocks[::2]) == [Outcome.LOADED] * 4
    assert bool(reads) == (lacking != "preadv")


def test_the_device_is_told_of_every_run_and_of_what_lies_in_another_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from light_mem.engine.reading import Reader
    from light_mem.index.lookup import Location

    told: list[Span] = []

    class Cold(ColdReads):
        def expect(self, span: Span) -> None:
            told.append(span)

    def at(shard: int, *runs: tuple[int, int], nbytes: int) -> Location:
        return Location(0, shard, runs[0][0], 0, 0, nbytes, list(runs))

    engine = open_local(tmp_path / "s", 32, page_bytes=4096, shards=2)
    reader: Reader = engine._reader
    ahead = [
        at(0, (0, 1), (4, 2), nbytes=9000),
        at(0, (6, 1), nbytes=4096),  # right after the last run of the one before
        at(0, (7, 1), (9, 2), nbytes=9000),  # after it as well, but not all of it
        at(1, (11, 1), nbytes=4096),  # the same number in another file
    ]
    assert reader._expect(Cold(), list(enumerate(ahead)), 1, 0) == 4
    first, other = engine.file(0), engine.file(1)
    assert told == [
        first.span((7, 1), 4096), first.span((9, 2), 9000 - 4096), other.span((11, 1), 4096)
    ]  # fmt: skip
    engine.close()


@pytest.mark.parametrize("cold", [True, False])
def test_pages_are_touched_before_they_are_stored_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cold: bool
) -> None:
    make(tmp_path / "s", [Block(1, 4)], 4096)
    monkeypatch.setattr(cold_reads.page_cache, "holds", lambda *_: not cold)
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
