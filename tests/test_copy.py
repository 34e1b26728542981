"""Copies between rows and slots: every byte, the checksum, and stopping in between."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import xxhash

from light_mem.engine import page_views
from light_mem.engine.copy import ROUND_BYTES, Stopped, new_checksum
from light_mem.engine.gather import Gatherer
from light_mem.engine.pieces import PIECE_BYTES, SMALL_PAGE_BYTES
from light_mem.engine.places import Place, Regions, Rows
from light_mem.engine.scatter import Scatterer
from light_mem.engine.sinks import FileSink, MappedSink, OpenFile
from light_mem.index.keys import key_bytes
from tests.copy_helpers import KEY, expected_sum, gather, memory_of, scatter

PAGE_SIZES = [1, 7, 100, 4096, SMALL_PAGE_BYTES - 1, SMALL_PAGE_BYTES, SMALL_PAGE_BYTES + 1]
PAGE_SIZES += [61440, PIECE_BYTES, 600 * 1024]
ROWS = {
    "one": [3],
    "contiguous": [2, 3, 4, 5, 6],
    "scattered": [8, 0, 5, 1],
    "backwards": [6, 5, 4],
    "like a range": [1, 3, 2, 4],  # first and last fit a range
}


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
