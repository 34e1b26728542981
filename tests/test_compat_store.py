"""The store behind PyLocalCacheService: how many shards, what survives, what it refuses."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from light_mem import (
    InvalidArgumentError,
    LocalCacheService,
    PyLocalCacheService,
    PyState,
    allocate_kvcache,
)
from tests.compat_service import (
    PAGE,
    STORAGE,
    N,
    cumulative,
    finish,
    indexer,
    opened,
    some_tokens,
)

BLOCK = N * PAGE
HASHES = cumulative(some_tokens(2 * N + 1))
COUNT = len(HASHES)


def store_prompt(directory: Path, **options: int) -> int:
    """Write one prompt to a new store; returns the store's number of shards."""
    with opened(directory, **options) as rig:
        rig.fill("prompt", range(COUNT))
        finish(
            rig.service.create(hash_128s=HASHES, kv_page_indexer=indexer(range(COUNT)), mode="w")
        )
        return int(rig.service.service.stats()["shards"])


def load_prompt(directory: Path, **options: int) -> int:
    """Read the prompt of `store_prompt` and compare every page; returns the shards."""
    with opened(directory, **options) as rig:
        assert rig.service.query(HASHES) == [True] * 3
        pages = list(range(7, 7 + COUNT))
        task = rig.service.create(hash_128s=HASHES, kv_page_indexer=indexer(pages), mode="r")
        assert finish(task) == [PyState.Finished] * 3
        assert all(rig.holds("prompt", at, page) for at, page in enumerate(pages))
        return int(rig.service.service.stats()["shards"])


def test_blocks_survive_a_restart(tmp_path: Path) -> None:
    assert store_prompt(tmp_path / "f") == 4
    assert load_prompt(tmp_path / "f") == 4


def test_storage_too_small_for_the_shards_gets_fewer_and_the_same_after_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "light_mem"):
        assert store_prompt(tmp_path / "f", storage=17 * BLOCK + 100, shards=32) == 2
    assert "2 shards instead of 32" in caplog.text
    assert load_prompt(tmp_path / "f", storage=17 * BLOCK + 100, shards=32) == 2


def test_a_store_with_fewer_shards_can_be_given_more_room_later(tmp_path: Path) -> None:
    assert store_prompt(tmp_path / "f", storage=17 * BLOCK, shards=32) == 2
    for _ in range(2):  # once when it grows, once when it has grown
        assert load_prompt(tmp_path / "f", storage=64 * BLOCK, shards=32) == 2


def test_one_block_is_the_least_storage(tmp_path: Path) -> None:
    with opened(tmp_path / "fits", storage=BLOCK, shards=8) as rig:
        assert finish(rig.service.create(HASHES[:N], indexer(range(N)), "w")) == [PyState.Finished]
    kv = allocate_kvcache(4, PAGE)
    with pytest.raises(ValueError, match=f"need {BLOCK}"):
        PyLocalCacheService(kv, str(tmp_path / "f"), BLOCK - 1, 8, 1)
    assert not (tmp_path / "f").exists()


def test_another_page_size_is_refused_and_the_blocks_stay(tmp_path: Path) -> None:
    store_prompt(tmp_path / "f")
    with (
        pytest.raises(ValueError, match="page_bytes 512, not 1024"),
        opened(tmp_path / "f", page=2 * PAGE),
    ):
        pass
    load_prompt(tmp_path / "f")


def test_more_shards_than_asked_for_are_refused_and_the_blocks_stay(tmp_path: Path) -> None:
    store_prompt(tmp_path / "f", shards=4)
    with pytest.raises(ValueError, match="num_of_shard 4, not 2"), opened(tmp_path / "f", shards=2):
        pass
    load_prompt(tmp_path / "f", shards=4)


def test_a_file_where_the_store_belongs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"mine")
    with pytest.raises(ValueError, match="not a directory"), opened(tmp_path / "f"):
        pass
    assert (tmp_path / "f").read_bytes() == b"mine"


def test_files_of_the_original_are_named_in_the_log_and_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = tmp_path / "cache_file_0"
    old.write_bytes(b"old")
    with caplog.at_level(logging.WARNING, "light_mem"):
        store_prompt(tmp_path / "cache_file")
    assert str(old) in caplog.text
    assert old.read_bytes() == b"old"


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros((8, 1, PAGE), dtype=torch.uint8),
        torch.zeros(8 * PAGE, dtype=torch.uint8),
        torch.zeros((8, PAGE), dtype=torch.uint8)[::2],
        torch.zeros((8, PAGE), dtype=torch.float16),
        torch.zeros((0, PAGE), dtype=torch.uint8),
        torch.from_numpy(np.zeros((8, PAGE), np.uint8)),
        None,
    ],
    ids=["three dimensions", "one", "not contiguous", "float16", "no pages", "numpy's", "None"],
)
def test_tensors_that_are_no_kv_cache_are_value_errors(
    tmp_path: Path, tensor: torch.Tensor
) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the kind is the promise, not the text
        PyLocalCacheService(tensor, str(tmp_path / "f"), STORAGE, 4, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"file": None},
        {"file": 5},
        {"storage_size": "1"},
        {"storage_size": 0},
        {"num_shard": "4"},
        {"num_shard": 0},
        {"num_worker": "1"},
    ],
    ids=str,
)
@pytest.mark.parametrize("there", [False, True])
def test_wrong_arguments_are_value_errors_whether_or_not_there_is_a_store(
    tmp_path: Path, wrong: dict[str, Any], there: bool
) -> None:
    if there:
        store_prompt(tmp_path / "f")
    right = {"file": tmp_path / "f", "storage_size": STORAGE, "num_shard": 4, "num_worker": 1}
    [name] = wrong
    with pytest.raises(InvalidArgumentError, match=name):
        PyLocalCacheService(allocate_kvcache(8, PAGE), **{**right, **wrong})


def test_a_private_torch_tensor_and_views_of_it_go_on_working(tmp_path: Path) -> None:
    whole = torch.rand((8, PAGE // 2), dtype=torch.float16)
    before = whole.clone()
    with PyLocalCacheService(whole.view(torch.uint8), tmp_path / "f", STORAGE, 4, 1) as service:
        finish(service.create([1, 2], indexer([0, 1]), "w"))
        whole.zero_()
        finish(service.create([1, 2], indexer([0, 1]), "r"))
    assert torch.equal(whole[:2], before[:2])
    assert not whole[2:].any()


def test_workers_run_when_the_constructor_returns_and_end_with_the_object(tmp_path: Path) -> None:
    service = PyLocalCacheService(allocate_kvcache(4, PAGE), tmp_path / "f", STORAGE, 4, 3)
    pids = service.service.worker_pids
    assert len(pids) == 3
    assert all(psutil.pid_exists(pid) for pid in pids)
    task = service.create([1], indexer([0]), "w")
    finish(task)
    del service
    gc.collect()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert task.state() == [PyState.Finished]


def test_a_closed_service_says_so_and_closes_again(tmp_path: Path) -> None:
    with opened(tmp_path / "f") as rig:
        service = rig.service
        service.close()
        service.close()
        with pytest.raises(RuntimeError, match="closed"):
            service.query([1])


def test_a_constructor_whose_workers_do_not_start_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, pids = LocalCacheService.run, []

    def run(self: LocalCacheService) -> None:
        real(self)
        pids.extend(self.worker_pids)
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalCacheService, "run", run)
    with pytest.raises(KeyboardInterrupt) as caught, opened(tmp_path / "f"):
        pass
    assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)
    del caught  # until here its traceback kept the service from going by itself


def test_blocks_of_another_block_size_are_replaced_and_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page_bytes, pages = 65536, 32
    hashes = [(1 << 100) + n for n in range(pages)]
    kv = allocate_kvcache(pages, page_bytes)
    kv.copy_(torch.arange(pages * page_bytes).reshape(pages, page_bytes) % 251)
    wanted = kv.clone()
    indexer = torch.arange(pages, dtype=torch.int32)
    for megabytes in (1, 2, 1):  # 16 pages a block, 32, 16 again: the last key is in both
        monkeypatch.setenv("LIGHTMEM_MAX_BLOCK_SIZE_MB", str(megabytes))
        with PyLocalCacheService(kv, str(tmp_path / "store"), 64 << 20, 2, 1) as service:
            if not all(service.query(hash_128s=hashes)):
                task = service.create(hash_128s=hashes, kv_page_indexer=indexer, mode="w")
                assert task.wait(30)
            assert all(service.query(hash_128s=hashes))
            kv.zero_()
            task = service.create(hash_128s=hashes, kv_page_indexer=indexer, mode="r")
            assert task.wait(30)
            assert all(s == PyState.Finished for s in task.state())
            assert torch.equal(kv, wanted)
