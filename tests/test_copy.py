"""Copies between rows and slots: every byte, the checksum, and stopping in between."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import xxhash

from light_mem.engine import page_views
from light_mem.engine.copy import ROUND_BYTES, Stopped, new_checksum
from light_mem.engine.gather import Gatherer
from light_mem.engine.pieces import PIECE_BYTES, SMALL_PAGE_BYTES, is_put_straight
from light_mem.engine.places import Place, Regions, Rows
from light_mem.engine.scatter import Scatterer
from light_mem.engine.sinks import FileSink, MappedSink, OpenFile
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
    gatherer: Gatherer,
    memory: np.ndarray,
    rows: np.ndarray,
    slots: np.ndarray,
    stopped: Callable[[], bool] | None = None,
) -> int:
    """Gather a block of KEY; its checksum."""
    parts = [(Rows(memory, rows), MappedSink(slots.reshape(-1)))]
    [found] = gatherer.plan([(*KEY, parts)]).run(stopped)
    return found


def scatter(
    slots: np.ndarray,
    memory: np.ndarray,
    rows: np.ndarray,
    stopped: Callable[[], bool] | None = None,
) -> int:
    """Scatter a block of KEY; its checksum."""
    checksum = new_checksum(*KEY)
    Scatterer().scatter([(Rows(memory, rows), slots.reshape(-1), checksum)], stopped)
    return checksum.intdigest()


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
@pytest.mark.parametrize("loads", [False, True])
def test_gather_and_scatter_move_every_byte_and_sum_it_with_the_key(
    loads: bool, page_bytes: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_views, "LOADS_BEFORE_STORES", loads)
    memory, rows = layout(kind, page_bytes)
    original = memory.copy()
    slots = np.full((len(rows) + 2, page_bytes), 0xEE, np.uint8)
    found = gather(Gatherer(), memory, rows, slots[1:-1])
    wanted = original[rows]
    assert np.array_equal(slots[1:-1], wanted)
    assert (slots[[0, -1]] == 0xEE).all()
    assert np.array_equal(memory, original)
    assert found == expected_sum(wanted)

    back = np.full_like(memory, 0xEE)
    found = scatter(slots[1:-1], back, rows)
    assert np.array_equal(back[rows], wanted)
    untouched = np.setdiff1d(np.arange(len(memory)), rows)
    assert (back[untouched] == 0xEE).all()
    assert np.array_equal(slots[1:-1], wanted)
    assert found == expected_sum(wanted)

    back[:] = 0xEE
    Scatterer().scatter([(Rows(back, rows), slots[1:-1].reshape(-1), None)])
    assert np.array_equal(back[rows], wanted)


@pytest.mark.parametrize("kind", [*ROWS, "many"])
@pytest.mark.parametrize("page_bytes", PAGE_SIZES)
def test_a_gather_into_a_file_leaves_what_one_into_memory_leaves(
    tmp_path: Path, page_bytes: int, kind: str
) -> None:
    memory, rows = layout(kind, page_bytes)
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    sink = FileSink(OpenFile(descriptor), 4096)
    [found] = Gatherer().plan([(*KEY, [(Rows(memory, rows), sink)])]).run()
    os.close(descriptor)
    raw = (tmp_path / "file").read_bytes()
    assert not any(raw[:4096])
    assert raw[4096:] == memory[rows].tobytes()
    assert found == expected_sum(memory[rows])


@pytest.mark.parametrize("page_bytes", [100, SMALL_PAGE_BYTES + 1])
def test_a_block_in_several_runs_has_the_sum_of_its_bytes_in_order(page_bytes: int) -> None:
    """Also where the parts are copied in different ways."""
    count = 2 * PIECE_BYTES // page_bytes + 8
    memory = memory_of(page_bytes, count + 1)
    rows = np.random.default_rng(3).permutation(count).astype(np.intp)
    rows[1 : count - 2] = np.arange(1, count - 2)
    slots = np.zeros((count + 2, page_bytes), np.uint8)
    bounds = [0, 1, count - 2, count]
    parts = []
    for start, end in pairwise(bounds):
        target = slots[start + 1 : end + 1].reshape(-1)
        parts.append((Rows(memory, rows[start:end]), MappedSink(target)))
    [found] = Gatherer().plan([(*KEY, parts)]).run()
    assert found == expected_sum(memory[rows])
    assert np.array_equal(slots[1:-1], memory[rows])
    checksum, back = new_checksum(*KEY), np.zeros_like(memory)
    moves = [
        (Rows(back, rows[start:end]), slots[start + 1 : end + 1].reshape(-1), checksum)
        for start, end in pairwise(bounds)
    ]
    Scatterer().scatter(moves)
    assert checksum.intdigest() == found
    assert np.array_equal(back[rows], memory[rows])


def test_blocks_of_every_kind_are_copied_by_one_call() -> None:
    """In the order in which they come, each with its own sum."""
    gatherer, blocks, wanted, targets, moves = Gatherer(), [], [], [], []
    for n, page_bytes in enumerate(PAGE_SIZES * 2):
        memory, rows = layout(list(ROWS)[n % len(ROWS)], page_bytes)
        places: list[Place] = [Rows(memory, rows)]
        flat = memory.reshape(-1)
        if memory.nbytes > 100:
            places.append(Regions(flat, [(90, 7), (3, 80)]))
        if n % 2:
            places.reverse()
        for place in places:
            expected = b"".join(part.tobytes() for part in place.slices())
            slots = np.zeros(len(expected), np.uint8)
            blocks.append((n, len(expected), [(place, MappedSink(slots))]))
            wanted.append(xxhash.xxh3_64_intdigest(key_bytes(n, len(expected)) + expected))
            checksum = new_checksum(n, len(expected))
            target = np.zeros_like(memory)
            if isinstance(place, Rows):
                back: Place = Rows(target, place.numbers)
            else:
                back = Regions(target.reshape(-1), place.regions)
            moves.append((back, slots, checksum))
            targets.append((slots, expected))
    assert gatherer.plan(blocks).run() == wanted
    assert [slots.tobytes() for slots, _ in targets] == [expected for _, expected in targets]
    Scatterer().scatter(moves)
    assert [checksum.intdigest() for _, _, checksum in moves] == wanted
    for (back, _, _), (_, expected) in zip(moves, targets, strict=True):
        assert b"".join(part.tobytes() for part in back.slices()) == expected


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
    gatherer = Gatherer()
    at, reached = 1, True
    while reached:
        slots = np.zeros((len(rows), page_bytes), np.uint8)
        digest, reached = interleave(
            lambda: gather(gatherer, memory, rows, slots),  # noqa: B023
            lambda: slots.fill(0xEE),  # noqa: B023
            at,
        )
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
    fitted = []
    at, reached = 1, True
    while reached:
        slots, memory = original.copy(), np.zeros_like(original)
        digest, reached = interleave(
            lambda: scatter(slots, memory, rows),  # noqa: B023
            lambda: slots.fill(0xEE),  # noqa: B023
            at,
        )
        fitted.append(digest == wanted)
        if fitted[-1]:
            assert np.array_equal(memory[rows], original)
        at += 1
    assert {True, False} == set(fitted)


@pytest.mark.parametrize("page_bytes", [100, SMALL_PAGE_BYTES + 1, 600 * 1024])
@pytest.mark.parametrize("straight", [True, False])
def test_a_copy_stops_between_two_rounds(page_bytes: int, straight: bool) -> None:
    count = 3 * ROUND_BYTES // page_bytes
    memory = np.resize(memory_of(1 << 16, 1), (count, page_bytes))
    memory += np.arange(count, dtype=np.uint8)[:, None] | 1
    rows = np.arange(count, dtype=np.intp)
    if not straight:
        rows = rows[::-1].copy()
    slots = np.zeros((count, page_bytes), np.uint8)
    target = np.zeros_like(memory)

    def copy(stopped: Callable[[], bool]) -> None:
        gather(Gatherer(), memory, rows, slots, stopped)

    def copy_back(stopped: Callable[[], bool]) -> None:
        scatter(memory, target, rows, stopped)

    for move in (copy, copy_back):
        asked = 0

        def stopped() -> bool:
            nonlocal asked
            asked += 1
            return asked == 3

        with pytest.raises(Stopped):
            move(stopped)
        assert asked == 3
        moved, wanted = (slots, memory[rows]) if move is copy else (target[rows], memory)
        done = int((moved == wanted).reshape(-1).cumprod().sum())
        assert ROUND_BYTES < done <= 2 * ROUND_BYTES + 2 * page_bytes


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


@pytest.mark.parametrize("page_bytes", [100, SMALL_PAGE_BYTES, PIECE_BYTES + 1])
def test_pages_are_summed_up_after_they_were_put(page_bytes: int) -> None:
    """From the cache then; and the kernel finds them mapped."""
    memory, rows = memory_of(page_bytes, 4), np.array([2, 0, 1], np.intp)
    checksum, seen = new_checksum(*KEY), []

    class Spy(MappedSink):
        def storing(self, at: int, nbytes: int) -> tuple[Callable[..., object], object]:
            store, first = super().storing(at, nbytes)
            return lambda *arguments: spied(store, *arguments), first

        def storing_rows(self, *of: Any) -> tuple[Callable[..., object], tuple[object, ...]]:
            store, arguments = super().storing_rows(*of)
            return lambda *arguments: spied(store, *arguments), arguments

    def spied(store: Callable[..., object], *arguments: object) -> None:
        seen.append(checksum.intdigest())
        store(*arguments)

    slots = np.zeros(3 * page_bytes, np.uint8)
    Gatherer().gather_part(Rows(memory, rows), Spy(slots), checksum)
    assert seen[0] == expected_sum(memory[:0])
    assert checksum.intdigest() == expected_sum(memory[rows])


@pytest.mark.parametrize("page_bytes", [64, SMALL_PAGE_BYTES, PIECE_BYTES + 1])
def test_slots_are_summed_up_after_they_were_copied(page_bytes: int) -> None:
    """What is checksummed must be as new as what was copied, or newer."""
    memory, source = np.zeros((9, page_bytes), np.uint8), memory_of(page_bytes, 4).reshape(-1)
    was = source.copy()

    class Changes:
        """A checksum before which the slots change."""

        def __init__(self) -> None:
            self.seen = b""

        def update(self, piece: np.ndarray) -> None:
            source[:] ^= 1
            self.seen += bytes(piece)

    checksum = Changes()
    rows = np.array([8, 0, 5, 1])
    Scatterer().scatter([(Rows(memory, rows), source, cast("xxhash.xxh3_64", checksum))])
    first = min(PIECE_BYTES // page_bytes, 4) * page_bytes or PIECE_BYTES
    assert memory[rows].reshape(-1)[:first].tobytes() == was[:first].tobytes()
    assert checksum.seen[:first] == (was[:first] ^ 1).tobytes()


@pytest.mark.parametrize("length", [1000, 100_000])
def test_joined_regions_are_summed_up_after_they_were_copied(length: int) -> None:
    source = np.random.default_rng(1).integers(0, 256, 6 * length, np.uint8)
    was, memory, seen = source.copy(), np.zeros(20 * length, np.uint8), []

    class Changes:
        def update(self, piece: np.ndarray) -> None:
            source[:] ^= 1
            seen.append(bytes(piece))

    place = Regions(memory, [(n * 2 * length, length) for n in (5, 0, 3, 1, 4, 2)])
    Scatterer().scatter([(place, source, cast("xxhash.xxh3_64", Changes()))])
    first = len(seen[0])
    assert np.concatenate(place.slices())[:first].tobytes() == was[:first].tobytes()
    assert seen[0] == (was[:first] ^ 1).tobytes()


def test_blocks_of_as_many_rows_of_other_memory_are_copied_as_they_are() -> None:
    gatherer, numbers = Gatherer(), np.array([3, 0, 2])
    for turn, row_bytes in enumerate([64, 100, 64, 40, SMALL_PAGE_BYTES, 100]):
        memory = np.full((4, row_bytes), turn, np.uint8) + np.arange(4, dtype=np.uint8)[:, None]
        slots = np.zeros(3 * row_bytes, np.uint8)
        assert gather(gatherer, memory, numbers, slots) == expected_sum(memory[numbers])
        assert slots.tobytes() == memory[numbers].tobytes()
        other = np.zeros_like(memory)
        assert scatter(slots, other, numbers) == expected_sum(memory[numbers])
        assert np.array_equal(other[numbers], memory[numbers])
        assert not other[1].any()


def test_memory_that_was_copied_is_let_go_of() -> None:
    gatherer, scatterer, memory = Gatherer(), Scatterer(), np.zeros((9, 64), np.uint8)
    rows, slots = Rows(memory, np.array([1, 2])), np.zeros(128, np.uint8)
    gatherer.plan([(*KEY, [(rows, MappedSink(slots))])]).run()
    scatterer.scatter([(rows, slots, None)])
    gone = weakref.ref(memory)
    del memory, rows
    assert gone() is not None
    gatherer.forget()
    assert gone() is not None
    scatterer.forget()
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
