"""A file that is open past the page cache too, and blocks put into it as the engine does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from light_mem.engine import page_cache
from light_mem.engine.copy import new_checksum
from light_mem.engine.dropping import Dropper
from light_mem.engine.gather import Gatherer
from light_mem.engine.places import Rows
from light_mem.engine.read_ahead import ALIGN, Span, open_direct
from tests.cached import can_forget

MIB = 1 << 20


@pytest.fixture(autouse=True)
def direct(tmp_path: Path) -> None:
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
