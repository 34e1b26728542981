"""Slots whose pages are dirty are written through the mapping, all others by system calls."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from light_mem.engine import dirty_pages
from light_mem.engine.base import Outcome
from light_mem.engine.dirty_pages import CALLS_BEFORE, DirtyPages
from light_mem.engine.local import LocalStorageEngine
from tests.engine_helpers import COPIED_AND_STORED, Block, Rig, open_local

PAGE = 4096
PAGES = 64


@pytest.fixture
def written(tmp_path: Path) -> Iterator[int]:
    """A file of dirty pages; skips where the system does not tell of them."""
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.pwrite(descriptor, b"x" * PAGES * PAGE, 0)
    if not DirtyPages().need_no_fault(descriptor, 0, PAGES * PAGE, 1.0, 7.0):
        os.close(descriptor)
        pytest.skip("no cachestat here, or a file system without dirty pages")
    yield descriptor
    os.close(descriptor)


def test_what_was_written_out_is_not_dirty(written: int) -> None:
    dirty = DirtyPages()
    for at, nbytes in (0, PAGES * PAGE), (100, 10 * PAGE), (5 * PAGE - 1, 2):
        assert dirty.need_no_fault(written, at, nbytes, 1.0, 7.0)
    os.fsync(written)
    assert not dirty.need_no_fault(written, 0, PAGES * PAGE, 6.0, 7.0)
    os.pwrite(written, b"y" * 20 * PAGE, 0)
    # Dirty again, but by others: what this process wrote before is protected still.
    assert not dirty.need_no_fault(written, 0, 20 * PAGE, 6.9, 8.0)
    assert not dirty.need_no_fault(written, 0, 20 * PAGE, 6.99, 7.1)
    assert dirty.need_no_fault(written, 0, 20 * PAGE, 7.0, 8.0)


def test_what_lies_beyond_the_end_of_the_file_is_not_dirty(written: int) -> None:
    assert not DirtyPages().need_no_fault(written, PAGES * PAGE, 4 * PAGE, 1.0, 2.0)


@pytest.mark.parametrize(
    ("pages", "dirty", "writeback", "expected"),
    [(10, 10, 0, True), (11, 10, 0, True), (12, 10, 0, False), (10, 9, 1, False), (1, 0, 0, False)],
)
def test_nearly_all_is_enough_and_what_is_being_written_is_not(
    pages: int, dirty: int, writeback: int, expected: bool
) -> None:
    def answer(_: int, descriptor: int, wanted: Any, counts: Any, flags: int) -> int:
        assert (descriptor, flags) == (7, 0)
        assert (wanted._obj.at, wanted._obj.nbytes) == (PAGE + 1, pages * PAGE - 2)
        counts._obj.dirty, counts._obj.writeback = dirty, writeback
        return 0

    asked = DirtyPages()
    asked._call = answer  # type: ignore[assignment]
    assert asked.need_no_fault(7, PAGE + 1, pages * PAGE - 2, 1.0, 7.0) == expected


class Kernel:
    """Counts the calls and answers with an error."""

    def __init__(self, error: int) -> None:
        self.error = error
        self.calls = 0

    def __call__(self, *_: Any) -> int:
        self.calls += 1
        ctypes.set_errno(self.error)
        return -1


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP, errno.EINVAL])
def test_where_the_kernel_does_not_tell_it_is_guessed(error: int) -> None:
    dirty, kernel = DirtyPages(), Kernel(error)
    dirty._call = kernel  # type: ignore[assignment]
    assert mapped_again(dirty, (0.1, 1.0, 4.9, 5.1, 29.0, 31.0)) == [True] * 3 + [False] * 3
    # What will never be told is asked for once.
    assert kernel.calls == (4 if error == errno.EINVAL else 1)


def mapped_again(dirty: DirtyPages, ages: tuple[float, ...], by_call: bool = False) -> list[bool]:
    written = [-100.0 + age if by_call else 100.0 - age for age in ages]
    return [dirty.need_no_fault(0, 0, 1, each, 100.0) for each in written]


def test_without_the_call_it_is_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dirty_pages.sys, "platform", "darwin")
    dirty = DirtyPages()
    assert mapped_again(dirty, (4.9, 5.1)) == [True, False]
    # After a call the first store to each page is a fault: only for what is written often.
    assert mapped_again(dirty, (0.1, 4.9, 5.1), by_call=True) == [True, True, False]
    assert not dirty.need_no_fault(0, 0, 1, 0.0, 0.1)  # never


@pytest.mark.parametrize("pages", [1, 40])
def test_a_block_goes_to_dirty_slots_by_the_mapping_and_to_clean_ones_by_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int, pages: int
) -> None:
    engine = open_local(tmp_path / "s", pages, block_pages=pages, page_bytes=PAGE)
    assert isinstance(engine, LocalStorageEngine)
    rig = Rig(engine, PAGE)
    file, calls, pwritev = engine.file(0), [0], os.pwritev

    def counting(*arguments: Any) -> int:
        calls[0] += 1
        return pwritev(*arguments)

    monkeypatch.setattr(os, "pwritev", counting)

    def write(key: int) -> int:
        """Calls that a write made into the slots of the block before."""
        calls[0] = 0
        assert rig.write(Block(key, pages)) == [COPIED_AND_STORED]
        assert rig.read(Block(key, pages)) == [Outcome.LOADED]
        return calls[0]

    keys = iter(range(100))

    def calls_before_the_mapping() -> int:
        return next(n for n in range(20) if not write(next(keys)))

    assert calls_before_the_mapping() == CALLS_BEFORE  # never touched
    file._written_at -= 6.0
    assert not write(next(keys))  # still dirty
    file._written_at -= 6.0
    file.sync()
    assert calls_before_the_mapping() == CALLS_BEFORE
    file._written_at -= 31.0
    assert write(next(keys))
    assert write(next(keys))
    file._written_at += 6.0  # by a call, some seconds ago: counted anew
    assert calls_before_the_mapping() == CALLS_BEFORE
    engine.close()
