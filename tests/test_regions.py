"""Blocks that are regions of the KV tensor's memory instead of pages."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import light_mem
from light_mem import InvalidArgumentError, LocalCacheService, PageIndexError, State, maintenance
from tests.engine_helpers import let_go
from tests.payload import block_bytes_of

PAGE, PAGES, WAIT = 64, 256, 20.0
Region = tuple[int, int]


def payload(key: object, nbytes: int) -> np.ndarray:
    return block_bytes_of(key, 1, nbytes).reshape(-1)


class Rig:
    def __init__(self, service: LocalCacheService, kv: torch.Tensor) -> None:
        self.service = service
        self.memory = kv.reshape(-1).numpy()

    def fill(self, key: object, regions: list[Region]) -> None:
        data = payload(key, sum(n for _, n in regions))
        for offset, length in regions:
            self.memory[offset : offset + length], data = data[:length], data[length:]

    def holds(self, key: object, regions: list[Region]) -> bool:
        found = np.concatenate([self.memory[a : a + n] for a, n in regions])
        return bool(np.array_equal(found, payload(key, len(found))))

    def move(self, mode: str, blocks: dict[str, list[Region]]) -> list[State]:
        task = self.service.create_regions(mode, list(blocks), list(blocks.values()))
        assert task.wait(WAIT)
        return task.state()


@contextmanager
def opened(store: Path) -> Iterator[Rig]:
    kv = light_mem.allocate_kvcache(PAGES, PAGE)
    with LocalCacheService(store, 512 * PAGE, 2, kv, 2) as service:
        service.run()
        yield Rig(service, kv)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with opened(tmp_path / "store") as rig:
        yield rig
    let_go(rig)


BLOCKS: dict[str, list[Region]] = {
    "aligned": [(0, 4 * PAGE)],
    "odd": [(1000, 333)],
    "tiny": [(2000, 1)],
    "two": [(3000, 100), (2500, 300)],
    "many": [(4000 + 10 * n, 7) for n in range(50)],
}


def test_regions_come_back_elsewhere_byte_by_byte(rig: Rig) -> None:
    for key, regions in BLOCKS.items():
        rig.fill(key, regions)
    assert rig.move("write", BLOCKS) == [State.Finished] * len(BLOCKS)
    rig.memory[:] = 0xA5
    elsewhere = {
        key: [(offset + 8000, length) for offset, length in reversed(regions)][::-1]
        for key, regions in BLOCKS.items()
    }
    assert rig.move("read", elsewhere) == [State.Finished] * len(BLOCKS)
    assert all(rig.holds(key, regions) for key, regions in elsewhere.items())
    touched = np.zeros(len(rig.memory), bool)
    for regions in elsewhere.values():
        for offset, length in regions:
            touched[offset : offset + length] = True
    assert (rig.memory[~touched] == 0xA5).all()
    assert rig.service.check().clean


def test_a_block_takes_the_slots_that_its_bytes_fill(rig: Rig) -> None:
    assert rig.move("write", {"odd": [(0, 2 * PAGE + 1)]}) == [State.Finished]
    assert rig.service.stats()["used_slots"] == 3


def test_another_length_is_a_miss_to_a_read_and_replaced_by_a_write(rig: Rig) -> None:
    rig.fill("k", [(0, 100)])
    rig.move("write", {"k": [(0, 100)]})
    for length in (99, 101, 128):
        assert rig.move("read", {"k": [(1000, length)]}) == [State.Aborted]
    rig.fill("k", [(0, 90)])
    assert rig.move("write", {"k": [(0, 90)]}) == [State.Finished]
    assert rig.move("read", {"k": [(1000, 90)]}) == [State.Finished]
    assert rig.holds("k", [(1000, 90)])


def test_pages_and_regions_of_one_length_are_the_same_block(rig: Rig) -> None:
    rig.fill("k", [(3 * PAGE, PAGE)])
    task = rig.service.create("write", ["k"], [3])
    assert task.wait(WAIT)
    assert rig.move("read", {"k": [(5001, PAGE)]}) == [State.Finished]
    assert rig.holds("k", [(5001, PAGE)])


def test_regions_survive_a_restart_and_a_block_in_several_runs(tmp_path: Path) -> None:
    kv = light_mem.allocate_kvcache(PAGES, PAGE)
    with LocalCacheService(
        tmp_path / "store",
        64 * PAGE,
        1,
        kv,
        1,
    ) as service:
        service.run()
        rig = Rig(service, kv)
        rig.move("write", {str(n): [(n * PAGE, PAGE)] for n in range(64)})
        service.delete([str(n) for n in range(0, 16, 2)])  # room in eight pieces
        rig.fill("cut", [(5000, 7 * PAGE + 5)])
        assert rig.move("write", {"cut": [(5000, 7 * PAGE + 5)]}) == [State.Finished]
    with LocalCacheService(tmp_path / "store", 64 * PAGE, 1, kv, 1) as service:
        service.run()
        rig = Rig(service, kv)
        rig.memory[:] = 0
        assert rig.move("read", {"cut": [(1, 7 * PAGE), (9001, 5)]}) == [State.Finished]
        assert rig.holds("cut", [(1, 7 * PAGE), (9001, 5)])
        assert service.check().clean


def test_blocks_of_a_task_name_their_regions_and_pickle(rig: Rig) -> None:
    task = rig.service.create_regions("write", ["a", "b"], [[(0, 5), (9, 2)], [(64, 8)]])
    assert task.wait(WAIT)
    for each in (task, pickle.loads(pickle.dumps(task))):
        assert [b.regions for b in each.blocks] == [((0, 5), (9, 2)), ((64, 8),)]
        assert [b.pages for b in each.blocks] == [(), ()]
    assert task.get_page_already_list() == []


@pytest.mark.parametrize(
    "regions",
    [
        [(0, 5), (10, 5)],
        [[(0, 5)], [(10, 5)]],
        np.array([[0, 5], [10, 5]]),
        np.array([[[0, 5]], [[10, 5]]], np.uint32),
    ],
)
def test_regions_may_be_given_as_pairs_lists_or_arrays(rig: Rig, regions: object) -> None:
    rig.fill("a", [(0, 5)])
    rig.fill("b", [(10, 5)])
    task = rig.service.create_regions("w", ["a", "b"], regions)  # type: ignore[arg-type]
    assert task.wait(WAIT)
    assert rig.move("r", {"b": [(100, 5)], "a": [(200, 5)]}) == [State.Finished] * 2
    assert rig.holds("b", [(100, 5)])
    assert rig.holds("a", [(200, 5)])


@pytest.mark.parametrize(
    ("regions", "error"),
    [
        ([(0, 1), (0, 1)], InvalidArgumentError),  # of two hashes
        ([(0, 0)], PageIndexError),
        ([(-1, 4)], PageIndexError),
        ([(PAGE * PAGES - 3, 4)], PageIndexError),
        ([(0, PAGE * PAGES + 1)], PageIndexError),
        ([(2**63 - 2, 4)], PageIndexError),
        (None, InvalidArgumentError),
        (zip([0], [4], strict=True), InvalidArgumentError),
        ([[]], InvalidArgumentError),
        ([(1, 2, 3)], InvalidArgumentError),
        ([(0.5, 2)], InvalidArgumentError),
        (["ab"], InvalidArgumentError),
        ([[(0, 8), (7, 2)]], InvalidArgumentError),  # overlap in a read
    ],
)
def test_what_is_no_region_is_refused_before_anything_is_queued(
    rig: Rig, regions: list[object], error: type[Exception]
) -> None:
    with pytest.raises(error) as caught:
        rig.service.create_regions("read", ["a"], regions)  # type: ignore[arg-type]
    if error is PageIndexError:
        what = "at least one byte" if regions == [(0, 0)] else "outside the KV tensor"
        assert what in str(caught.value)
    assert rig.service.stats()["read_tasks"] == 0


def test_no_regions_are_a_ready_task(rig: Rig) -> None:
    assert rig.service.create_regions("read", [], []).ready()


def test_blocks_that_fill_no_page_go_through_all_tools(tmp_path: Path) -> None:
    blocks: dict[str, list[Region]] = {
        "short": [(3, 10)],
        "long": [(100, 5 * PAGE + 7), (1000, 1)],
        "whole": [(2000, 2 * PAGE)],
    }
    store, other, file = tmp_path / "store", tmp_path / "other", tmp_path / "file"
    with opened(store) as rig:
        for key, regions in blocks.items():
            rig.fill(key, regions)
        assert rig.move("w", blocks) == [State.Finished] * 3
        let_go(rig)
    assert maintenance.export_store(store, file).complete
    report = maintenance.import_store(other, file, storage_size=512 * PAGE, shards=2)
    assert report.complete
    assert report.blocks == 3
    assert report.nbytes == 10 + 5 * PAGE + 8 + 2 * PAGE
    maintenance.resize(other, 128 * PAGE)
    maintenance.resize(other, 512 * PAGE)
    maintenance.rebuild(other)
    assert maintenance.verify(other).clean
    with opened(other) as rig:
        assert rig.move("r", blocks) == [State.Finished] * 3
        assert all(rig.holds(key, regions) for key, regions in blocks.items())
        let_go(rig)
