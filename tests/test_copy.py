"""Copies between rows and slots: every byte, the checksum, and stopping in between."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash

from light_mem.engine.base import never
from light_mem.engine.copy import Copier, Stopped, new_checksum
from light_mem.engine.pieces import PIECE_BYTES, SMALL_PAGE_BYTES, is_one_piece, is_put_straight
from light_mem.engine.places import Place, Regions, Rows
from light_mem.engine.sinks import FileSink, MappedSink
from light_mem.index.keys import key_bytes
from tests.deaths import interleave

KEY = (0x0123456789ABCDEF, 0xFEDCBA9876543210)
PAGE_SIZES = [1, 7, 100, 4096, SMALL_PAGE_BYTES - 1, SMALL_PAGE_BYTES, SMALL_PAGE_BYTES + 1]
PAGE_SIZES += [61440, PIECE_BYTES, 600 * 1024]
ROWS = {
    "one": [3],
    "contiguous": [2, 3, 4, 5, 6],
    "scattered": [8, 0, 5, 1],
    "backwards": [6, 5, 4],
    "like a range": [1, 3, 2, 4],  # first and last fit a range
}


def gather(
    copier: Copier,
    memory: np.ndarray,
    rows: np.ndarray,
    slots: np.ndarray,
    checksum: xxhash.xxh3_64,
    stopped: Callable[[], bool],
) -> None:
    copier.gather(Rows(memory, rows), MappedSink(slots.reshape(-1)), checksum, stopped)


def scatter(
    copier: Copier,
    slots: np.ndarray,
    memory: np.ndarray,
    rows: np.ndarray,
    checksum: xxhash.xxh3_64 | None,
    stopped: Callable[[], bool],
) -> None:
    copier.scatter(slots.reshape(-1), Rows(memory, rows), checksum, stopped)


def not_stopped() -> bool:
    return never(0)


def memory_of(page_bytes: int, rows: int = 9) -> np.ndarray:
    return np.random.default_rng(page_bytes).integers(0, 256, (rows, page_bytes), np.uint8)


def expected_sum(data: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(key_bytes(*KEY) + data.tobytes())


def layout(kind: str, page_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Memory and rows; enough rows for several pieces of small pages."""
    if kind == "many":
        count = PIECE_BYTES // page_bytes * 2 + 3 if page_bytes >= 4096 else 5000
        memory = memory_of(page_bytes, count)
        rows = np.random.default_rng(1).permutation(count)
    else:
        memory, rows = memory_of(page_bytes), np.array(ROWS[kind])
    return memory, rows.astype(np.intp)


@pytest.mark.parametrize("kind", [*ROWS, "many"])
@pytest.mark.parametrize("page_bytes", PAGE_SIZES)
def test_gather_and_scatter_move_every_byte_and_sum_it_with_the_key(
    page_bytes: int, kind: str
) -> None:
    memory, rows = layout(kind, page_bytes)
    original = memory.copy()
    slots = np.full((len(rows) + 2, page_bytes), 0xEE, np.uint8)
    copier, checksum = Copier(), new_checksum(*KEY)
    gather(copier, memory, rows, slots[1:-1], checksum, not_stopped)
    wanted = original[rows]
    assert np.array_equal(slots[1:-1], wanted)
    assert (slots[[0, -1]] == 0xEE).all()
    assert np.array_equal(memory, original)
    assert checksum.intdigest() == expected_sum(wanted)

    back = np.full_like(memory, 0xEE)
    checksum = new_checksum(*KEY)
    scatter(copier, slots[1:-1], back, rows, checksum, not_stopped)
    assert np.array_equal(back[rows], wanted)
    untouched = np.setdiff1d(np.arange(len(memory)), rows)
    assert (back[untouched] == 0xEE).all()
    assert np.array_equal(slots[1:-1], wanted)
    assert checksum.intdigest() == expected_sum(wanted)

    back[:] = 0xEE
    scatter(copier, slots[1:-1], back, rows, None, not_stopped)
    assert np.array_equal(back[rows], wanted)


@pytest.mark.parametrize("kind", [*ROWS, "many"])
@pytest.mark.parametrize("page_bytes", PAGE_SIZES)
def test_a_gather_into_a_file_leaves_what_one_into_memory_leaves(
    tmp_path: Path, page_bytes: int, kind: str
) -> None:
    memory, rows = layout(kind, page_bytes)
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    checksum = new_checksum(*KEY)
    Copier().gather(Rows(memory, rows), FileSink(descriptor, 4096), checksum, not_stopped)
    os.close(descriptor)
    raw = (tmp_path / "file").read_bytes()
    assert not any(raw[:4096])
    assert raw[4096:] == memory[rows].tobytes()
    assert checksum.intdigest() == expected_sum(memory[rows])


def test_a_block_in_several_runs_has_the_sum_of_its_bytes_in_order() -> None:
    memory = memory_of(100)
    rows = np.array([7, 2, 3, 0], np.intp)
    slots = np.zeros((10, 100), np.uint8)
    copier, checksum = Copier(), new_checksum(*KEY)
    gather(copier, memory, rows[:1], slots[5:6], checksum, not_stopped)
    gather(copier, memory, rows[1:], slots[1:4], checksum, not_stopped)
    assert checksum.intdigest() == expected_sum(memory[rows])


def test_the_sum_depends_on_the_key() -> None:
    digests = {new_checksum(*key).intdigest() for key in [(0, 0), (1, 0), (0, 1), (1, 1)]}
    assert len(digests) == 4


ORDERS = [
    pytest.param(200, list(range(6)), id="straight"),
    pytest.param(200, [5, 2, 0, 4, 1, 3], id="small pages"),
    pytest.param(SMALL_PAGE_BYTES, [5, 2, 0, 4, 1, 3], id="pages"),
    pytest.param(PIECE_BYTES + 1, [2, 0, 1], id="large pages"),
]


@pytest.mark.parametrize(("page_bytes", "order"), ORDERS)
def test_the_sum_of_a_gather_is_never_of_what_others_do_to_the_slots(
    page_bytes: int, order: list[int]
) -> None:
    """A process gone wild writes to the slots at any moment: the block must not verify then."""
    memory, rows = memory_of(page_bytes, len(order)), np.array(order, np.intp)
    wanted = expected_sum(memory[rows])
    copier = Copier()

    def summed_gather() -> int:
        checksum = new_checksum(*KEY)
        gather(copier, memory, rows, slots, checksum, not_stopped)
        return checksum.intdigest()

    at, reached = 1, True
    while reached:
        slots = np.zeros((len(rows), page_bytes), np.uint8)
        digest, reached = interleave(summed_gather, lambda: slots.fill(0xEE), at)  # noqa: B023
        assert digest == wanted
        at += 1
    assert at > 30


@pytest.mark.parametrize(("page_bytes", "order"), ORDERS)
def test_a_scatter_whose_sum_fits_has_copied_the_bytes_of_that_sum(
    page_bytes: int, order: list[int]
) -> None:
    """Whatever happens to the slots during the copy: wrong bytes never come with a right sum."""
    original, rows = memory_of(page_bytes, len(order)), np.array(order, np.intp)
    wanted = expected_sum(original)
    copier = Copier()

    def summed_scatter() -> int:
        checksum = new_checksum(*KEY)
        scatter(copier, slots, memory, rows, checksum, not_stopped)
        return checksum.intdigest()

    fitted = []
    at, reached = 1, True
    while reached:
        slots, memory = original.copy(), np.zeros_like(original)
        digest, reached = interleave(summed_scatter, lambda: slots.fill(0xEE), at)  # noqa: B023
        fitted.append(digest == wanted)
        if fitted[-1]:
            assert np.array_equal(memory[rows], original)
        at += 1
    assert {True, False} == set(fitted)


@pytest.mark.parametrize("page_bytes", [100, SMALL_PAGE_BYTES + 1, 600 * 1024])
@pytest.mark.parametrize("straight", [True, False])
def test_a_copy_stops_between_two_pieces(page_bytes: int, straight: bool) -> None:
    count = max(4, 3 * PIECE_BYTES // page_bytes)
    memory = memory_of(page_bytes, count)
    rows = np.arange(count, dtype=np.intp)
    if not straight:
        rows = rows[::-1].copy()
    slots = np.zeros((count, page_bytes), np.uint8)

    for move in (gather, scatter):
        asked = 0

        def stopped() -> bool:
            nonlocal asked
            asked += 1
            return asked == 3

        target = np.zeros_like(memory)
        arguments = (memory, rows, slots) if move is gather else (memory, target, rows)
        with pytest.raises(Stopped):
            move(Copier(), *arguments, new_checksum(*KEY), stopped)
        assert asked == 3
        moved = slots if move is gather else target[rows]
        wanted = memory[rows] if move is gather else memory
        done = int((moved == wanted).reshape(-1).cumprod().sum())
        assert PIECE_BYTES < done <= 2 * PIECE_BYTES + 2 * page_bytes


@pytest.mark.parametrize("page_bytes", [4096, SMALL_PAGE_BYTES])
@pytest.mark.parametrize("more", [0, 1, 60 * 1024])
def test_a_block_longer_than_a_piece_is_no_single_piece(page_bytes: int, more: int) -> None:
    """`more` bytes than a piece, in rows that lie anyhow: asked whether to stop before each."""
    count = PIECE_BYTES // page_bytes + -(-more // page_bytes)
    memory, rows = memory_of(page_bytes, count), np.arange(count, dtype=np.intp)[::-1].copy()
    asked: list[None] = []

    def stopped() -> bool:
        asked.append(None)
        return False

    slots, checksum = np.zeros((count, page_bytes), np.uint8), new_checksum(*KEY)
    gather(Copier(), memory, rows, slots, checksum, stopped)
    assert np.array_equal(slots, memory[rows])
    assert checksum.intdigest() == expected_sum(memory[rows])
    back = np.zeros_like(memory)
    scatter(Copier(), slots, back, rows, None, stopped)
    assert np.array_equal(back, memory)
    assert len(asked) == 2 * (1 + (more > 0))


def test_large_rows_are_summed_up_after_they_were_put() -> None:
    memory, rows = memory_of(SMALL_PAGE_BYTES, 4), np.array([2, 0, 1], np.intp)
    checksum, seen = new_checksum(*KEY), []

    class Spy:
        by_calls = True

        def put(self, at: int, piece: np.ndarray) -> None:
            raise AssertionError

        def put_rows(self, at: int, *_: object) -> None:
            seen.append(checksum.intdigest())

    Copier().gather(Rows(memory, rows), Spy(), checksum, not_stopped)
    assert seen == [expected_sum(memory[:0])]
    assert checksum.intdigest() == expected_sum(memory[rows])


def test_a_block_of_one_piece_is_summed_up_after_it_was_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is checksummed must be as new as what was copied, or newer."""
    memory, source = np.zeros((9, 64), np.uint8), np.arange(256, dtype=np.uint8)
    put = Copier._put

    def put_and_change(self: Copier, *arguments: np.ndarray) -> None:
        put(self, *arguments)
        source[100] ^= 1

    monkeypatch.setattr(Copier, "_put", put_and_change)
    found = Copier().scatter_whole(5, 6, Rows(memory, np.array([8, 0, 5, 1])), source, True)
    checksum = new_checksum(5, 6)
    checksum.update(source.data)
    assert found == checksum.intdigest()
    assert memory[0, 100 - 64] == 100


def test_blocks_of_as_many_rows_of_other_memory_are_copied_as_they_are() -> None:
    copier, numbers = Copier(), np.array([3, 0, 2])
    for turn, row_bytes in enumerate([64, 100, 64, 40, SMALL_PAGE_BYTES, 100]):
        memory = np.full((4, row_bytes), turn, np.uint8) + np.arange(4, dtype=np.uint8)[:, None]
        slots = np.zeros(3 * row_bytes, np.uint8)
        found = copier.gather_whole(turn, 7, Rows(memory, numbers), MappedSink(slots))
        wanted = memory[numbers].tobytes()
        assert slots.tobytes() == wanted
        assert found == xxhash.xxh3_64_intdigest(key_bytes(turn, 7) + wanted)
        other = np.zeros_like(memory)
        again = copier.scatter_whole(turn, 7, Rows(other, numbers), slots, verify=True)
        assert again == found
        assert np.array_equal(other[numbers], memory[numbers])
        assert not other[1].any()


def test_memory_that_was_copied_from_is_let_go_of() -> None:
    copier, memory = Copier(), np.zeros((9, 64), np.uint8)
    rows = Rows(memory, np.array([1, 2]))
    copier.gather_whole(1, 2, rows, MappedSink(np.zeros(128, np.uint8)))
    gone = weakref.ref(memory)
    del memory, rows
    assert gone() is not None
    copier.forget()
    assert gone() is None


# --- regions ------------------------------------------------------------------------------------

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
    checksum = new_checksum(*KEY)
    if by_calls:
        descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        Copier().gather(place, FileSink(descriptor, 0), checksum, not_stopped)
        os.close(descriptor)
        found = (tmp_path / "file").read_bytes()
    else:
        slots = np.full(len(wanted) + 1, 0xEE, np.uint8)
        Copier().gather(place, MappedSink(slots), checksum, not_stopped)
        found = slots[:-1].tobytes()
        assert slots[-1] == 0xEE
    assert found == wanted
    assert checksum.intdigest() == xxhash.xxh3_64_intdigest(key_bytes(*KEY) + wanted)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in REGIONS if kind[:7] != "a long "])  # overlaps
def test_regions_are_scattered_in_order(kind: str, verify: bool) -> None:
    place, wanted = regions(kind)
    original = place.memory.copy()
    place.memory[:] = ~original
    checksum = new_checksum(*KEY)
    source = np.frombuffer(wanted, np.uint8)
    Copier().scatter(source, place, checksum if verify else None, not_stopped)
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
        super().__init__(np.zeros(nbytes, np.uint8))
        self.memory = memory
        self.straight: list[bool] = []

    def put(self, at: int, piece: np.ndarray) -> None:
        self.straight.append(bool(np.shares_memory(piece, self.memory)))
        super().put(at, piece)

    def put_rows(self, at: int, memory: np.ndarray, rows: np.ndarray) -> None:
        self.straight.append(memory is self.memory)
        super().put_rows(at, memory, rows)


@pytest.mark.parametrize("kind", REGIONS)
def test_short_regions_are_stored_by_one_call_a_piece(kind: str) -> None:
    place, wanted = regions(kind)
    sink = Puts(len(wanted), place.memory)
    Copier().gather(place, sink, new_checksum(*KEY), not_stopped)
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
    if is_one_piece(place):
        Copier().gather_whole(*KEY, place, sink)
    else:
        Copier().gather(place, sink, new_checksum(*KEY), not_stopped)
    assert sink.straight == [is_put_straight(place)] * len(sink.straight)


@pytest.mark.parametrize("kind", ["short", "long", "longer than a piece"])
def test_regions_are_stopped_between_two_pieces(kind: str) -> None:
    place, wanted = regions(kind)
    looks = iter([False, True])
    sink = Puts(len(wanted), place.memory)
    with pytest.raises(Stopped):
        Copier().gather(place, sink, new_checksum(*KEY), lambda: next(looks))
    assert len(sink.straight) == 1
    original = place.memory.copy()
    place.memory[:] = ~original
    looks = iter([False, True])
    with pytest.raises(Stopped):
        Copier().scatter(np.frombuffer(wanted, np.uint8), place, None, lambda: next(looks))
    left = sum(
        int((place.memory[o : o + n] != original[o : o + n]).any()) for o, n in place.regions
    )
    assert 0 < left < len(place.regions) or kind == "longer than a piece"
