"""Spans read ahead and past the page cache: the right bytes whatever is left out or fails."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from light_mem.engine import read_ahead
from light_mem.engine.read_ahead import DEPTH, PIECE_BYTES, ReadAhead, Span, open_direct
from tests.payload import page_bytes_of
from tests.read_ahead_rig import FILE_BYTES, began, descriptor, take, wanted

__all__ = ["began", "descriptor", "wanted"]  # fixtures


@pytest.mark.parametrize("unit", [1, 3840, 4096, PIECE_BYTES - 1, 3 * PIECE_BYTES])
def test_planned_spans_are_what_the_file_holds(
    descriptor: int, wanted: np.ndarray, unit: int
) -> None:
    spans = [
        Span(descriptor, at, nbytes)
        for at, nbytes in [
            (0, 1), (4096, 4096), (5000, 3 * PIECE_BYTES + 1), (1, 2), (4095, 2), (8192, 0),
            (FILE_BYTES - 10, 10), (PIECE_BYTES, 9 * PIECE_BYTES), (0, FILE_BYTES),
        ]
    ]  # fmt: skip
    reader = ReadAhead(unit)
    reader.plan(spans)
    for span in spans:
        assert take(reader, span) == wanted[span.at : span.at + span.nbytes].tobytes()
    reader.close()


def test_it_has_landed_when_all_that_is_planned_is_there(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    load = read_ahead._load

    def wait(span: Span, buffer: np.ndarray) -> np.ndarray:
        assert gate.wait(10)
        return load(span, buffer)

    monkeypatch.setattr(read_ahead, "_load", wait)
    reader = ReadAhead(4096)
    assert reader.has_landed
    spans = [Span(descriptor, n * PIECE_BYTES, PIECE_BYTES) for n in range(DEPTH + 1)]
    reader.plan(spans)
    assert not reader.has_landed
    gate.set()
    for request in reader._under_way:
        request.data.result()
    assert not reader.has_landed  # the last one is not under way yet
    take(reader, spans[0])
    for request in reader._under_way:
        request.data.result()
    assert reader.has_landed
    reader.close()


def test_spans_may_be_left_out_left_early_asked_again_or_unplanned(
    descriptor: int, wanted: np.ndarray
) -> None:
    spans = [Span(descriptor, n * PIECE_BYTES + n, 2 * PIECE_BYTES) for n in range(10)]
    reader = ReadAhead(4096)

    def check(span: Span) -> None:
        assert take(reader, span) == wanted[span.at : span.at + span.nbytes].tobytes()

    reader.plan(spans)
    check(spans[0])
    check(spans[4])
    early = reader.pieces(spans[5])
    assert next(early).tobytes() == wanted[spans[5].at : spans[5].at + PIECE_BYTES].tobytes()
    early.close()
    check(spans[6])
    check(spans[2])  # has gone by: read anew
    check(Span(descriptor, 99, 12345))
    check(spans[9])
    reader.plan(spans)
    reader.plan(spans[3:])
    check(spans[3])
    reader.close()
    assert len(reader._free) == DEPTH  # every buffer came back, and no more were made


def test_what_is_planned_later_is_read_after_it_and_nothing_is_kept_of_it(
    descriptor: int, wanted: np.ndarray, began: list[Span]
) -> None:
    reader = ReadAhead(4096)
    spans = [Span(descriptor, n * 4096, 4096) for n in range(600)]
    reader.plan(spans[:40])
    for turn in range(1, 15):
        reader.extend(spans[40 * turn : 40 * turn + 40])
        for n in range(40 * turn - 40, 40 * turn):
            if n % 7:  # some are left out
                span = spans[n]
                assert take(reader, span) == wanted[span.at : span.at + span.nbytes].tobytes()
        assert len(reader._planned) <= 41
    assert len(began) == len(set(began))
    reader.close()
    assert not reader._planned
    assert len(reader._free) == DEPTH


def test_short_spans_that_follow_each_other_are_one_request(
    descriptor: int, wanted: np.ndarray, began: list[Span]
) -> None:
    lengths = [1, 300_000, 4096, 600_000, 200_000, PIECE_BYTES, 5, 0, 7]
    ends = np.cumsum(lengths).tolist()
    spans = [Span(descriptor, end - n, n) for end, n in zip(ends, lengths, strict=True)]
    spans += [Span(descriptor, ends[-1] + 1, 9), Span(descriptor, 0, 50)]  # a gap, and backwards
    requests = {
        Span(descriptor, 0, 904_097),
        Span(descriptor, 904_097, 200_000),
        Span(descriptor, 1_104_097, PIECE_BYTES),
        Span(descriptor, 1_104_097 + PIECE_BYTES, 12),
        *spans[-2:],
    }
    reader = ReadAhead(1)
    for left_out in (set(), {0}, {1, 2}, {3, 7}, {4, 5, 6}, set(range(9))):
        began.clear()
        reader.plan(spans)
        for n, span in enumerate(spans):
            if n not in left_out:
                assert take(reader, span) == wanted[span.at : span.at + span.nbytes].tobytes()
        assert len(began) == len(set(began))
        assert set(began) <= requests  # one that is left out whole may not have begun
        if not left_out & {4, 5}:
            assert set(began) == requests
    reader.close()
    assert len(reader._free) == DEPTH


def test_a_part_that_fails_fails_no_other_of_its_request(
    descriptor: int, wanted: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = os.preadv

    def preadv(fd: int, buffers: list[memoryview], at: int, flags: int = 0) -> int:
        if at <= 20_480 < at + len(buffers[0]):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(fd, buffers, at, flags)

    monkeypatch.setattr(read_ahead.os, "preadv", preadv)
    spans = [Span(descriptor, n * 8192, 8192) for n in range(6)]
    reader = ReadAhead(4096)
    reader.plan(spans)
    for n, span in enumerate(spans):
        if n == 2:
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                take(reader, span)
        else:
            assert take(reader, span) == wanted[span.at : span.at + 8192].tobytes()
    reader.close()
    assert len(reader._free) == DEPTH


def test_a_read_that_fails_fails_its_span_alone(descriptor: int, wanted: np.ndarray) -> None:
    good, behind_the_end = Span(descriptor, 0, 100), Span(descriptor, FILE_BYTES - 5, 10)
    closed = Span(2**30, 0, 100)
    reader = ReadAhead(1)
    reader.plan([closed, behind_the_end, good])
    with pytest.raises(OSError, match="descriptor"):
        take(reader, closed)
    with pytest.raises(OSError, match="5 bytes too early"):
        take(reader, behind_the_end)
    assert take(reader, good) == wanted[:100].tobytes()
    reader.close()


@pytest.mark.parametrize("most", [4096, 5000, 3 * 4096 - 1])
def test_a_short_read_is_finished_from_where_the_device_can_go_on(
    descriptor: int, wanted: np.ndarray, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    read, places = os.preadv, []

    def preadv(fd: int, buffers: list[memoryview], at: int, flags: int = 0) -> int:
        places.append(at)
        count = min(most, read(fd, buffers, at, flags))
        buffers[0][count:] = bytes(len(buffers[0]) - count)  # as if it had not been read
        return count

    monkeypatch.setattr(read_ahead.os, "preadv", preadv)
    reader = ReadAhead(1)
    assert take(reader, Span(descriptor, 5000, 50_000)) == wanted[5000:55_000].tobytes()
    reader.close()
    assert len(places) > 3
    assert all(at % 4096 == 0 for at in places)


def test_what_is_dirty_in_the_page_cache_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    writer = os.open(path, os.O_RDWR | os.O_CREAT)
    os.pwrite(writer, bytes(1 << 16), 0)
    plain = os.open(path, os.O_RDONLY)
    direct = open_direct(path, plain)
    os.close(plain)
    if direct < 0:
        os.close(writer)
        pytest.skip("this file system has no O_DIRECT")
    reader = ReadAhead(1)
    for n in range(1, 20):
        os.pwrite(writer, bytes([n]) * 5000, 3000)
        reader.plan([Span(direct, 3000, 5000)])
        assert take(reader, Span(direct, 3000, 5000)) == bytes([n]) * 5000
    reader.close()
    os.close(direct)
    os.close(writer)


def test_what_one_span_failed_with_is_not_tried_again(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = []

    def preadv(fd: int, buffers: list[memoryview], at: int, flags: int = 0) -> int:
        places.append(at)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(read_ahead.os, "preadv", preadv)
    reader = ReadAhead(4096)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        take(reader, Span(descriptor, 0, 4096))  # a bad sector may cost seconds
    reader.close()
    assert places == [0]


def test_spans_of_two_files_are_not_one_request(tmp_path: Path) -> None:
    descriptors = []
    for name in ("a", "b"):
        page_bytes_of(name, 0, 16_384).tofile(tmp_path / name)
        descriptors.append(os.open(tmp_path / name, os.O_RDONLY))
    spans = [Span(descriptors[n % 2], n * 4096, 4096) for n in range(4)]  # as if they followed
    reader = ReadAhead(4096)
    reader.plan(spans)
    for n, span in enumerate(spans):
        wanted = page_bytes_of("ab"[n % 2], 0, 16_384)[span.at : span.at + 4096]
        assert take(reader, span) == wanted.tobytes()
    reader.close()
    for each in descriptors:
        os.close(each)
