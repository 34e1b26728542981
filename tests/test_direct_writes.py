"""Writes past the page cache: every byte where it belongs, and nothing told before it is there."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from light_mem.engine import copy, direct_writes, page_cache
from light_mem.engine.base import Outcome
from light_mem.engine.copy import new_checksum
from light_mem.engine.direct_writes import LEAST_BYTES, DirectWrites
from light_mem.engine.dropping import Dropper
from light_mem.engine.gather import Gatherer
from light_mem.engine.pieces import PIECE_BYTES
from light_mem.engine.places import Rows
from light_mem.engine.read_ahead import ALIGN, Span, open_direct
from tests.cached import cached, can_forget
from tests.engine_helpers import COPIED_AND_STORED, Block
from tests.test_page_cache import in_cache, open_dropping

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _direct(tmp_path: Path) -> None:
    if not page_cache.can_drop() or not can_forget(tmp_path):
        pytest.skip("this system or file system drops no pages")
    path = tmp_path / "probe"
    path.write_bytes(bytes(2 * ALIGN))
    descriptor = os.open(path, os.O_RDWR)
    direct = open_direct(path, descriptor, os.O_RDWR)
    os.close(descriptor)
    if direct < 0:
        pytest.skip("this file system has no O_DIRECT")
    os.close(direct)


class File:
    """A file of other bytes, open for both ways."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path = path
        self.wanted = np.random.default_rng(9).integers(0, 256, nbytes, np.uint8)
        path.write_bytes(self.wanted.tobytes())
        self.cached = os.open(path, os.O_RDWR)
        self.direct = open_direct(path, self.cached, os.O_RDWR)
        os.fsync(self.cached)
        os.posix_fadvise(self.cached, 0, 0, os.POSIX_FADV_DONTNEED)

    def span(self, at: int, nbytes: int) -> Span:
        return Span(self.cached, at, nbytes)

    def close(self) -> None:
        os.close(self.cached)
        os.close(self.direct)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[File]:
    one = File(tmp_path / "file", 24 * MIB)
    yield one
    one.close()


def put(dropper: Dropper, file: File, at: int, row_bytes: int, rows: int, seed: int) -> None:
    """Put rows of a memory of their own, as the engine does."""
    memory = np.random.default_rng(seed).integers(0, 256, (2 * rows, row_bytes), np.uint8)
    numbers = np.random.default_rng(seed + 1).permutation(2 * rows)[:rows]
    file.wanted[at : at + rows * row_bytes] = memory[numbers].reshape(-1)
    checksum = new_checksum(1, 2)
    with dropper.sink(file.span(at, rows * row_bytes), file.direct) as sink:
        Gatherer().gather_part(Rows(memory, numbers), sink, checksum)
    wanted = new_checksum(1, 2)
    wanted.update(memory[numbers].tobytes())
    assert checksum.digest() == wanted.digest()


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


def no_disk(*_: Any) -> bool:
    raise OSError(errno.EIO, "no disk")


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


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_device_that_fails_fails_the_blocks_and_their_slots_are_free_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    r = open_dropping(tmp_path / "store", 16, 64 << 10)
    blocks = [Block(n, 4) for n in range(4)]

    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(direct_writes, "_store", fail)
        assert r.write(*blocks) == [(Outcome.COPIED, Outcome.FAILED)] * 4
    assert r.read(*blocks) == [Outcome.MISSING] * 4
    # The store has room for these alone; and the failure was not put off to them.
    assert r.write(*blocks) == [COPIED_AND_STORED] * 4
    assert r.read(*blocks) == [Outcome.LOADED] * 4
    r.engine.close()


def test_an_edge_that_fails_is_not_put_off_to_the_next_blocks(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropper = Dropper()
    with monkeypatch.context() as patch:
        patch.setattr(page_cache, "start_write_out", no_disk)
        put(dropper, file, 10, 4096, 4, 1)
        with pytest.raises(OSError, match="no disk"):
            dropper.land(dropper.cut())
    put(dropper, file, 10, 4096, 64, 2)
    dropper.land(dropper.cut())
    dropper.finish()
    assert np.array_equal(np.fromfile(file.path, np.uint8), file.wanted)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_refuses_such_writes_gets_others(
    file: File, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    pwrite = os.pwrite

    def refuse(descriptor: int, data: Any, at: int) -> int:
        if descriptor == file.direct:
            raise OSError(code, os.strerror(code))
        return pwrite(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", refuse)
    dropper = Dropper()
    put(dropper, file, 77, 61440, 64, 1)
    dropper.land(dropper.cut())
    assert cached(file.path).sum() > 64 * 61440 // mmap.PAGESIZE
    dropper.finish()
    assert cached(file.path).sum() <= 1  # the last page is another's, too
    assert np.array_equal(np.fromfile(file.path, np.uint8), file.wanted)


def test_a_write_cut_short_goes_on_at_a_whole_page(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    cuts = iter([3 * ALIGN + 5, ALIGN, 2 * ALIGN + 4095])

    def short(descriptor: int, data: Any, at: int) -> int:
        if descriptor == file.direct and (cut := next(cuts, None)) is not None:
            pwrite(descriptor, data[: cut - cut % ALIGN], at)
            return cut
        return pwrite(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", short)
    dropper = Dropper()
    put(dropper, file, 4096, 61440, 8, 1)
    dropper.land(dropper.cut())
    dropper.finish()
    assert next(cuts, None) is None
    assert np.array_equal(np.fromfile(file.path, np.uint8), file.wanted)


def test_a_write_that_gets_nowhere_is_an_error(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 5)
    dropper = Dropper()
    put(dropper, file, 4096, 61440, 8, 1)
    with pytest.raises(OSError, match="stops at byte 4096"):
        dropper.land(dropper.cut())
    dropper.finish()


def test_without_memory_to_write_from_blocks_fail_and_are_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = open_dropping(tmp_path / "store", 16, 64 << 10)

    def refuse(count: int, nbytes: int) -> list[Any]:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with monkeypatch.context() as patch:
        patch.setattr(direct_writes, "private_buffers", refuse)
        assert r.write(Block(1, 4), Block(2, 4)) == [(Outcome.FAILED,)] * 2
    assert r.write(Block(1, 4), Block(2, 4)) == [COPIED_AND_STORED] * 2
    assert r.read(Block(1, 4), Block(2, 4)) == [Outcome.LOADED] * 2
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


def test_edges_of_blocks_that_failed_are_not_written_later(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their slots may be another block's by then."""
    dropper = Dropper()
    wanted = file.wanted.copy()
    with monkeypatch.context() as patch:
        patch.setattr(direct_writes, "_store", no_disk)
        put(dropper, file, 1000, 61440, 8, 1)
        with pytest.raises(OSError, match="no disk"):
            dropper.land(dropper.cut())
    file.wanted = wanted
    put(dropper, file, 4 * MIB + 10, 61440, 8, 2)
    dropper.land(dropper.cut())
    dropper.finish()
    assert np.array_equal(np.fromfile(file.path, np.uint8), file.wanted)


def test_whatever_ends_a_batch_waits_for_its_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has the slots next must not be written over."""
    r = open_dropping(tmp_path / "store", 64, 64 << 10)
    store, plan = direct_writes._store, r.engine.file(0).plan
    begun, ended = threading.Event(), threading.Event()

    def slow(*args: Any) -> bool:
        begun.set()
        threading.Event().wait(0.2)
        result = store(*args)
        ended.set()
        return result

    def break_second(*args: Any, **options: Any) -> Any:
        if begun.is_set():
            raise RuntimeError("not an OSError")
        return plan(*args, **options)

    monkeypatch.setattr(direct_writes, "_store", slow)
    monkeypatch.setattr(r.engine.file(0), "plan", break_second)
    with pytest.raises(RuntimeError, match="not an OSError"):
        # Longer than a buffer: its first part is under way when the second block comes.
        r.write(Block(1, 40), Block(2, 4))
    assert begun.is_set()
    assert ended.is_set()
    monkeypatch.undo()
    assert r.write(Block(3, 32)) == [COPIED_AND_STORED]
    assert r.read(Block(3, 32)) == [Outcome.LOADED]
    r.engine.close()


def test_no_thread_outlives_the_engine(tmp_path: Path) -> None:
    def writers() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith("lightmem-write")]

    r = open_dropping(tmp_path / "store", 16, 64 << 10)
    r.write(Block(1, 4))
    assert writers()
    r.engine.close()
    assert not writers()


def test_what_is_under_way_is_waited_for_whatever_fails(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = direct_writes._store
    ended: list[int] = []

    def fail_first(data: Any, span: Span, direct: int) -> bool:
        past_cache = store(data, span, direct)
        ended.append(span.at)
        if span.at == 0:
            raise OSError(errno.EIO, "the first")
        return past_cache

    monkeypatch.setattr(direct_writes, "_store", fail_first)
    writes = DirectWrites()
    sink = writes.sink(file.span(0, 8 * MIB), file.direct)
    for _ in range(16):
        put, first = sink.storing(0, PIECE_BYTES)
        put(first, np.zeros(PIECE_BYTES, np.uint8))
    with pytest.raises(OSError, match="the first"):
        writes.land(writes.cut())
    assert sorted(ended) == [n * MIB for n in range(8)]
    writes.land(writes.cut())  # told once
    writes.close()
