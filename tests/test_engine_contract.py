"""What every storage engine promises; each test runs against all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from light_mem.engine.base import BlockIO, Outcome, StorageEngine
from light_mem.engine.places import Rows
from light_mem.errors import InvalidArgumentError
from light_mem.index import keys as keymath
from tests.engine_helpers import COPIED_AND_STORED, PAGE, Block, Rig, let_go, open_local
from tests.memory_engine import MemoryStorageEngine
from tests.payload import block_bytes_of

STORED, PRESENT, LOADED = Outcome.STORED, Outcome.PRESENT, Outcome.LOADED
MISSING, STOPPED, NO_ROOM = Outcome.MISSING, Outcome.STOPPED, Outcome.NO_ROOM

MakeEngine = Callable[[int, int], StorageEngine]  # pages, page bytes


@pytest.fixture(params=["local", "memory"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeEngine]:
    """Makes engines with room for a number of pages of a size, all in one shard."""
    made: list[StorageEngine] = []

    def make(pages: int, page_bytes: int = PAGE) -> StorageEngine:
        if request.param == "memory":
            engine: StorageEngine = MemoryStorageEngine(page_bytes, pages)
        else:
            engine = open_local(tmp_path / str(len(made)), pages, page_bytes=page_bytes)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()
        engine.close()  # does nothing
    let_go(*made)


# --- round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("page_bytes", [1, 7, 64, 100, 4096, 12287, 12289, 61440])
@pytest.mark.parametrize("pages", [1, 2, 5])
def test_what_is_loaded_is_what_was_stored(make: MakeEngine, page_bytes: int, pages: int) -> None:
    rig = Rig(make(3 * pages + 1, page_bytes), page_bytes)
    blocks = [Block(1, pages), Block(2**127 + 5, pages), Block(2**64 - 1, 1)]
    assert rig.write(*blocks) == [COPIED_AND_STORED] * 3
    assert rig.find(*blocks, Block(9)) == [True, True, True, False]
    assert rig.read(*blocks, Block(9)) == [LOADED, LOADED, LOADED, MISSING]
    assert rig.read(*reversed(blocks)) == [LOADED] * 3


def test_a_block_of_one_page_and_a_short_block_take_only_their_pages(make: MakeEngine) -> None:
    rig = Rig(make(8, PAGE))
    assert rig.write(Block(1, 1), Block(2, 4), Block(3, 3)) == [COPIED_AND_STORED] * 3
    assert rig.engine.stats()["used_slots"] == rig.engine.stats()["slots"] == 8
    assert rig.engine.stats()["blocks"] == 3
    assert rig.read(Block(1, 1), Block(2, 4), Block(3, 3)) == [LOADED] * 3


def test_a_block_of_another_length_is_missing_and_stays_stored(make: MakeEngine) -> None:
    rig = Rig(make(8, PAGE))
    rig.write(Block(1, 3))
    assert rig.read(Block(1, 2), Block(1, 4), Block(1, 3)) == [MISSING, MISSING, LOADED]
    lengths = np.array([3 * PAGE, 2 * PAGE])
    keys = keymath.as_keys([1, 1])
    assert rig.engine.find(keys, nbytes=lengths).tolist() == [True, False]


def test_a_block_written_with_another_length_takes_the_place_of_the_old_one(
    make: MakeEngine,
) -> None:
    rig = Rig(make(8, PAGE))
    rig.write(Block(1, 3), Block(2))
    assert rig.write(Block(1, 2)) == [COPIED_AND_STORED]
    assert rig.read(Block(1, 3), Block(1, 2), Block(2)) == [MISSING, LOADED, LOADED]
    assert rig.engine.stats()["used_slots"] == 3
    assert rig.engine.stats()["blocks"] == 2


def test_a_block_is_stored_once_however_often_it_is_written(make: MakeEngine) -> None:
    rig = Rig(make(8, PAGE))
    outcomes = rig.write(Block(1, 2), Block(1, 2), Block(2), Block(1, 2))
    assert outcomes[0] == COPIED_AND_STORED
    assert outcomes[2] == COPIED_AND_STORED
    assert [o[-1] for o in outcomes] == [STORED, PRESENT, STORED, PRESENT]
    assert rig.write(Block(1, 2)) == [(PRESENT,)]
    assert rig.engine.stats()["blocks"] == 2
    assert rig.engine.stats()["used_slots"] == 3
    assert rig.read(Block(1, 2), Block(1, 2)) == [LOADED, LOADED]


def test_an_empty_batch_is_nothing(make: MakeEngine) -> None:
    rig = Rig(make(2, PAGE))
    assert rig.write() == []
    assert rig.read() == []
    assert rig.delete() == 0
    assert rig.engine.find(keymath.as_keys([])).shape == (0,)


def test_a_block_from_consecutive_rows_loads_into_scattered_ones(make: MakeEngine) -> None:
    engine = make(4, 100)
    memory = np.zeros((8, 100), np.uint8)
    memory[2:6] = block_bytes_of("k", 4, 100)
    seen: list[Outcome] = []
    rows = np.arange(2, 6, dtype=np.intp)
    engine.write([BlockIO(1, 2, Rows(memory, rows))], lambda _, outcome: seen.append(outcome))
    back = np.zeros((8, 100), np.uint8)
    rows = np.array([7, 0, 4, 3], np.intp)
    engine.read([BlockIO(1, 2, Rows(back, rows))], lambda _, outcome: seen.append(outcome))
    assert seen == [*COPIED_AND_STORED, LOADED]
    assert np.array_equal(back[rows], memory[2:6])
    assert not back[[1, 2, 5, 6]].any()


@pytest.mark.parametrize("row_bytes", [1, PAGE - 1, PAGE + 1, 3 * PAGE])
def test_rows_that_are_no_pages_are_refused(make: MakeEngine, row_bytes: int) -> None:
    engine = make(8, PAGE)
    rig = Rig(engine)
    rig.write(Block(1))
    row = np.array([0], np.intp)
    batch = [BlockIO(1, 0, Rows(np.zeros((1, row_bytes), np.uint8), row))]
    for move in (engine.write, engine.read):
        with pytest.raises(InvalidArgumentError):
            move(batch, lambda *_: pytest.fail("nothing happens"))
    assert rig.read(Block(1)) == [LOADED]


def test_missing_blocks_do_not_spoil_the_others(make: MakeEngine) -> None:
    rig = Rig(make(40, PAGE))
    rig.write(*(Block(n) for n in range(0, 40, 2)))
    assert rig.read(*(Block(n) for n in range(40))) == [LOADED, MISSING] * 20


# --- eviction -------------------------------------------------------------------------------------


def fill(rig: Rig, count: int) -> None:
    """Blocks 0 to `count` - 1 of a page, 0 the least recently used."""
    for key in range(count):
        assert rig.write(Block(key)) == [COPIED_AND_STORED]


def stored(rig: Rig, keys: range) -> list[int]:
    return [key for key in keys if rig.find(Block(key)) == [True]]


def test_the_least_recently_used_block_goes_first(make: MakeEngine) -> None:
    rig = Rig(make(8, PAGE))
    fill(rig, 8)
    rig.read(Block(0))
    rig.find(Block(2), touch=True)
    rig.find(Block(1), Block(3), touch=False)  # no use
    for key, gone in zip(range(8, 16), [1, 3, 4, 5, 6, 7, 0, 2], strict=True):
        assert rig.find(Block(gone)) == [True]
        assert rig.write(Block(key)) == [COPIED_AND_STORED]
        assert rig.find(Block(gone)) == [False]
    assert rig.engine.stats()["evictions"] == 8
    assert stored(rig, range(16)) == list(range(8, 16))


@pytest.mark.parametrize("seed", range(3))
def test_eviction_follows_a_list_by_last_use(make: MakeEngine, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rig = Rig(make(10, PAGE))
    model: list[int] = []  # least recently used first
    for _ in range(200):
        key = int(rng.integers(0, 25))
        if key in model:
            operation = rng.integers(0, 4)
            if operation == 0:
                assert rig.delete(Block(key)) == 1
                model.remove(key)
                continue
            if operation == 1:
                assert rig.read(Block(key)) == [LOADED]
            else:
                assert rig.find(Block(key), touch=True) == [True]
            model.append(model.pop(model.index(key)))
        else:
            assert rig.read(Block(key)) == [MISSING]
            rig.write(Block(key))
            model = [*model, key][-10:]
        assert stored(rig, range(25)) == sorted(model)


def test_a_large_block_evicts_as_many_as_it_needs(make: MakeEngine) -> None:
    rig = Rig(make(8, PAGE))
    fill(rig, 7)
    assert rig.write(Block(100, 4)) == [COPIED_AND_STORED]
    assert stored(rig, range(7)) == [3, 4, 5, 6]
    assert rig.read(Block(100, 4), Block(3)) == [LOADED, LOADED]


def test_a_batch_larger_than_the_store_leaves_its_last_blocks(make: MakeEngine) -> None:
    rig = Rig(make(8, PAGE))
    assert rig.write(*(Block(key) for key in range(30))) == [COPIED_AND_STORED] * 30
    assert len(stored(rig, range(30))) == 8
    assert rig.engine.stats()["used_slots"] == 8
    assert rig.read(*(Block(key) for key in stored(rig, range(30)))) == [LOADED] * 8


def test_a_block_larger_than_the_store_is_refused_and_evicts_nothing(make: MakeEngine) -> None:
    rig = Rig(make(8, PAGE))
    fill(rig, 8)
    assert rig.write(Block(100, 9), Block(3)) == [(NO_ROOM,), (PRESENT,)]
    assert stored(rig, range(8)) == list(range(8))


# --- taking out -----------------------------------------------------------------------------------


def test_deleted_blocks_are_missing_and_their_room_is_free(make: MakeEngine) -> None:
    rig = Rig(make(8, PAGE))
    fill(rig, 8)
    assert rig.delete(Block(1), Block(99), Block(5), Block(1)) == 2
    assert rig.read(Block(1), Block(5), Block(0)) == [MISSING, MISSING, LOADED]
    assert rig.engine.stats()["used_slots"] == 6
    assert rig.write(Block(100), Block(101)) == [COPIED_AND_STORED] * 2
    assert rig.engine.stats()["evictions"] == 0
    assert rig.delete(Block(1)) == 0
    assert rig.engine.stats()["removals"] == 2


def test_clear_leaves_nothing_and_all_room(make: MakeEngine) -> None:
    rig = Rig(make(8, PAGE))
    rig.write(Block(1, 3), Block(2, 2), Block(3))
    assert rig.engine.clear() == 3
    assert rig.engine.clear() == 0
    assert rig.read(Block(1, 3), Block(2, 2), Block(3)) == [MISSING] * 3
    stats = rig.engine.stats()
    assert (stats["blocks"], stats["used_slots"]) == (0, 0)
    assert rig.write(Block(4, 8)) == [COPIED_AND_STORED]
    assert rig.engine.stats()["evictions"] == 0


# --- stopping -------------------------------------------------------------------------------------


def test_a_stopped_write_is_not_found_and_leaves_no_trace(make: MakeEngine) -> None:
    rig = Rig(make(8, PAGE))
    outcomes = rig.write(Block(1, 2), Block(2, 2), Block(3, 2), stop=lambda at: at == 1)
    assert outcomes == [COPIED_AND_STORED, (STOPPED,), COPIED_AND_STORED]
    assert rig.find(Block(1), Block(2), Block(3)) == [True, False, True]
    assert rig.engine.stats()["used_slots"] == 4
    assert rig.write(Block(2, 2)) == [COPIED_AND_STORED]
    assert rig.read(Block(1, 2), Block(2, 2), Block(3, 2)) == [LOADED] * 3


def test_a_stopped_read_leaves_the_block_stored(make: MakeEngine) -> None:
    rig = Rig(make(8, PAGE))
    rig.write(Block(1, 2), Block(2, 2))
    outcomes = rig.read(Block(1, 2), Block(9), Block(2, 2), stop=lambda at: at != 2)
    assert outcomes == [STOPPED, MISSING, LOADED]
    assert rig.read(Block(1, 2)) == [LOADED]


# --- threads --------------------------------------------------------------------------------------


def test_look_ups_and_deletions_may_come_from_other_threads(make: MakeEngine) -> None:
    rig = Rig(make(16, PAGE))
    done = threading.Event()
    failures: list[BaseException] = []

    def others(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            while not done.is_set():
                keys = [Block(int(k)) for k in rng.integers(0, 30, 8)]
                rig.find(*keys, touch=bool(seed % 2))
                rig.delete(*keys[:2])
                rig.engine.stats()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=others, args=[seed]) for seed in range(3)]
    for thread in threads:
        thread.start()
    rng = np.random.default_rng(9)
    try:
        for _ in range(60):
            blocks = [Block(int(k), int(k) % 3 + 1) for k in rng.integers(0, 30, 4)]
            assert all(o[-1] in (STORED, PRESENT) for o in rig.write(*blocks))
            assert set(rig.read(*blocks)) <= {LOADED, MISSING, Outcome.LOST}
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not failures
    rig.engine.clear()
    assert rig.engine.stats()["used_slots"] == 0
