"""Few blocks, done in loops, and many, done by numpy, come to the same in the task table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from light_mem import State
from light_mem.engine.dealing import deal, deal_few
from light_mem.engine.table_layout import CELL, INITIAL, READ, WRITE
from light_mem.index import keys as keymath
from light_mem.lane_room import Room
from light_mem.layouts import Layout, PageLayout, parse_regions
from light_mem.new_blocks import FEW, FewBlocks, ManyBlocks, new_blocks
from tests.engine_helpers import PAGE, Block, Rig, let_go, open_local
from tests.service_rig import WAIT
from tests.service_rig import rig as service_rig

PER_HASH = 3
STORED = [Block(key, PER_HASH) for key in range(0, 60, 2)]
SHORTER = Block(1000, 1)  # stored with another length than the tasks below give it
WORKERS = 3


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(open_local(tmp_path / "store", 128, shards=4, block_pages=PER_HASH))
    rig.write(*STORED, SHORTER)
    yield rig
    rig.engine.close()
    let_go(rig.engine, rig)


def layouts(hashes: int) -> list[Layout]:
    """Pages, whose last block is shorter, pages one a hash, and regions."""
    rng = np.random.default_rng(hashes)
    runs = rng.permutation(4000)[: hashes * PER_HASH - 1].astype(np.uint32)
    regions = [
        [(int(at) * 64, int(at) % 60 + 1)] * (1 + n % 2) for n, at in enumerate(runs[:hashes])
    ]
    of_regions = parse_regions(regions, hashes, 4000 * 64, WRITE)
    assert of_regions is not None
    return [
        PageLayout(runs, hashes, PER_HASH, PAGE),
        PageLayout(runs[:hashes], hashes, 1, PAGE),
        of_regions,
    ]


@pytest.mark.parametrize("mode", [READ, WRITE])
@pytest.mark.parametrize("hashes", [2, 7, FEW])
def test_few_blocks_and_many_come_to_the_same(rig: Rig, mode: int, hashes: int) -> None:
    engine = rig.engine
    rng = np.random.default_rng(hashes)
    room = Room(row=5, start=700, blocks=hashes, pages=9000, page_count=hashes)
    seen_done, seen_homes = set(), set()
    for turn in range(20):
        keys = [int(key) for key in rng.permutation(120)[:hashes]]
        keys[turn % hashes] = [1000, 1 << 100, keys[turn % hashes]][turn % 3]
        for layout in layouts(hashes):
            few = FewBlocks(mode, list(keys), layout, engine)  # type: ignore[arg-type]
            many = ManyBlocks(mode, list(keys), layout, engine)  # type: ignore[arg-type]
            for each in (few, many):
                each.deal(WORKERS)
            assert (few.count, few.done) == (many.count, many.done)
            assert few.pages_already() == many.pages_already()
            assert few.states() == many.states()
            assert list(few.queue(room)) == list(many.queue(room))
            assert few.states_when_done() == many.states_when_done()
            cells = np.frombuffer(few.cells(room), CELL)
            others = np.frombuffer(many.cells(room), CELL)
            for name in CELL.names or ():
                assert cells[name].tolist() == others[name].tolist(), name
            assert len(few.queue(room)) == hashes - few.done == few.states().count(INITIAL)
            seen_done.add(few.done)
            seen_homes.update(cells["home"].tolist())
    assert len(seen_done) > 1
    assert seen_homes <= set(range(WORKERS + 1))
    assert (len(seen_homes) > 2) is (mode == WRITE)


def test_a_block_of_another_length_is_not_done_for_a_write_and_found_by_a_read(rig: Rig) -> None:
    layout = layouts(2)[0]
    keys: list[keymath.HashValue] = [SHORTER.key, STORED[0].key]
    for kind in (FewBlocks, ManyBlocks):
        # The second block has PER_HASH - 1 pages here, and PER_HASH in the store.
        assert kind(WRITE, keys, layout, rig.engine).done == 0  # type: ignore[arg-type]
        assert kind(READ, keys, layout, rig.engine).done == 0  # type: ignore[arg-type]


def test_which_way_is_taken_depends_on_their_number(rig: Rig) -> None:
    engine = rig.engine
    for hashes, kind in ((1, FewBlocks), (FEW, FewBlocks), (FEW + 1, ManyBlocks)):
        layout = PageLayout(np.arange(hashes, dtype=np.uint32), hashes, 1, PAGE)
        new = new_blocks(READ, list(range(hashes)), layout, engine)  # type: ignore[arg-type]
        assert type(new) is kind


@pytest.mark.parametrize(("num_shards", "workers"), [(1, 1), (1, 4), (4, 2), (4, 3), (64, 5)])
def test_few_blocks_are_dealt_as_many_are(num_shards: int, workers: int) -> None:
    rng = np.random.default_rng(num_shards)
    for count in range(1, 50):
        shards = rng.integers(0, num_shards, count)
        nbytes = rng.integers(1, 80 << 20, count)
        order, homes = deal(shards, nbytes, num_shards, workers)
        few = deal_few(shards.tolist(), nbytes.tolist(), num_shards, workers)
        assert few == (order.tolist(), homes.tolist())


@pytest.mark.parametrize("hashes", [FEW, FEW + 1])
def test_a_task_that_is_partly_stored_says_so_and_does_the_rest(
    tmp_path: Path, hashes: int
) -> None:
    stored = list(range(0, hashes, 2))
    with service_rig(tmp_path, pages=64) as r:
        r.write(stored, stored)
        for key in range(1, hashes, 2):
            r.fill(key, [key])
        task = r.service.create("w", list(range(hashes)), range(hashes))
        assert task.get_page_already_list() == stored
        assert task.wait(WAIT)
        assert task.state() == [State.Finished] * hashes
        task = r.read([*range(hashes - 1), "absent"], range(hashes))
        assert task.state() == [State.Finished] * (hashes - 1) + [State.Aborted]
        assert all(r.holds(key, [key]) for key in range(hashes - 1))
