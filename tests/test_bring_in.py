"""What was read past the page cache is brought into it once there is nothing else to do."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from light_mem import State
from light_mem.engine import bring_in as bringing
from light_mem.engine import shard_file
from light_mem.engine.base import Outcome
from light_mem.engine.bring_in import BringIn
from light_mem.engine.read_ahead import Span
from tests.cached import cached, forget_all
from tests.cold_rig import DATA, MIB, bring_in, cache_that_forgets, located, make, opened, reads
from tests.conftest import wait_until
from tests.engine_helpers import Block
from tests.service_rig import rig

__all__ = ["cache_that_forgets", "reads"]  # fixtures


def test_a_cold_block_is_in_the_page_cache_once_there_is_nothing_else_to_do(
    tmp_path: Path, reads: list[int]
) -> None:
    blocks = [Block(n, 3) for n in range(4)]
    page = MIB // 2
    make(tmp_path / "s", blocks, page)
    with opened(tmp_path / "s", page) as r:
        assert r.read(blocks[1]) == [Outcome.LOADED]
        assert not cached(tmp_path / "s" / DATA)[1:].any()  # but for the header: asked for alone
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
            assert not cached(tmp_path / "s" / DATA)[1:].any()  # but for the header
            assert r.read(*blocks) == [Outcome.LOADED] * 4
        assert cached(tmp_path / "s" / DATA)[1:].all()
        assert not r.engine.has_later  # type: ignore[attr-defined]
        assert len(reads) == 8
        assert r.read(*blocks) == [Outcome.LOADED] * 4
    assert len(reads) == 8


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
