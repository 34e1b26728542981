"""Regions, in order; and what of a block is moved at a time: joined where its parts are short, as
they lie where they are long."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash

from light_mem.engine.copy import ROUND_BYTES, Stopped, new_checksum
from light_mem.engine.gather import Gatherer
from light_mem.engine.pieces import PIECE_BYTES, SMALL_PAGE_BYTES, is_put_straight
from light_mem.engine.places import Place, Regions, Rows
from light_mem.engine.scatter import Scatterer
from light_mem.engine.sinks import FileSink, MappedSink, OpenFile
from light_mem.index.keys import key_bytes
from tests.copy_helpers import KEY, expected_sum, memory_of, scatter

REGIONS = {
    "one": [(3, 5000)],
    "short": [(at * 4000 + 7, 3840) for at in np.random.default_rng(2).permutation(300).tolist()],
    "short, each of another length": [(n * 2500, n * 7) for n in range(350, 1, -1)],
    "a long one among short ones": [(10, 20), (1000, PIECE_BYTES + 5), (1, 9)] + [(0, 500)] * 40,
    "long": [(n * 50_000, 40_000 + n) for n in range(30, 0, -1)],
    "longer than a piece": [(900_000, 600 * 1024), (0, 2 * PIECE_BYTES)],
    "empty ones": [(0, 0), (77, 100), (78, 0), (50, 4), (1 << 20, 0)],
}


def regions(kind: str) -> tuple[Regions, bytes]:
    """Some regions, and the bytes there in order."""
    memory = np.random.default_rng(1).integers(0, 256, 2 << 20, np.uint8)
    place = Regions(memory, REGIONS[kind])
    return place, b"".join(part.tobytes() for part in place.slices())


@pytest.mark.parametrize("by_calls", [False, True])
@pytest.mark.parametrize("kind", REGIONS)
def test_regions_are_gathered_in_order(tmp_path: Path, kind: str, by_calls: bool) -> None:
    place, wanted = regions(kind)
    if by_calls:
        descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        sums = Gatherer().plan([(*KEY, [(place, FileSink(OpenFile(descriptor), 0))])]).run()
        os.close(descriptor)
        found = (tmp_path / "file").read_bytes()
    else:
        slots = np.full(len(wanted) + 1, 0xEE, np.uint8)
        sums = Gatherer().plan([(*KEY, [(place, MappedSink(slots[:-1]))])]).run()
        found = slots[:-1].tobytes()
        assert slots[-1] == 0xEE
    assert found == wanted
    assert sums == [xxhash.xxh3_64_intdigest(key_bytes(*KEY) + wanted)]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in REGIONS if kind[:7] != "a long "])  # overlaps
def test_regions_are_scattered_in_order(kind: str, verify: bool) -> None:
    place, wanted = regions(kind)
    original = place.memory.copy()
    place.memory[:] = ~original
    checksum = new_checksum(*KEY)
    source = np.frombuffer(wanted, np.uint8)
    Scatterer().scatter([(place, source, checksum if verify else None)])
    assert b"".join(part.tobytes() for part in place.slices()) == wanted
    expected = ~original
    for offset, length in place.regions:
        expected[offset : offset + length] = original[offset : offset + length]
    assert np.array_equal(place.memory, expected)
    seen = wanted if verify else b""
    assert checksum.intdigest() == xxhash.xxh3_64_intdigest(key_bytes(*KEY) + seen)


class Puts(MappedSink):
    """Keeps what it is handed."""

    def __init__(self, nbytes: int, memory: np.ndarray) -> None:
        self.slots = np.zeros(nbytes, np.uint8)
        super().__init__(self.slots)
        self.memory = memory
        self.straight: list[bool] = []

    def storing(self, at: int, nbytes: int) -> tuple[Callable[..., object], object]:
        return self._put, super().storing(at, nbytes)

    def _put(self, store: tuple[Callable[..., object], object], piece: np.ndarray) -> None:
        self.straight.append(bool(np.shares_memory(piece, self.memory)))
        store[0](store[1], piece)

    def storing_rows(
        self, at: int, memory: np.ndarray, rows: np.ndarray
    ) -> tuple[Callable[..., object], tuple[object, ...]]:
        self.straight.append(memory is self.memory)
        return super().storing_rows(at, memory, rows)


@pytest.mark.parametrize("kind", REGIONS)
def test_short_regions_are_stored_by_one_call_a_piece(kind: str) -> None:
    place, wanted = regions(kind)
    sink = Puts(len(wanted), place.memory)
    Gatherer().plan([(*KEY, [(place, sink)])]).run()
    short = len(wanted) / len(place.regions) < SMALL_PAGE_BYTES
    assert is_put_straight(place) == (not short)
    assert sink.straight == [not short] * len(sink.straight)
    if short:
        assert len(sink.straight) == -(-len(wanted) // PIECE_BYTES)


@pytest.mark.parametrize("count", [1, 5, 40, 300])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("page_bytes", [100, 4096, 16384, SMALL_PAGE_BYTES, 61440, 600 * 1024])
def test_who_is_handed_the_memory_itself_is_known_beforehand(
    page_bytes: int, contiguous: bool, count: int
) -> None:
    rows = np.arange(count) if contiguous else np.arange(count)[::-1].copy()
    memory = np.zeros((count, page_bytes), np.uint8)
    place: Place = Rows(memory, rows)
    sink = Puts(count * page_bytes, memory)
    Gatherer().plan([(*KEY, [(place, sink)])]).run()
    assert sink.straight == [is_put_straight(place)] * len(sink.straight)


@pytest.mark.parametrize("page_bytes", [4096, SMALL_PAGE_BYTES])
@pytest.mark.parametrize("more", [0, 1, 60 * 1024])
def test_a_block_longer_than_a_piece_is_no_single_piece(page_bytes: int, more: int) -> None:
    """`more` bytes than a piece, in rows that lie anyhow."""
    count = PIECE_BYTES // page_bytes + -(-more // page_bytes)
    memory, rows = memory_of(page_bytes, count), np.arange(count, dtype=np.intp)[::-1].copy()
    sink = Puts(count * page_bytes, memory)
    [found] = Gatherer().plan([(*KEY, [(Rows(memory, rows), sink)])]).run()
    assert np.array_equal(sink.slots.reshape(count, -1), memory[rows])
    assert found == expected_sum(memory[rows])
    assert len(sink.straight) == 1 + (more > 0)
    back = np.zeros_like(memory)
    assert scatter(sink.slots, back, rows) == found
    assert np.array_equal(back, memory)


@pytest.mark.parametrize("length", [1000, SMALL_PAGE_BYTES, PIECE_BYTES + 9])
def test_regions_are_stopped_between_two_rounds(length: int) -> None:
    count = 2 * ROUND_BYTES // length
    memory = np.arange(count * length, dtype=np.uint8)
    place = Regions(memory, [(n * length, length) for n in range(count)][::-1])
    wanted = np.concatenate(place.slices())
    looks = iter([False, True])
    sink = Puts(len(wanted), memory)
    with pytest.raises(Stopped):
        Gatherer().plan([(*KEY, [(place, sink)])]).run(lambda: next(looks))
    assert len(sink.straight) == ROUND_BYTES // PIECE_BYTES
    looks = iter([False, True])
    back = Regions(np.zeros_like(memory), place.regions)
    with pytest.raises(Stopped):
        Scatterer().scatter([(back, wanted, None)], lambda: next(looks))
    done = int((np.concatenate(back.slices()) == wanted).cumprod().sum())
    assert ROUND_BYTES // 2 <= done <= ROUND_BYTES + length
