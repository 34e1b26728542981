"""Buffers of what is read ahead: no more than the depth, none lost, none written to by two."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from light_mem.engine import read_ahead
from light_mem.engine.read_ahead import DEPTH, PIECE_BYTES, ReadAhead, Span
from tests.read_ahead_rig import began, descriptor, take, wanted

__all__ = ["began", "descriptor", "wanted"]  # fixtures


def test_a_plan_in_the_middle_of_a_span_loses_no_buffer(
    descriptor: int, wanted: np.ndarray
) -> None:
    reader = ReadAhead(4096)
    first = Span(descriptor, 0, 3 * PIECE_BYTES)
    pieces = reader.pieces(first)
    next(pieces)
    other = Span(descriptor, 5 * PIECE_BYTES, 2 * PIECE_BYTES)
    reader.plan([other])
    pieces.close()
    assert take(reader, other) == wanted[other.at : other.at + other.nbytes].tobytes()
    reader.close()
    assert len(reader._free) == DEPTH


def test_no_more_than_the_depth_is_under_way(descriptor: int, began: list[Span]) -> None:
    reader = ReadAhead(4096)
    span = Span(descriptor, 0, 12 * PIECE_BYTES)
    reader.plan([span])
    for taken, _ in enumerate(reader.pieces(span)):
        assert len(began) <= DEPTH + taken
    assert len(began) == len(set(began)) == 12
    reader.close()


def test_closing_ends_the_threads(descriptor: int) -> None:
    reader = ReadAhead(4096)
    reader.plan([Span(descriptor, 0, 12 * PIECE_BYTES)])
    assert any(t.name.startswith("lightmem-read") for t in threading.enumerate())
    reader.close()
    assert not any(t.name.startswith("lightmem-read") for t in threading.enumerate())
    reader.close()


def test_a_plan_in_the_middle_of_a_span_leaves_the_new_one_whole(
    descriptor: int, began: list[Span]
) -> None:
    reader = ReadAhead(4096)
    pieces = reader.pieces(Span(descriptor, 0, 3 * PIECE_BYTES))
    next(pieces)
    other = Span(descriptor, 5 * PIECE_BYTES, PIECE_BYTES)
    reader.plan([other])
    reader._under_way[0].data.result()  # else it may be cancelled and begun but once
    pieces.close()
    take(reader, other)
    reader.close()
    assert began.count(other) == 1


def test_who_goes_on_in_the_same_request_keeps_its_piece(descriptor: int) -> None:
    reader = ReadAhead(4096)
    first, second = Span(descriptor, 0, 4096), Span(descriptor, 4096, 4096)
    reader.plan([first, second])
    pieces = reader.pieces(first)
    next(pieces)
    held = next(more := reader.pieces(second))
    pieces.close()
    assert not any(np.shares_memory(held, buffer) for buffer in reader._free)
    more.close()
    reader.close()
    assert len(reader._free) == DEPTH


def test_a_buffer_is_not_used_again_while_a_thread_writes_to_it(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, begun, go_on = read_ahead._load, threading.Event(), threading.Event()
    busy: list[np.ndarray] = []
    shared: list[bool] = []

    def slow(span: Span, buffer: np.ndarray) -> np.ndarray:
        shared.append(any(np.shares_memory(buffer, other) for other in busy))
        busy.append(buffer)
        if span.at == 0:
            begun.set()
            go_on.wait(10)
        data = load(span, buffer)
        busy[:] = [other for other in busy if other is not buffer]
        return data

    monkeypatch.setattr(read_ahead, "_load", slow)
    reader = ReadAhead(4096)
    reader.plan([Span(descriptor, 0, 4096)])
    assert begun.wait(10)
    timer = threading.Timer(0.2, go_on.set)
    timer.start()
    reader.plan([Span(descriptor, n * PIECE_BYTES, 4096) for n in range(1, 9)])
    assert go_on.is_set()  # it waited for the one under way
    reader.close()
    timer.join()
    assert not any(shared)
