"""One life of LMCache's server for the tests of the adapter: an L1 pool, the adapter on it, objects
whose bytes follow from their keys. The fixtures are imported by the modules that use them."""

from __future__ import annotations

import gc
import os
import select
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import lmcache_fakes as fakes
from tests.payload import page_bytes_of

SLOT = 8192
POOL = 64 * SLOT
SIZES = [100, 4096, 8192, 8193, 30_000, 65_536, 1, 12_288]


def key(n: int, **fields: Any) -> Any:
    return fakes.ObjectKey(**{"model_name": "m", "kv_rank": 1, **fields, "chunk_hash": bytes([n])})


KEYS = [key(n) for n in range(8)]


class Life:
    """One life of LMCache's server: a pool and the adapter on it."""

    def __init__(self, module: Any, store: Path, pool_bytes: int = POOL, **params: Any) -> None:
        self.pool = fakes.L1Pool(pool_bytes)
        settings = {"storage_size": 64 * SLOT, "num_of_shard": 1, "num_workers": 1}
        settings |= {"slot_bytes": SLOT, "file": str(store), **params}
        try:
            self.adapter = module.LightMemL2Adapter(settings, l1_memory_desc=self.pool.description)
        except BaseException:
            gc.collect()
            self.pool.close()
            raise

    def ready(self, fd: int, seconds: float = 20.0) -> bool:
        """Sleep on a descriptor as LMCache's controllers do, and consume what it says."""
        if not select.select([fd], [], [], seconds)[0]:
            return False
        os.eventfd_read(fd)
        return True

    def fill(self, keys: list[Any], sizes: list[int], dtype: Any = None) -> list[Any]:
        objects = [self.pool.allocate(n, dtype) for n in sizes]
        for k, obj in zip(keys, objects, strict=True):
            self.pool.bytes_of(obj)[:] = page_bytes_of(k, 0, obj.get_size())
        return objects

    def store(self, keys: list[Any], sizes: list[int], dtype: Any = None) -> Any:
        number = self.adapter.submit_store_task(keys, self.fill(keys, sizes, dtype))
        return self.stored(number)

    def stored(self, number: int) -> Any:
        found: dict[int, Any] = {}
        while number not in found:
            assert self.ready(self.adapter.get_store_event_fd())
            found |= self.adapter.pop_completed_store_tasks()
        assert set(found) == {number}
        return found[number]

    def lookup(self, keys: list[Any], layouts: dict[int, Any]) -> list[bool]:
        number = self.adapter.submit_lookup_and_lock_task(keys, layouts)
        assert self.ready(self.adapter.get_lookup_and_lock_event_fd())
        bitmap = self.adapter.query_lookup_and_lock_result(number)
        assert self.adapter.query_lookup_and_lock_result(number) is None
        return bits(bitmap)

    def hits(self, keys: list[Any], sizes: list[int], dtype: Any = None) -> list[bool]:
        """Look-ups of objects of so many bytes, one by one: each has a layout of its own."""
        return [
            self.lookup([k], {k.object_group_id: fakes.MemoryObject(0, n, dtype).layout()})[0]
            for k, n in zip(keys, sizes, strict=True)
        ]

    def load(self, keys: list[Any], sizes: list[int], dtype: Any = None) -> list[bool]:
        """Whether each was loaded; fails for bytes that are not those of their key."""
        objects = [self.pool.allocate(n, dtype) for n in sizes]
        for obj in objects:
            self.pool.bytes_of(obj)[:] = 0xA5
        number = self.adapter.submit_load_task(keys, objects)
        bitmap = None
        while bitmap is None:
            assert self.ready(self.adapter.get_load_event_fd())
            bitmap = self.adapter.query_load_result(number)
        assert self.adapter.query_load_result(number) is None
        loaded = bits(bitmap)
        for k, obj, yes in zip(keys, objects, loaded, strict=True):
            expected = page_bytes_of(k, 0, obj.get_size())
            assert not yes or np.array_equal(self.pool.bytes_of(obj), expected)
        return loaded

    def end(self) -> None:
        self.adapter.close()
        self.pool.close()


def bits(bitmap: Any) -> list[bool]:
    return [bitmap.test(at) for at in range(bitmap.size())]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with fakes.installed(monkeypatch) as module:
        yield module


@pytest.fixture
def live(module: Any, tmp_path: Path) -> Iterator[Callable[..., Life]]:
    """Makes lives on one store; ends those that the test did not."""
    lives: list[Life] = []

    def make(**params: Any) -> Life:
        lives.append(Life(module, tmp_path / "store", **params))
        return lives[-1]

    yield make
    for life in lives:
        if life.pool.array is not None:
            life.end()
