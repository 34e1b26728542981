"""The calls below `page_cache`: what they drop, wait for and read, and what they ask the kernel."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from light_mem.engine import page_cache
from light_mem.engine.dropping import Dropper
from light_mem.engine.read_ahead import Span
from tests.cached import cached, forget
from tests.conftest import wait_until
from tests.dropping_rig import cache_that_drops

__all__ = ["cache_that_drops"]  # fixtures

MIB = 1 << 20


def test_no_more_than_the_window_waits_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    waited: list[int] = []
    finish = page_cache.finish_write_out

    def finish_and_note(descriptor: int, at: int, nbytes: int) -> None:
        waited.append(at)
        finish(descriptor, at, nbytes)

    monkeypatch.setattr(page_cache, "finish_write_out", finish_and_note)
    dropper = Dropper(window=4 * MIB)
    for n in range(16):
        os.pwrite(descriptor, bytes(MIB), n * MIB)
        dropper.wrote(Span(descriptor, n * MIB, MIB))
        dropper.keep_up()
        assert waited == [at * MIB for at in range(n - 3)]  # the oldest first, four are left
    assert cached(path)[12 * 256 :].all()
    assert not cached(path)[: 12 * 256].any()
    dropper.finish()
    assert not cached(path).any()
    assert not dropper.drop_next()
    os.close(descriptor)


def test_a_range_drops_the_page_it_shares_with_the_one_before_and_not_the_next(
    tmp_path: Path,
) -> None:
    path = tmp_path / "file"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    page = mmap.PAGESIZE
    for n in range(8):  # one write might make one folio, which goes whole or not at all
        os.pwrite(descriptor, bytes(page), n * page)
    os.fsync(descriptor)
    page_cache.drop(descriptor, 2 * page + 10, 2 * page)
    assert cached(path).tolist() == [True, True, False, False, True, True, True, True]
    page_cache.drop(descriptor, 6 * page + 1, 100)  # inside one page
    assert cached(path)[6]
    os.close(descriptor)


def test_each_of_many_bytes_is_in_the_cache_or_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * mmap.PAGESIZE))
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        page_cache.drop(file.fileno(), 0, 64 * mmap.PAGESIZE)
        mapped = mmap.mmap(file.fileno(), 0)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # nothing around what is read
        for page in (3, 17, 18, 40):
            os.pread(file.fileno(), 1, page * mmap.PAGESIZE)
    start = np.frombuffer(mapped, np.uint8).ctypes.data
    asked = [start + at for at in range(0, 64 * mmap.PAGESIZE, 1023)]
    held = page_cache.hold_each(asked)
    assert held == [page_cache.holds(address, 1) for address in asked]
    found = {
        (a - start) // mmap.PAGESIZE for a, is_held in zip(asked, held, strict=True) if is_held
    }
    assert found == {3, 17, 18, 40}
    assert page_cache.hold_each([]) == []


def test_where_the_system_does_not_tell_what_is_cached_all_counts_as_cached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(page_cache, "_mincore", None)
    assert page_cache.hold_each([1, 2]) == [True, True]
    monkeypatch.setattr(page_cache, "_mincore", lambda *_: -1)
    assert page_cache.hold_each([1, 2]) == [True, True]


@pytest.mark.parametrize(
    ("at", "nbytes", "edges"),
    [(0, 4096, []), (0, 100, [0]), (10, 4086, [0]), (10, 8192, [0, 2]), (4096, 4097, [2])],
)
def test_only_pages_that_are_shared_are_read_before_a_write(
    tmp_path: Path, at: int, nbytes: int, edges: list[int]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * 4096))
    forget(path)
    descriptor = os.open(path, os.O_RDWR)
    page_cache.read_edges(descriptor, at, nbytes)
    wait_until(lambda: np.flatnonzero(cached(path)).tolist() == edges)
    os.close(descriptor)
