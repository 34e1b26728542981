"""The checksum of a copy is of the bytes that it moved, whatever others do to them meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import xxhash

from light_mem.engine.copy import new_checksum
from light_mem.engine.gather import Gatherer
from light_mem.engine.pieces import PIECE_BYTES, SMALL_PAGE_BYTES
from light_mem.engine.places import Regions, Rows
from light_mem.engine.scatter import Scatterer
from light_mem.engine.sinks import MappedSink
from tests.copy_helpers import KEY, expected_sum, gather, memory_of, scatter
from tests.deaths import interleave

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
