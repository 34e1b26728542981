"""The kernel is asked which pages of a file are dirty; where it does not tell it is guessed."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from light_mem.engine import dirty_pages
from light_mem.engine.dirty_pages import DirtyPages

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


def mapped_again(dirty: DirtyPages, ages: tuple[float, ...]) -> list[bool]:
    return [dirty.need_no_fault(0, 0, 1, 100.0 - age, 100.0) for age in ages]


def test_without_the_call_it_is_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dirty_pages.sys, "platform", "darwin")
    dirty = DirtyPages()
    assert mapped_again(dirty, (4.9, 5.1)) == [True, False]
    assert not dirty.need_no_fault(0, 0, 1, 0.0, 0.1)  # never


def test_what_the_kernel_was_seen_to_have_written_is_not_sure_any_more(written: int) -> None:
    dirty = DirtyPages()
    for now in (1.0, 1.4, 1.6, 6.5, 32.0):
        assert dirty.need_no_fault(written, 0, PAGE, 1.0, now) == (now < 31.0)
    os.fsync(written)
    assert not dirty.need_no_fault(written, 0, PAGE, 1.0, 2.0)
    assert not dirty.need_no_fault(written, 0, PAGE, 1.9, 2.1)  # before it was seen
    assert dirty.need_no_fault(written, 0, PAGE, 2.0, 2.1)


def test_what_was_written_by_a_call_is_as_old(written: int) -> None:
    dirty = DirtyPages()
    assert dirty.need_no_fault(written, 0, PAGE, -1.0, 30.9)
    assert not dirty.need_no_fault(written, 0, PAGE, -1.0, 31.1)
    os.fsync(written)
    assert not dirty.need_no_fault(written, 0, PAGE, -1.0, 30.9)
