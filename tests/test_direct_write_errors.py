"""Writes past the page cache that fail, are refused or cut short: no byte of them comes later."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from light_mem.engine import direct_writes, page_cache
from light_mem.engine.base import Outcome
from light_mem.engine.direct_writes import DirectWrites
from light_mem.engine.dropping import Dropper
from light_mem.engine.pieces import PIECE_BYTES
from light_mem.engine.read_ahead import ALIGN, Span
from tests.cached import cached
from tests.direct_rig import MIB, File, direct, file, put
from tests.dropping_rig import open_dropping
from tests.engine_helpers import COPIED_AND_STORED, Block

__all__ = ["direct", "file"]  # fixtures


def no_disk(*_: Any) -> bool:
    raise OSError(errno.EIO, "no disk")


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
