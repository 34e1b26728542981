"""Slots that are written again soon go through the mapping, all others by system calls."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from light_mem.engine import mapped_writes
from light_mem.engine.base import Outcome
from light_mem.engine.dirty_pages import DirtyPages
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.mapped_writes import (
    CALLS_BEFORE,
    CALLS_BEFORE_FAULTS,
    LEAST_BYTES,
    MappedWrites,
)
from tests.engine_helpers import COPIED_AND_STORED, Block, Rig, open_local

PAGE = mmap.PAGESIZE
BLOCK = LEAST_BYTES
NBYTES = 8 * BLOCK

linux = pytest.mark.skipif(sys.platform != "linux", reason="nothing is taken out elsewhere")


class File:
    """A mapped file of slots, written run by run: `write` says whether by calls."""

    def __init__(self, path: Path, base: int = 0, slot_bytes: int = BLOCK) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        os.pwrite(self.descriptor, bytes(NBYTES), 0)
        self.mapping = mmap.mmap(self.descriptor, NBYTES)
        self.slot_bytes = slot_bytes
        slots = (NBYTES - base) // slot_bytes
        self.writes = MappedWrites(self.mapping, self.descriptor, base, slots, slot_bytes)
        self.now = 1.0

    def write(self, start: int = 0, length: int = 1, byte: int = 1) -> bool:
        self.writes.begin(self.now)
        sink = self.writes.sink(start, length)
        self.writes.start()
        store, first = sink.storing(0, length * self.slot_bytes)
        store(first, np.full(length * self.slot_bytes, byte, np.uint8))
        self.writes.was_put(start, length, sink)
        return sink.by_calls

    def calls_before_the_mapping(self, **run: int) -> int:
        return next(n for n in range(20) if not self.write(**run))

    def close(self) -> None:
        os.close(self.descriptor)
        del self.writes, self.mapping  # which has a descriptor of its own


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[File]:
    """All of it is dirty, as far as the kernel tells."""
    monkeypatch.setattr(DirtyPages, "_are_dirty", lambda *_: True)
    made = File(tmp_path / "file")
    yield made
    made.close()


def rusage(monkeypatch: pytest.MonkeyPatch, faults: int) -> None:
    """Have each pair of looks at the faults differ by so many."""
    count = iter(range(0, 10**9, faults) if faults else [7] * 100)
    monkeypatch.setattr(
        mapped_writes.resource, "getrusage", lambda who: SimpleNamespace(ru_minflt=next(count))
    )


def test_what_is_written_again_soon_goes_through_the_mapping(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.platform == "linux":
        rusage(monkeypatch, 0)
    assert file.calls_before_the_mapping() == CALLS_BEFORE
    file.now += 4.9
    assert not file.write()
    file.now += 29.9
    assert not file.write()
    file.now += 30.1  # the kernel leaves nothing dirty for so long
    assert file.calls_before_the_mapping() == CALLS_BEFORE


def test_who_wants_calls_gets_them_whatever_was_written_a_moment_ago(file: File) -> None:
    file.calls_before_the_mapping()
    assert not file.write()
    assert not file.writes.sink(0, 1).by_calls
    assert file.writes.sink(0, 1, by_calls=True).by_calls


def test_what_is_written_again_late_goes_by_calls(file: File) -> None:
    for _ in range(10):
        assert file.write()
        file.now += 5.1


@linux
def test_where_each_page_faults_more_calls_come_first(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    rusage(monkeypatch, BLOCK // PAGE // 2 + 1)
    assert file.calls_before_the_mapping() == CALLS_BEFORE  # not known yet
    file.now += 31
    assert file.calls_before_the_mapping() == CALLS_BEFORE_FAULTS
    assert file.calls_before_the_mapping(start=1) == CALLS_BEFORE_FAULTS
    rusage(monkeypatch, BLOCK // PAGE // 2)
    assert file.calls_before_the_mapping(start=2) == CALLS_BEFORE_FAULTS
    assert file.calls_before_the_mapping(start=3) == CALLS_BEFORE


def test_short_slots_are_left_in_the_page_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DirtyPages, "_are_dirty", lambda *_: True)
    monkeypatch.setattr(MappedWrites, "_take_out", None)
    file = File(tmp_path / "file", slot_bytes=LEAST_BYTES - 1)
    assert file.calls_before_the_mapping() == CALLS_BEFORE_FAULTS
    assert not file.write()
    file.close()


def test_a_run_is_as_old_as_the_older_of_its_ends(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MappedWrites, "_take_out", lambda *_: None)
    assert file.calls_before_the_mapping(start=0) == CALLS_BEFORE
    assert file.write(start=0, length=3)  # the last one was never written
    assert not file.write(start=0, length=3)
    file.now += 29
    assert not file.write(start=2)
    file.now += 2
    assert file.write(start=0, length=3)  # the first one is 31 s old


@linux
def test_slots_are_taken_out_of_the_page_table_before_their_first_stores(file: File) -> None:
    """Whose pages are then mapped by faults of this process."""

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        file.mapping[0:NBYTES:PAGE]
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert not faults()  # all of it is mapped
    assert file.write(start=1)
    assert not file.writes.sink(1, 1).by_calls
    assert faults()


@linux
@pytest.mark.parametrize("base", [PAGE, 100])
def test_what_others_stored_beside_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: int
) -> None:
    """Slots need not begin at a page: what lies in the same page was only stored to the mapping."""
    monkeypatch.setattr(DirtyPages, "_are_dirty", lambda *_: True)
    slot_bytes = BLOCK - 4
    file = File(tmp_path / "file", base, slot_bytes)
    file.mapping[:] = bytes(range(256)) * (NBYTES // 256)
    expected = bytearray(file.mapping[:])
    at, nbytes = base + 2 * slot_bytes, 3 * slot_bytes
    ways = []
    for byte in range(1, 5):
        ways.append(file.write(2, 3, byte))
        expected[at : at + nbytes] = bytes([byte]) * nbytes
        assert os.pread(file.descriptor, NBYTES, 0) == file.mapping[:] == expected
    assert set(ways) == {True, False}
    file.close()


@linux
def test_locked_memory_stays_in_the_page_table(file: File) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.addressof(ctypes.c_char.from_buffer(file.mapping))
    if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(NBYTES)) != 0:
        pytest.skip(f"no memory may be locked: {os.strerror(ctypes.get_errno())}")
    assert file.calls_before_the_mapping() == CALLS_BEFORE
    assert file.calls_before_the_mapping(start=1) == CALLS_BEFORE_FAULTS


def test_elsewhere_nothing_is_taken_out(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_writes.sys, "platform", "darwin")
    if sys.platform == "linux":
        monkeypatch.setattr(mapped_writes.resource, "getrusage", None)
    assert file.calls_before_the_mapping() == CALLS_BEFORE


@pytest.mark.parametrize("pages", [1, 40])
def test_a_block_goes_to_dirty_slots_by_the_mapping_and_to_clean_ones_by_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pages: int
) -> None:
    engine = open_local(tmp_path / "s", pages, block_pages=pages, page_bytes=PAGE)
    assert isinstance(engine, LocalStorageEngine)
    rig = Rig(engine, PAGE)
    file, calls, pwritev = engine.file(0), [0], os.pwritev
    clean = [False]
    monkeypatch.setattr(DirtyPages, "_are_dirty", lambda *_: not clean[0])

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
    least = CALLS_BEFORE if pages > 1 else CALLS_BEFORE_FAULTS

    def calls_before_the_mapping() -> int:
        return next(n for n in range(20) if not write(next(keys)))

    assert calls_before_the_mapping() == least  # never touched
    writes = file._writes
    least = max(least, writes.calls_before)  # as the file system has it
    writes._written_at -= 6.0
    assert not write(next(keys))  # still dirty
    writes._written_at -= 6.0
    clean[0] = True
    assert write(next(keys))
    clean[0] = False
    assert calls_before_the_mapping() == least - 1
    writes._written_at -= 31.0
    assert write(next(keys))
    writes._written_at += 6.0  # by a call, some seconds ago: counted anew
    assert calls_before_the_mapping() == least
    engine.close()
