"""Errors have the values of their messages as attributes, here and in the process they go to."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
import torch

import light_mem
from light_mem import blocks, layouts, maintenance
from light_mem.commands.arguments import chosen_hashes
from light_mem.compat_arguments import integers, page_row
from light_mem.engine import kvmemory, maps, opening
from light_mem.engine.table_layout import READ
from light_mem.errors import InvalidArgumentError, KVCacheMemoryError, LightMemError
from light_mem.index import keys
from light_mem.integrations.vllm.opening import rows_of

LONG = "/" + "d" * 3000
NOTHING = kvmemory.MemorySource("fd", -1, 0, 0, -1, 0, 8)
OTHER_FILE = NOTHING._replace(fd=1)
UNKNOWN = NOTHING._replace(kind="x")
EMPTY = NOTHING._replace(nbytes=0)


def tall() -> Any:
    return SimpleNamespace(shape=(2**32, 1))


RAISED: dict[str, tuple[Callable[[], object], type[LightMemError], dict[str, Any]]] = {
    "no bool": (lambda: blocks.yes_or_no("verify", 1), InvalidArgumentError, {"verify": 1}),
    "no path": (lambda: blocks.store_path(7), InvalidArgumentError, {"file": 7}),
    "a long path": (
        lambda: blocks.store_path(LONG),
        InvalidArgumentError,
        {"file": LONG, "size": 3001, "limit": 2047},
    ),
    "one hash": (lambda: blocks.parse_hashes("a"), InvalidArgumentError, {"hash_values": "a"}),
    "no hashes": (
        lambda: blocks.parse_hashes(1.5),  # type: ignore[arg-type]
        InvalidArgumentError,
        {"hash_values": 1.5},
    ),
    "a bool for a hash": (lambda: keys.as_key(True), InvalidArgumentError, {"value": True}),
    "ragged pages": (
        lambda: blocks.parse_pages([[0], [1, 2]], 4, READ),  # type: ignore[list-item]
        InvalidArgumentError,
        {"page_indices": [[0], [1, 2]], "reason": ANY},
    ),
    "lengths": (
        lambda: blocks.parse_lengths([1.5, 2], 2),
        InvalidArgumentError,
        {"value": [1.5, 2], "hashes": 2},
    ),
    "too many pages": (
        lambda: blocks.tensor_sizes(tall()),
        InvalidArgumentError,
        {"shape": (2**32, 1), "limit": 2**32 - 1},
    ),
    "regions": (
        lambda: layouts.parse_regions([(0, 1, 2)], 1, 64, READ),
        InvalidArgumentError,
        {"value": [(0, 1, 2)], "reason": ANY},
    ),
    "no ints": (
        lambda: integers("tokens", 5, 9),
        InvalidArgumentError,
        {"argument": "tokens", "value": 5},
    ),
    "a bool for an int": (
        lambda: integers("tokens", [1, True], 9),
        InvalidArgumentError,
        {"argument": "tokens", "value": True},
    ),
    "floats": (
        lambda: integers("tokens", [1.5], 9),
        InvalidArgumentError,
        {"argument": "tokens", "reason": ANY},
    ),
    "a large int": (
        lambda: integers("tokens", [1, 16], 16),
        InvalidArgumentError,
        {"argument": "tokens", "value": 16, "position": 1},
    ),
    "an indexer": (
        lambda: page_row([[0], [1, 2]]),
        InvalidArgumentError,
        {"kv_page_indexer": [[0], [1, 2]], "reason": ANY},
    ),
    "a tensor's size": (
        lambda: light_mem.allocate_kvcache(4, -1),
        InvalidArgumentError,
        {"page_bytes": -1},
    ),
    "no tensor": (
        lambda: kvmemory.share_tensor([]),  # type: ignore[arg-type]
        InvalidArgumentError,
        {"found": "<class 'list'>"},
    ),
    "another tensor": (
        lambda: kvmemory.share_tensor(torch.zeros(4, 4)),
        InvalidArgumentError,
        {"found": "has dtype torch.float32"},
    ),
    "numpy's memory": (
        lambda: kvmemory.share_tensor(torch.from_numpy(np.zeros((4, 4), np.uint8))),
        KVCacheMemoryError,
        {"path": ANY},
    ),
    "memory that is gone": (
        lambda: kvmemory.attach(NOTHING),
        KVCacheMemoryError,
        {"source": NOTHING, "reason": ANY},
    ),
    "another file": (lambda: kvmemory.attach(OTHER_FILE), KVCacheMemoryError, {"source": ANY}),
    "an unknown source": (
        lambda: kvmemory.attach(UNKNOWN),
        InvalidArgumentError,
        {"source": UNKNOWN},
    ),
    "no memory": (lambda: kvmemory.attach(EMPTY), InvalidArgumentError, {"source": EMPTY}),
    "a short file": (
        lambda: kvmemory._require_size(4, NOTHING),
        KVCacheMemoryError,
        {"source": NOTHING, "size": 4, "needed": 8},
    ),
    "no mapping": (lambda: maps.find_region(0, 8), KVCacheMemoryError, {"address": 0}),
    "no shard": (
        lambda: opening.check_sizes(64, 0, 1 << 20, 1),
        InvalidArgumentError,
        {"num_of_shard": 0},
    ),
    "a small store": (
        lambda: opening.check_sizes(64, 2, 64, 1),
        InvalidArgumentError,
        {"storage_size": 64, "needed": 128},
    ),
    "a view": (
        lambda: rows_of(memoryview(bytes(4))),
        InvalidArgumentError,
        {"shape": (4,), "strides": (1,), "readonly": True},
    ),
}


@pytest.mark.parametrize("case", RAISED)
def test_the_values_of_a_message_are_attributes_in_other_processes_too(case: str) -> None:
    call, kind, values = RAISED[case]
    with pytest.raises(kind) as caught:
        call()
    assert caught.value.values == values
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert {name: getattr(error, name) for name in error.values} == values
        assert str(error) == str(caught.value)


def test_files_that_are_wrong_are_named(tmp_path: Path) -> None:
    hashes = tmp_path / "hashes"
    hashes.write_text("int:x")
    with pytest.raises(InvalidArgumentError) as caught:
        chosen_hashes(SimpleNamespace(hashes=[], hash_file=hashes))  # type: ignore[arg-type]
    assert caught.value.values == {"path": str(hashes), "reason": ANY}
    light_mem.LocalStorageEngine.open_store(
        tmp_path / "s", page_bytes=64, num_of_shard=1, storage_size=1 << 16, block_pages=1
    ).close()
    with pytest.raises(InvalidArgumentError) as caught:
        maintenance.export_store(tmp_path / "s", tmp_path)
    assert caught.value.values == {"file": str(tmp_path)}
