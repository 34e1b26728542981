"""Bad input: an error of the right kind, before anything is queued, and the service goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import light_mem
from light_mem import (
    InvalidArgumentError,
    KVCacheMemoryError,
    LocalCacheService,
    PageIndexError,
    State,
    StoreFormatError,
)
from tests.service_rig import Rig, rig

PAGES = 320


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig(tmp_path_factory.mktemp("bad"), pages=PAGES, slots=600) as r:
        r.service.clear()
        yield r


CREATE: dict[str, tuple[Any, Any, Any, type[Exception], str]] = {
    "unknown mode": ("append", ["a"], [0], ValueError, "mode"),
    "upper-case mode": ("WRITE", ["a"], [0], ValueError, "mode"),
    "mode of another type": (1, ["a"], [0], ValueError, "mode"),
    "mode is None": (None, ["a"], [0], ValueError, "mode"),
    "unhashable mode": (["w"], ["a"], [0], ValueError, "mode"),
    "negative page": ("w", ["a"], [-1], IndexError, "page -1"),
    "page behind the end": ("w", ["a"], [PAGES], IndexError, f"page {PAGES}"),
    "page far behind the end": ("r", ["a", "b"], [0, 2**40], IndexError, str(2**40)),
    "page of uint64": ("r", ["a"], np.array([2**63], np.uint64), IndexError, str(2**63)),
    "page beyond 64 bits": ("w", ["a"], [2**64], ValueError, "not page numbers.*int"),
    "pages are a set": ("w", ["a"], {1, 2}, ValueError, r"not \{1, 2\}"),
    "pages are a generator": ("w", ["a"], (n for n in [1]), ValueError, "not <generator"),
    "bools among pages": ("w", ["a"] * 2, [True, None], ValueError, r"not \[True, None\]"),
    "mixed page behind the end": (
        "w",
        ["a"] * 2,
        [np.int32(1), np.uint64(PAGES)],
        IndexError,
        f"page {PAGES}",
    ),
    "float page": ("w", ["a"], [0.0], ValueError, "whole numbers"),
    "float array": ("w", ["a"], np.zeros(1), ValueError, "float64"),
    "float tensor": ("w", ["a"], torch.zeros(1), ValueError, "float32"),
    "bool tensor": ("w", ["a"], torch.zeros(1, dtype=torch.bool), ValueError, "bool"),
    "bool pages": ("w", ["a", "b"], [True, False], ValueError, "bool"),
    "2-D pages": ("w", ["a"], [[0]], ValueError, "2-dimensional"),
    "2-D empty pages": ("w", [], np.empty((0, 2), int), ValueError, "2-dimensional"),
    "0-D page": ("w", ["a"], 0, ValueError, "0-dimensional"),
    "0-D tensor": ("w", ["a"], torch.tensor(0), ValueError, "0-dimensional"),
    "ragged pages": ("w", ["a"], [[0], [1, 2]], ValueError, "page"),
    "page is None": ("w", ["a"], [None], ValueError, "whole numbers"),
    "pages are None": ("w", ["a"], None, ValueError, "not None"),
    "pages are a str": ("w", ["a"], "0", ValueError, "0-dimensional"),
    "pages are strs": ("w", ["a"], ["0"], ValueError, "whole numbers"),
    "a page read into twice": ("r", ["a", "b", "c"], [3, 4, 3], ValueError, "page 3"),
    "a page twice in one run": ("r", ["a"], [5, 5], ValueError, "page 5"),
    "one str for a list": ("w", "a", [0], ValueError, "one str"),
    "one bytes for a list": ("w", b"a", [0], ValueError, "one bytes"),
    "one int for a list": ("w", 5, [0], ValueError, "one int"),
    "hashes are None": ("w", None, [0], ValueError, "NoneType"),
    "hash is None": ("w", [None], [0], ValueError, "NoneType"),
    "hash is a float": ("w", [1.0], [0], ValueError, "float"),
    "hash is a bool": ("w", [True], [0], ValueError, "bool"),
    "bool among ints": ("w", [1, False], [0, 1], ValueError, "bool"),
    "numpy bool": ("w", [np.True_], [0], ValueError, "bool"),
    "torch bool": ("w", [torch.tensor(True)], [0], ValueError, "bool"),
    "hash is a tuple": ("w", [("a", 1)], [0], ValueError, "tuple"),
    "negative hash": ("w", [-1], [0], ValueError, "-1"),
    "hash of 129 bits": ("w", [2**128], [0], ValueError, str(2**128)),
    "negative among others": ("w", ["a", -1], [0, 1], ValueError, "-1"),
    "too few hashes": ("w", ["a", "b"], [0, 1, 2], ValueError, "do not fit"),
    "too many hashes": ("w", ["a", "b"], [0], ValueError, "do not fit"),
}


@pytest.mark.parametrize("case", CREATE)
def test_create_refuses(running: Rig, case: str) -> None:
    mode, hashes, pages, error, text = CREATE[case]
    service = running.service
    before = service.stats()
    with pytest.raises(error, match=text) as caught:
        service.create(mode, hashes, pages)
    assert isinstance(caught.value, (InvalidArgumentError, PageIndexError))
    assert service.stats() == before  # nothing was queued, or even counted


def test_the_service_works_after_all_of_it(running: Rig) -> None:
    for mode, hashes, pages, error, _ in CREATE.values():
        with pytest.raises(error):
            running.service.create(mode, hashes, pages)
    running.write(["good", "better"], [0, 1])
    assert running.read(["good", "better"], [8, 9]).state() == [State.Finished] * 2
    assert running.holds("good", [8])


def test_pages_may_be_ints_of_several_widths(running: Rig) -> None:
    running.write(["wide", "wider"], [3, 4])
    task = running.service.create("r", ["wide", "wider"], [np.int32(8), np.uint64(9)])
    assert task.wait(20)  # floats, to numpy
    assert [block.pages for block in task.blocks] == [(8,), (9,)]
    assert running.holds("wider", [9])


def test_a_page_may_be_written_twice(running: Rig) -> None:
    running.fill("same", [3])
    task = running.service.create("w", ["one", "two"], [3, 3])
    assert task.wait(20)
    assert task.state() == [State.Finished] * 2
    assert running.read(["one", "two"], [8, 9]).state() == [State.Finished] * 2
    assert running.holds("same", [8])
    assert running.holds("same", [9])


@pytest.mark.parametrize("bad", [None, 1.5, True, -1, 2**128, ("a",)])
def test_look_ups_refuse_what_is_no_hash(running: Rig, bad: Any) -> None:
    service = running.service
    for call in (service.query, service.match_prefix, service.delete):
        with pytest.raises(InvalidArgumentError):
            call(["good", bad])
        if bad != ("a",):
            with pytest.raises(InvalidArgumentError):
                call(bad)
    with pytest.raises(InvalidArgumentError):
        service.match_prefix("one hash")
    with pytest.raises(InvalidArgumentError):
        service.active_create_count("rw")


def test_one_hash_is_as_a_list_of_it(running: Rig) -> None:
    running.write(["one"], [0])
    service = running.service
    service.touch("one")
    calls = (service.query, service.pin, service.unpin, service.delete)
    assert [call("one") for call in calls] == [True, 1, 1, 1]


def tensor(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


MAKE: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no worker": ({"num_workers": 0}, ValueError, "num_workers"),
    "negative workers": ({"num_workers": -1}, ValueError, "num_workers"),
    "200 workers": ({"num_workers": 200}, ValueError, "num_workers"),
    "half a worker": ({"num_workers": 1.5}, ValueError, "num_workers"),
    "a str of workers": ({"num_workers": "2"}, ValueError, "num_workers"),
    "no shard": ({"num_of_shard": 0}, ValueError, "num_of_shard"),
    "1001 shards": ({"num_of_shard": 1001}, ValueError, "num_of_shard"),
    "float shards": ({"num_of_shard": 2.0}, ValueError, "num_of_shard"),
    "float storage": ({"storage_size": 1e9}, ValueError, "storage_size"),
    "negative storage": ({"storage_size": -1}, ValueError, "storage_size"),
    "storage of half a block": ({"storage_size": 32 * 4096}, ValueError, "too small"),
    "less than a block a shard": (
        {"storage_size": 2 * 64 * 4096 - 1, "num_of_shard": 2},
        ValueError,
        str(2 * 64 * 4096),  # what is needed
    ),
    "more slots than there are numbers": (
        {"storage_size": 2**60, "num_of_shard": 2},
        ValueError,
        f"2 shards of pages of 4096 bytes hold at most {2 * (2**31 - 2) * 4096} bytes; use more",
    ),
    "a home that nobody expands": ({"file": "~/store"}, ValueError, "os.path.expanduser"),
    "unknown durability": ({"durability": "disk"}, ValueError, "durability"),
    "unknown page_cache": ({"page_cache": "drops"}, ValueError, "page_cache.*drops"),
    "page_cache is no bool": ({"page_cache": True}, ValueError, "page_cache"),
    "cpus by another word": ({"worker_cpus": "all"}, ValueError, "worker_cpus.*all"),
    "cpus for two workers": ({"worker_cpus": [0, 0]}, ValueError, "2 elements for 1 workers"),
    "a cpu that is not there": ({"worker_cpus": [8191]}, ValueError, r"\[8191\]"),
    "a negative cpu": ({"worker_cpus": [-1]}, ValueError, "worker_cpus"),
    "no cpu for a worker": ({"worker_cpus": [[]]}, ValueError, "worker_cpus"),
    "a cpu as text": ({"worker_cpus": ["0"]}, ValueError, "worker_cpus"),
    "one cpu number": ({"worker_cpus": 0}, ValueError, "worker_cpus"),
    "cpus as a mapping": ({"worker_cpus": {0: 1}}, ValueError, "worker_cpus"),
    "negative max_blocks": ({"max_blocks": -5}, ValueError, "max_blocks"),
    "float16 tensor": ({"kvcache": tensor(4, 4096).half()}, ValueError, r"float16 \(\.view"),
    "1-D tensor": ({"kvcache": tensor(4096)}, ValueError, "4096"),
    "3-D tensor": ({"kvcache": tensor(4, 2, 4096)}, ValueError, "4, 2, 4096"),
    "empty tensor": ({"kvcache": tensor(0, 4096)}, ValueError, "0, 4096"),
    "transposed tensor": ({"kvcache": tensor(4096, 4).t()}, ValueError, "contiguous"),
    "every other row": ({"kvcache": tensor(8, 4096)[::2]}, ValueError, "contiguous"),
    "numpy array": ({"kvcache": np.zeros((4, 4096), np.uint8)}, ValueError, "torch.Tensor"),
    "list": ({"kvcache": [[0]]}, ValueError, "torch.Tensor, not.*list"),
    "no tensor": ({"kvcache": None}, ValueError, "torch.Tensor, not.*NoneType"),
    "numpy's memory": (
        {"kvcache": torch.from_numpy(np.zeros((4, 4096), np.uint8))},
        KVCacheMemoryError,
        "allocate_kvcache",
    ),
}


@pytest.mark.parametrize("case", MAKE)
def test_a_service_refuses_to_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    changes, error, text = MAKE[case]
    arguments: dict[str, Any] = {
        "file": tmp_path / "store",
        "storage_size": 1 << 20,
        "num_of_shard": 1,
        "kvcache": light_mem.allocate_kvcache(4, 4096),
        "num_workers": 1,
    }
    with pytest.raises(error, match=text) as caught:
        LocalCacheService(**{**arguments, **changes})
    assert isinstance(caught.value, light_mem.LightMemError)
    assert not (tmp_path / "store").exists()
    with LocalCacheService(**arguments) as service:
        assert service.query("a") is False


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").write_bytes(b"mine")
    with pytest.raises(StoreFormatError, match="not a directory"), rig(tmp_path, run=False):
        pass
    assert (tmp_path / "store").read_bytes() == b"mine"


def test_a_path_that_is_no_utf8_and_one_that_is_too_long(tmp_path: Path) -> None:
    kv = light_mem.allocate_kvcache(4, 4096)
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 \xff")
    with LocalCacheService(odd, 1 << 20, 1, kv, 1) as service:
        service.run()
        assert service.create("w", ["a"], [0]).wait(20)
        client = service.client()
        assert client.query("a") is True
        client.close()
    long = tmp_path.joinpath(*["d" * 200] * 11)
    with pytest.raises(InvalidArgumentError, match="2047"):
        LocalCacheService(long, 1 << 20, 1, kv, 1)
