"""A file to be read ahead, with O_DIRECT and without, and what the device was asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from light_mem.engine import read_ahead
from light_mem.engine.read_ahead import PIECE_BYTES, ReadAhead, Span, open_direct
from tests.payload import page_bytes_of

FILE_BYTES = 12 * PIECE_BYTES + 777


@pytest.fixture(params=["direct", "buffered"])
def descriptor(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    page_bytes_of("file", 0, FILE_BYTES).tofile(path)
    opened = os.open(path, os.O_RDONLY)
    if request.param == "direct":
        plain, opened = opened, open_direct(path, opened)
        os.close(plain)
    if opened < 0:
        pytest.skip("this file system has no O_DIRECT")
    yield opened
    os.close(opened)


@pytest.fixture
def wanted() -> np.ndarray:
    return page_bytes_of("file", 0, FILE_BYTES)


@pytest.fixture
def began(monkeypatch: pytest.MonkeyPatch) -> list[Span]:
    """The requests that were made of the device."""
    began: list[Span] = []
    load = read_ahead._load

    def note(span: Span, buffer: np.ndarray) -> np.ndarray:
        began.append(span)
        return load(span, buffer)

    monkeypatch.setattr(read_ahead, "_load", note)
    return began


def take(reader: ReadAhead, span: Span) -> bytes:
    return b"".join(piece.tobytes() for piece in reader.pieces(span))
