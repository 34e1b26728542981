"""Writes past the page cache: every byte where it belongs, and nothing told before it is there."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from light_mem.engine import copy, direct_writes, page_cache
from light_mem.engine.base import Outcome
from light_mem.engine.direct_writes import LEAST_BYTES
from light_mem.engine.dropping import Dropper
from light_mem.engine.pieces import PIECE_BYTES
from light_mem.engine.read_ahead import ALIGN, Span
from tests.cached import cached
from tests.direct_rig import MIB, File, direct, file, put
from tests.dropping_rig import in_cache, open_dropping
from tests.engine_helpers import COPIED_AND_STORED, Block

__all__ = ["direct", "file"]  # fixtures


@pytest.mark.parametrize("seed", range(6))
def test_every_byte_lies_where_it_belongs_and_none_beside_it(file: File, seed: int) -> None:
    rng = np.random.default_rng(seed)
    dropper = Dropper()
    sizes = [64, 3840, 4096, 40_000, 61440, 61441, PIECE_BYTES, PIECE_BYTES + 5, 3 * MIB // 2]
    at = int(rng.integers(0, 3 * ALIGN))
    for n in range(200):
        row_bytes = int(rng.choice(sizes))
        rows = int(rng.integers(1, max(2, 2 * MIB // row_bytes // 4)))
        if at + rows * row_bytes > len(file.wanted):
            break
        put(dropper, file, at, row_bytes, rows, 100 * seed + n)
        at += rows * row_bytes
        if rng.random() < 0.3:  # a gap: what lies there is another's
            at += int(rng.integers(1, 2 * ALIGN))
        if rng.random() < 0.2:
            dropper.land(dropper.cut())
    dropper.land(dropper.cut())
    assert np.array_equal(np.fromfile(file.path, np.uint8), file.wanted)
    dropper.finish()
    assert np.array_equal(np.fromfile(file.path, np.uint8), file.wanted)


def requests(monkeypatch: pytest.MonkeyPatch) -> list[Span]:
    """What is handed to the device from now on."""
    made: list[Span] = []
    store = direct_writes._store

    def note(data: Any, span: Span, direct: int) -> bool:
        made.append(span)
        return store(data, span, direct)

    monkeypatch.setattr(direct_writes, "_store", note)
    return made


def test_blocks_that_follow_each_other_go_together(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = requests(monkeypatch)
    dropper = Dropper()
    for n in range(16):
        put(dropper, file, 100 + n * 64 * 3840, 3840, 64, n)
    dropper.land(dropper.cut())
    total = 16 * 64 * 3840
    assert len(made) == -(-total // (4 * 64 * 3840))  # four fill a buffer
    assert sum(span.nbytes for span in made) >= total - 2 * ALIGN
    assert all(span.at % ALIGN == span.nbytes % ALIGN == 0 for span in made)
    dropper.land(dropper.cut())
    dropper.finish()
    assert np.array_equal(np.fromfile(file.path, np.uint8), file.wanted)


def test_little_goes_through_the_page_cache(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    made = requests(monkeypatch)
    dropper = Dropper()
    put(dropper, file, 0, 4096, LEAST_BYTES // 4096 - 1, 1)
    put(dropper, file, MIB, 4096, LEAST_BYTES // 4096, 2)
    dropper.land(dropper.cut())
    assert [(span.at, span.nbytes) for span in made] == [(MIB, LEAST_BYTES)]
    assert cached(file.path).sum() == LEAST_BYTES // mmap.PAGESIZE - 1
    dropper.finish()
    assert not cached(file.path).any()


def test_what_was_written_is_not_in_the_page_cache(tmp_path: Path) -> None:
    r = open_dropping(tmp_path / "store", 64, 64 << 10)
    assert r.write(*[Block(n, 2) for n in range(32)]) == [COPIED_AND_STORED] * 32
    assert in_cache(tmp_path / "store") == 0  # before the worker rests
    assert r.read(*[Block(n, 2) for n in range(32)]) == [Outcome.LOADED] * 32
    r.engine.close()


def test_blocks_are_told_copied_before_and_stored_after_the_device_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = open_dropping(tmp_path / "store", 16, 64 << 10)
    go, store = threading.Event(), direct_writes._store

    def wait(*args: Any) -> bool:
        assert go.wait(30)
        return store(*args)

    monkeypatch.setattr(direct_writes, "_store", wait)
    told: list[Outcome] = []

    def report(positions: Sequence[int], outcome: Outcome) -> None:
        told.extend([outcome] * len(positions))
        if told == [Outcome.COPIED] * 4:
            assert not r.engine.find(np.array([block[:2] for block in batch], np.uint64)).any()
            assert (r.engine.file(0).records["tag"] == 0).all()
            go.set()

    batch = r._batch([Block(n, 4) for n in range(4)], fill=True)
    r.engine.write(batch, report)
    assert told == [Outcome.COPIED] * 4 + [Outcome.STORED] * 4
    assert r.read(*[Block(n, 4) for n in range(4)]) == [Outcome.LOADED] * 4
    r.engine.close()


def test_a_stopped_block_takes_no_neighbour_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy, "_ROUND_STEPS", 1)
    r = open_dropping(tmp_path / "store", 96, 3840 * 64)
    blocks = [Block(n, 8) for n in range(12)]  # each of four pieces
    asked = [0] * 12

    def stop(at: int) -> bool:
        asked[at] += 1
        return at in (3, 7) and asked[at] >= 3

    outcomes = r.write(*blocks, stop=stop)
    assert [o for o in outcomes if o != COPIED_AND_STORED] == [(Outcome.STOPPED,)] * 2
    assert outcomes[3] == outcomes[7] == (Outcome.STOPPED,)
    left = [block for n, block in enumerate(blocks) if n not in (3, 7)]
    assert r.read(*left) == [Outcome.LOADED] * 10
    assert r.write(blocks[3], blocks[7]) == [COPIED_AND_STORED] * 2
    assert r.read(*blocks) == [Outcome.LOADED] * 12
    r.engine.close()


def test_pages_that_blocks_share_are_written_when_nothing_is_under_way(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel cannot drop what is written to meanwhile, and would keep what lies beside it."""
    under_way = 0
    guard = threading.Lock()
    store, start = direct_writes._store, page_cache.start_write_out

    def count(*args: Any) -> bool:
        nonlocal under_way
        with guard:
            under_way += 1
        past_cache = store(*args)
        with guard:
            under_way -= 1
        return past_cache

    edges: list[tuple[int, int]] = []

    def note(descriptor: int, at: int, nbytes: int) -> None:
        edges.append((at, nbytes))
        assert under_way == 0
        start(descriptor, at, nbytes)

    monkeypatch.setattr(direct_writes, "_store", count)
    monkeypatch.setattr(page_cache, "start_write_out", note)
    dropper = Dropper()
    for n in range(4):
        put(dropper, file, 10 + n * 4 * MIB, 61440, 32, n)
    dropper.land(dropper.cut())
    assert len(edges) == 8
    assert {(at % ALIGN, nbytes) for at, nbytes in edges} == {(10, ALIGN - 10), (0, 10)}
    dropper.finish()
    assert np.array_equal(np.fromfile(file.path, np.uint8), file.wanted)


def test_pages_that_blocks_share_wait_for_the_requests_of_other_groups_too(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropper = Dropper()
    store, start = direct_writes._store, page_cache.start_write_out
    go, ended = threading.Event(), threading.Event()

    def wait(data: Any, span: Span, direct: int) -> bool:
        if span.at >= 8 * MIB:  # of the second cut
            assert go.wait(30)
            ended.set()
        return store(data, span, direct)

    def note(*span: int) -> None:
        assert ended.is_set()
        start(*span)

    monkeypatch.setattr(direct_writes, "_store", wait)
    monkeypatch.setattr(page_cache, "start_write_out", note)
    put(dropper, file, 10, 61440, 32, 1)
    first = dropper.cut()
    put(dropper, file, 8 * MIB, 61440, 64, 2)
    threading.Timer(0.05, go.set).start()  # while `land` waits for it
    dropper.land(first)
    dropper.land(dropper.cut())
    dropper.finish()
    assert np.array_equal(np.fromfile(file.path, np.uint8), file.wanted)


def test_no_more_than_the_buffers_is_under_way(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0
    buffers = direct_writes.private_buffers

    def count(number: int, nbytes: int) -> list[Any]:
        nonlocal made
        made += number
        return buffers(number, nbytes)

    monkeypatch.setattr(direct_writes, "private_buffers", count)
    dropper = Dropper()
    for n in range(5):
        put(dropper, file, n * 4 * MIB, MIB, 4, n)
    dropper.land(dropper.cut())
    dropper.finish()
    assert made == direct_writes.DEPTH
    assert np.array_equal(np.fromfile(file.path, np.uint8), file.wanted)


def test_no_thread_outlives_the_engine(tmp_path: Path) -> None:
    def writers() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith("lightmem-write")]

    r = open_dropping(tmp_path / "store", 16, 64 << 10)
    r.write(Block(1, 4))
    assert writers()
    r.engine.close()
    assert not writers()
