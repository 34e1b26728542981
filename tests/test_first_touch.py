"""Pages of the KV memory are mapped many at a time, before the first store to them."""

from __future__ import annotations

import mmap
import os
import resource
import sys
import weakref

import numpy as np
import numpy.typing as npt
import pytest

from light_mem.engine.first_touch import AROUND_BYTES, FirstTouch
from light_mem.engine.places import Place, Regions, Rows

NBYTES = 16 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="of Linux's page faults")


def shared_memory() -> npt.NDArray[np.uint8]:
    """Shared memory that is there, but not mapped by this process. No fixture: its mapping holds a
    descriptor, and pytest keeps what a fixture gave for longer than the test."""
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, NBYTES)
    for at in range(0, NBYTES, 1 << 20):
        os.pwrite(descriptor, bytes(1 << 20), at)
    array = np.frombuffer(mmap.mmap(descriptor, NBYTES), np.uint8)
    os.close(descriptor)
    return array


def faults(place: Place, touch: FirstTouch | None) -> int:
    """How many faults it takes to store to a place."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    if touch is not None:
        touch.before_copies([place])
    if isinstance(place, Rows):
        place.memory[place.numbers] = 1
    else:
        for part in place.slices():
            part[:] = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def places(memory: npt.NDArray[np.uint8], kind: str) -> list[Place]:
    """All of the memory, in some order, as several blocks."""
    rng = np.random.default_rng(3)
    if kind == "regions":
        cuts = np.sort(rng.choice(NBYTES // 100, 199, replace=False) * 100).tolist()
        pairs = [(a, b - a) for a, b in zip([0, *cuts], [*cuts, NBYTES], strict=True)]
        rng.shuffle(pairs)
        return [Regions(memory, [(int(a), int(n)) for a, n in pairs[at::8]]) for at in range(8)]
    row_bytes = int(kind)
    rows = NBYTES // row_bytes
    table = memory[: rows * row_bytes].reshape(rows, row_bytes)
    return [Rows(table, part) for part in np.array_split(rng.permutation(rows), 8)]


@pytest.mark.parametrize("kind", ["64", "3840", "8192", "61440", "1000000", "regions"])
def test_a_store_to_memory_that_was_touched_seldom_faults(kind: str) -> None:
    blocks, touch = places(shared_memory(), kind), FirstTouch()
    # Where the allocator takes memory from changes with what was freed before: its own faults are
    # over after this.
    for place in places(np.zeros(NBYTES, np.uint8), kind) * 2:
        faults(place, FirstTouch())
    first = [faults(place, touch) for place in blocks]
    again = [faults(place, touch) for place in blocks]
    pages = NBYTES // mmap.PAGESIZE
    # One for each AROUND_BYTES, some for rows that reach over an edge, and this program's own.
    assert sum(first) < pages // 8
    assert sum(again) < pages // 32


def test_without_it_every_page_faults() -> None:
    blocks = places(shared_memory(), "8192")
    assert sum(faults(place, None) for place in blocks) >= NBYTES // mmap.PAGESIZE


def test_memory_that_is_not_there_yet_comes_into_being_only_where_it_is_stored_to() -> None:
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, NBYTES)
    memory = np.frombuffer(mmap.mmap(descriptor, NBYTES), np.uint8).reshape(-1, 4096)
    numbers = np.arange(0, len(memory), 32)
    FirstTouch().before_copies([Rows(memory, numbers)])
    assert os.fstat(descriptor).st_blocks * 512 == len(numbers) * 4096
    os.close(descriptor)


def test_rows_and_regions_of_several_memories_in_turn() -> None:
    touch = FirstTouch()
    for nbytes in (100, 3 * AROUND_BYTES, 200):
        memory = np.zeros(nbytes, np.uint8)
        for place in (
            Regions(memory, [(nbytes - 1, 1), (0, nbytes), (0, 0), (nbytes, 0)]),
            Regions(memory, []),
            Rows(
                memory.reshape(-1, 20) if nbytes % 20 == 0 else memory.reshape(3, -1), np.array([2])
            ),
        ):
            touch.before_copies([place])
            touch.before_copies([place])
        assert not memory.any()


def test_memory_is_touched_once_and_other_memory_anew() -> None:
    touch = FirstTouch()
    for _ in range(2):  # the second is touched as the first was
        place = Rows(shared_memory().reshape(-1, 8192), np.arange(NBYTES // 8192))
        assert faults(place, touch) < NBYTES // mmap.PAGESIZE // 8
        its = touch._memories[Rows]
        assert its.array is place.memory
        assert its._touched.all()
        assert its.left == 0


def test_what_is_left_is_counted_by_what_faults_once() -> None:
    memory = np.zeros(8 * AROUND_BYTES, np.uint8)
    table, touch = memory.reshape(-1, 4096), FirstTouch()
    touch.before_copies([Rows(table, np.arange(0, 40))])  # some sixteen rows in each
    left = touch._memories[Rows].left
    touched = touch._memories[Rows]._touched
    assert left == len(touched) - np.count_nonzero(touched) > 0
    touch.before_copies([Rows(table, np.arange(0, 40))])
    assert touch._memories[Rows].left == left


@pytest.mark.parametrize(
    "row_bytes", [*(n << 10 for n in (16, 48, 96, 160)), 100_000, 140_000, 250_000]
)
@pytest.mark.parametrize("offset", [0, 20_000, 40_000, 60_000])
def test_a_row_whose_neighbours_were_touched_is_touched_to_its_ends(
    offset: int, row_bytes: int
) -> None:
    """Wherever the memory begins."""
    room = np.zeros(NBYTES + 2 * AROUND_BYTES, np.uint8)
    start = -room.ctypes.data % AROUND_BYTES + offset
    memory = room[start : start + NBYTES]
    rows = NBYTES // row_bytes
    table, touch = memory[: rows * row_bytes].reshape(rows, row_bytes), FirstTouch()
    before = memory.ctypes.data % AROUND_BYTES
    for row in [*range(0, rows, 3), *range(1, rows, 3), *range(2, rows, 3)]:
        touch.before_copies([Rows(table, np.array([row]))])
        first, last = row * row_bytes + before, (row + 1) * row_bytes - 1 + before
        touched = touch._memories[Rows]._touched
        # A row of up to 8 KiB may reach over an edge, a longer one is touched at both ends.
        assert touched[first // AROUND_BYTES : last // AROUND_BYTES + 1].all()


def test_only_what_needs_it_is_touched_and_nobody_is_asked_when_all_has_been() -> None:
    memory = np.zeros(8 * AROUND_BYTES, np.uint8).reshape(-1, AROUND_BYTES)
    touch, other = FirstTouch(), np.zeros((2, AROUND_BYTES), np.uint8)
    places = [Rows(memory, np.array([row])) for row in range(8)]
    asked: list[int] = []

    def needed(place: Place) -> bool:
        asked.append(int(place.numbers[0]))
        return len(asked) % 2 == 0

    touch.before_copies(places, needed)
    assert asked == list(range(8))
    assert touch._memories[Rows].left > 0
    touch.before_copies(places)
    assert touch._memories[Rows].left == 0
    asked.clear()
    touch.before_copies(places, needed)
    assert not asked
    touch.before_copies([*places, Rows(other, np.array([0]))], needed)  # another memory among them
    assert asked == [*range(8), 0]
    touch.before_copies([], needed)


def test_memory_of_a_block_alone_is_left_alone_and_none_is_kept() -> None:
    touch = FirstTouch()
    alone = [Regions(np.zeros(1 << 20, np.uint8), [(0, 1 << 20)]) for _ in range(2)]
    touch.before_copies(alone)
    assert not touch._memories
    memory = np.zeros((16, 1 << 20), np.uint8)
    touch.before_copies([*alone, Rows(memory, np.arange(3))])
    assert list(touch._memories) == [Rows]
    kept = weakref.ref(memory)
    touch.forget()
    del memory
    assert kept() is None
