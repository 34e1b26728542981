"""A block is never taken for another one: not for one whose key is half the same, not for the one
that took its place, or its task's row, while somebody looked."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from light_mem import State
from light_mem.engine.base import BlockIO, Outcome
from light_mem.index import keys as keymath
from light_mem.index.lookup import SCALAR_LIMIT, Lookup
from light_mem.index.shard import Key
from tests.deaths import interleave
from tests.engine_helpers import (
    PAGE,
    Block,
    Rig,
    let_go,
    new_index,
    open_local,
    publish,
    replica,
)
from tests.parts_rig import around_changes
from tests.service_rig import WAIT
from tests.service_rig import rig as service_rig

SLOTS = 16


# --- half of a key --------------------------------------------------------------------------------


def in_one_chain(buckets: int, same: int, count: int) -> list[Key]:
    """Keys of one bucket, low and high half, of which one half, `same`, is the same number."""
    found: list[Key] = []
    for number in itertools.count():
        key = (7, number) if same == 0 else (number, 7)
        if keymath.mix_one(*key) & (buckets - 1) == 5:
            found.append(key)
            if len(found) == count:
                return found
    raise AssertionError


@pytest.mark.parametrize("n", [1, SCALAR_LIMIT + 2], ids=["scalar", "vectorised"])
@pytest.mark.parametrize("same", [0, 1], ids=["low", "high"])
def test_a_key_of_which_half_is_that_of_a_stored_one_is_not_found(
    tmp_path: Path, same: int, n: int
) -> None:
    file = new_index(tmp_path, SLOTS)
    index = replica(tmp_path, file)
    absent, stored, other = in_one_chain(file.buckets, same, 3)
    with index.change():
        slots = []
        for key in (stored, other):
            where = index.allocate(1, [])
            assert where is not None
            index.mark(where.runs, owner=1)
            publish(index, [where], [key], now=1)
            slots.append(where.slot)
    lookup = Lookup(file)
    for key, slot in zip((absent, stored, other), (-1, *slots), strict=True):
        keys = np.array([key] * n, np.uint64)
        assert lookup.find(keys, touch=False).tolist() == [slot] * n
        assert (lookup.locate(slots[0], *key) is None) == (key != stored)


# --- the same key again ---------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [False, True], ids=["one run", "two runs"])
def test_where_a_block_lies_is_told_of_it_or_of_the_one_that_replaced_it_and_never_of_both(
    tmp_path: Path, pieces: bool
) -> None:
    """The same key in the same slots, with other bytes, at each opcode of `locate`."""
    file = new_index(tmp_path, 4)
    index = replica(tmp_path, file)

    def store(checksum: int, slots: int) -> int:
        where = index.allocate(slots, [])
        assert where is not None
        index.mark(where.runs, owner=1)
        publish(index, [where], [(checksum, 0)], now=1)
        return where.slot

    with index.change():
        first, between, last = (store(key, 1) for key in (1, 2, 3))
        if pieces:
            index.remove(first)
            slot = store(5, 2)
        else:
            index.remove(last)
            slot = store(5, 1)
        assert between == 1
    runs = index._lookup.runs(0, slot)
    assert runs is not None
    assert len(runs) == 1 + pieces
    saved = file.map[:]

    def replace() -> None:
        again = replica(tmp_path, file)
        with again.change():
            again.remove(slot)
            where = again.take(runs[:1])
            again.mark(where.runs, owner=1)
            publish(again, [where], [(5, 0)], now=2)
            file.entries["checksum"][slot] = 99

    lookup = Lookup(file)
    tag = lookup.tag(slot)
    seen = set()
    for at in itertools.count(1):
        file.map[:] = saved
        where, reached = interleave(partial(lookup.locate, slot, 5, 0), replace, at)
        if where is not None and where.tag == tag:
            assert (where.checksum, where.nbytes, where.runs) == (5, PAGE * (1 + pieces), runs)
        elif where is not None:
            assert (where.checksum, where.nbytes, where.runs) == (99, PAGE, runs[:1])
        seen.add(where and where.tag)
        if not reached:
            break
    assert len(seen) == 3  # the one, the other, neither


def once(call: Callable[[], object]) -> Callable[..., None]:
    """A function that makes a call the first time only, whatever it is given."""
    calls = iter([call])

    def act(*_: object) -> None:
        for each in calls:
            each()

    return act


@pytest.mark.parametrize("other", [False, True], ids=["the same key", "another key"])
def test_a_block_that_replaces_a_damaged_one_before_that_is_dropped_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: bool
) -> None:
    """Another process deletes the damaged block, and writes to its slots, before the reader that
    found the damage has the shard's lock."""
    damaged, new = Block(1, 2), Block(2 if other else 1, 2)
    one, two = (Rig(open_local(tmp_path / "store", 2, block_pages=2)) for _ in range(2))
    one.write(damaged)
    one.engine.file(0).bytes(0, 1)[3] ^= 1  # type: ignore[attr-defined]

    def replace() -> None:
        assert two.delete(damaged) == 1
        assert two.write(new)[0][-1] is Outcome.STORED

    with monkeypatch.context() as patch:
        around_changes(one.engine, patch, once(replace))  # type: ignore[arg-type]
        assert one.read(damaged) == [Outcome.DAMAGED]
    assert one.read(new) == [Outcome.LOADED]
    assert one.engine.stats()["damaged"] == 0
    for rig in (one, two):
        rig.engine.close()
        let_go(rig.engine, rig)


# --- what create reads itself ---------------------------------------------------------------------


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("verify", [True, False])
def test_a_short_read_whose_block_is_replaced_in_its_middle_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: bool, runs: int
) -> None:
    """Not even where no checksum is asked: its tag tells."""
    size = 1 << 15  # large rows: they are read straight into the pages
    options: dict[str, Any] = {"verify": verify, "small_read_bytes": 2 * size}
    with service_rig(tmp_path, pages=64, page_bytes=size, slots=64, **options) as r:
        r.write(range(64), range(64))
        r.service.delete([0, 1] if runs == 1 else [0, 2])  # the only room
        pages = [8, 9]
        r.fill("long", pages)
        regions = [[(page * size, size) for page in pages]]
        assert r.service.create_regions("write", ["long"], regions).wait(WAIT)
        engine = r.service._engine
        entry = engine.lookup.find_one(*keymath.as_key("long"))
        where = engine.lookup.locate(entry, *keymath.as_key("long"))
        assert where is not None
        assert len(where.runs) == runs
        assert r.service.create_regions("read", ["long"], regions).ready()
        r.fill("new", [10, 11])
        preadv = os.preadv

        def replace() -> None:
            r.service.delete(["long"])
            new = r.service.create_regions("write", ["new"], [[(10 * size, 2 * size)]])
            assert new.wait(WAIT)

        act = once(replace)

        def read(*arguments: Any) -> int:
            act()
            return preadv(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", read)
            task = r.service.create_regions("read", ["long"], regions)
        assert task.wait(WAIT)
        assert task.state() == [State.Aborted]
        assert r.service.stats()["damaged"] == 0
        assert r.service.query("new")
    let_go(r)


@pytest.mark.parametrize("pages", [1, 3])
@pytest.mark.parametrize("verify", [True, False])
def test_a_short_read_whose_block_gets_another_length_before_it_begins_is_a_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: bool, pages: int
) -> None:
    size = 1 << 15
    options: dict[str, Any] = {"verify": verify, "small_read_bytes": 2 * size}
    with service_rig(tmp_path, page_bytes=size, slots=64, **options) as r:

        def write(name: str, first: int, count: int) -> None:
            r.fill(name, range(first, first + count))
            task = r.service.create_regions("write", [name], [[(first * size, count * size)]])
            assert task.wait(WAIT)
            assert task.state() == [State.Finished]

        write("block", 0, 2)
        regions = [[(8 * size, size), (9 * size, size)]]
        assert r.service.create_regions("read", ["block"], regions).ready()
        small = r.service._small_reads
        read, asked = small.read, []

        def replaced(blocks: Sequence[BlockIO]) -> bool:
            r.service.delete(["block"])
            write("block", 0, pages)
            asked.append(read(blocks))
            return asked[-1]

        with monkeypatch.context() as patch:
            patch.setattr(small, "read", replaced)
            task = r.service.create_regions("read", ["block"], regions)
        assert asked == [False]
        assert task.wait(WAIT)
        assert task.state() == [State.Aborted]
        assert r.service.stats()["damaged"] == 0
        assert r.service.query("block")
    let_go(r)


# --- the row of a task ----------------------------------------------------------------------------


def test_an_abort_that_comes_late_leaves_the_task_alone_that_has_the_row_by_now(
    tmp_path: Path,
) -> None:
    """Its task was ready before the abort had the queue's lock, and its row and cells are
    another's."""
    with service_rig(tmp_path, run=False, max_blocks=1) as r:
        table, queue = r.service._session.table, r.service._session.queue
        task = r.service.create("w", ["old"], [0])
        row, cells = task._row, (task._start, task._end)
        late = partial(queue.abort, table, *cells, row, task._generation, WAIT)
        r.service.abort(task)
        assert task.ready()
        del task
        r.fill("new", [1])
        new = r.service.create("w", ["new"], [1])
        assert (new._row, (new._start, new._end)) == (row, cells)
        late()
        assert new.state() == [State.Initial]
        assert not table.aborted(row)
        r.service.run()
        assert new.wait(WAIT)
        assert new.state() == [State.Finished]
        del late, table, queue
    let_go(r)
