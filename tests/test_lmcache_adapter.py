"""The adapter as LMCache sees it: store, restart, look-up, load; against fakes of its types."""

from __future__ import annotations

import gc
import os
import select
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from light_mem import InvalidArgumentError, KVCacheMemoryError, maintenance
from light_mem.engine import pool
from tests import lmcache_fakes as fakes
from tests.conftest import wait_until
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


def test_a_new_server_loads_what_the_last_one_stored(live: Callable[..., Life]) -> None:
    first = live()
    assert first.hits(KEYS, SIZES) == [False] * 8
    result = first.store(KEYS, SIZES)
    assert result.is_successful()
    assert result.bytes_transferred() == sum(SIZES)
    first.end()
    second = live()
    assert second.hits([*KEYS, key(9)], [*SIZES, 100]) == [True] * 8 + [False]
    order = [5, 2, 7, 0, 1, 6, 3, 4]
    assert second.load([KEYS[n] for n in order], [SIZES[n] for n in order]) == [True] * 8


def test_descriptors_are_distinct_and_speak_only_of_what_is_ready(
    live: Callable[..., Life],
) -> None:
    adapter = (life := live()).adapter
    fds = [
        adapter.get_store_event_fd(),
        adapter.get_lookup_and_lock_event_fd(),
        adapter.get_load_event_fd(),
    ]
    assert len(set(fds)) == 3
    assert select.select(fds, [], [], 0)[0] == []
    life.store(KEYS, SIZES)
    assert select.select(fds, [], [], 0)[0] == []
    assert adapter.pop_completed_store_tasks() == {}
    number = adapter.submit_lookup_and_lock_task(KEYS, {})
    assert select.select(fds, [], [], 0)[0] == [fds[1]]
    assert bits(adapter.query_lookup_and_lock_result(number)) == [False] * 8  # no layout is known
    assert adapter.query_load_result(number) is None
    os.eventfd_read(fds[1])
    life.load(KEYS, SIZES)
    assert select.select(fds, [], [], 0)[0] == []


def test_what_a_load_does_not_find_is_not_in_its_bitmap(live: Callable[..., Life]) -> None:
    life = live()
    life.store(KEYS[:2], SIZES[:2])
    assert life.load([KEYS[0], key(77), KEYS[1]], [100, 100, 4096]) == [True, False, True]
    assert life.load([], []) == []


def test_what_goes_between_look_up_and_load_is_a_miss(live: Callable[..., Life]) -> None:
    life = live()
    life.store(KEYS, SIZES)
    assert life.hits(KEYS, SIZES) == [True] * 8
    life.adapter.delete(KEYS[2:4])
    assert life.load(KEYS, SIZES) == [True, True, False, False, True, True, True, True]
    life.adapter.submit_unlock(KEYS)
    assert life.hits(KEYS[:4], SIZES[:4]) == [True, True, False, False]


def test_evicted_objects_are_misses_and_never_others_bytes(live: Callable[..., Life]) -> None:
    life = live(storage_size=64 * SLOT)
    listener = fakes.Listener()
    life.adapter.register_listener(listener)
    keys = [key(n) for n in range(40)]
    sizes = [SLOT * 2 + n for n in range(40)]  # three slots each: 21 find room
    for start in range(0, 40, 10):
        life.pool.forget_all()
        part = slice(start, start + 10)
        assert life.store(keys[part], sizes[part]).is_successful()
    found = life.hits(keys, sizes)
    assert sum(found) == 21
    assert found[30:] == [True] * 10
    loaded = []
    for k, n in zip(keys, sizes, strict=True):
        life.pool.forget_all()
        loaded += life.load([k], [n])
    assert loaded == found
    assert len(listener.stored) == 40
    assert listener.deleted == keys[: len(listener.deleted)]  # as far as the ledger can know
    usage = life.adapter.get_usage()
    assert usage.total_bytes_used == 63 * SLOT
    assert usage.bytes_by_cache_salt[""] <= 64 * SLOT


def test_a_damaged_object_is_a_miss_and_stored_anew(
    live: Callable[..., Life], tmp_path: Path
) -> None:
    life = live()
    life.store(KEYS[:1], [8192])
    life.end()
    data = tmp_path / "store" / "shard-000.data"
    content = bytearray(data.read_bytes())
    content[4096 + 100] ^= 1
    data.write_bytes(content)
    life = live()
    assert life.hits(KEYS[:1], [8192]) == [True]
    assert life.load(KEYS[:1], [8192]) == [False]
    assert life.hits(KEYS[:1], [8192]) == [False]
    assert life.store(KEYS[:1], [8192]).is_successful()
    assert life.load(KEYS[:1], [8192]) == [True]


@pytest.mark.parametrize(
    "change",
    [{"model_name": "n"}, {"kv_rank": 2}, {"object_group_id": 1}, {"cache_salt": "someone"}],
)
def test_a_key_that_differs_in_anything_finds_nothing(
    live: Callable[..., Life], change: dict[str, Any]
) -> None:
    life = live()
    life.store([key(1)], [8192])
    assert life.hits([key(1), key(1, **change)], [8192] * 2) == [True, False]
    assert life.load([key(1, **change)], [8192]) == [False]


def test_an_object_of_another_type_is_another_one(live: Callable[..., Life]) -> None:
    life = live()
    life.store([key(1)], [8192], torch.float16)
    assert life.hits([key(1)], [8192], torch.bfloat16) == [False]
    assert life.load([key(1)], [8192], torch.bfloat16) == [False]
    assert life.store([key(1)], [8192], torch.bfloat16).is_successful()
    assert life.load([key(1)], [8192], torch.float16) == [True]
    life.adapter.delete([key(1)])
    assert life.load([key(1)], [8192], torch.float16) == [False]
    assert life.load([key(1)], [8192], torch.bfloat16) == [False]


def test_without_layouts_in_keys_serialised_objects_are_found(live: Callable[..., Life]) -> None:
    life = live(layout_in_keys=False)
    life.store([key(1)], [8192], torch.uint8)  # as LMCache's serde hands it over
    assert life.hits([key(1)], [16384], torch.float16) == [True]
    assert life.load([key(1)], [8192], torch.uint8) == [True]
    assert life.load([key(1)], [8000], torch.uint8) == [False]  # another length
    life.end()
    assert live().hits([key(1)], [8192], torch.uint8) == [False]
    assert live(layout_in_keys=False, namespace="x").hits([key(1)], [8192]) == [False]


def test_what_was_stored_from_memory_that_lmcache_took_back_is_not_kept(
    live: Callable[..., Life],
) -> None:
    life = live()
    objects = life.fill(KEYS[:3], [SLOT] * 3)
    objects[1].valid = False  # as when L1 is cleared by force
    result = life.stored(life.adapter.submit_store_task(KEYS[:3], objects))
    assert not result.is_successful()
    wait_until(lambda: life.hits(KEYS[:3], [SLOT] * 3) == [True, False, True])
    objects[0].valid = False
    number = life.adapter.submit_load_task(KEYS[:1], objects[:1])
    assert life.ready(life.adapter.get_load_event_fd())
    assert bits(life.adapter.query_load_result(number)) == [False]
    assert life.load(KEYS[:3], [SLOT] * 3) == [True, False, True]


def test_stores_beyond_the_queue_are_dropped_from_the_end_and_counted(
    live: Callable[..., Life],
) -> None:
    life = live(max_queued_bytes=3 * SLOT)
    result = life.store(KEYS[:5], [SLOT] * 5)
    assert not result.is_successful()
    assert result.bytes_transferred() == 0
    assert life.hits(KEYS[:5], [SLOT] * 5) == [True] * 3 + [False] * 2
    assert life.adapter.report_status()["dropped_blocks"] == 2
    assert life.adapter.report_status()["queued_bytes"] == 0
    assert not life.store([KEYS[5]], [4 * SLOT]).is_successful()  # never finds room
    assert life.store(KEYS[3:5], [SLOT] * 2).is_successful()


def test_an_object_in_the_rest_of_the_pool_is_a_miss(live: Callable[..., Life]) -> None:
    life = live(pool_bytes=4 * SLOT + 4096, max_queued_bytes=POOL)
    assert not life.store(KEYS[:5], [SLOT] * 4 + [4096]).is_successful()
    assert life.hits(KEYS[:5], [SLOT] * 4 + [4096]) == [True] * 4 + [False]
    life.pool.forget_all()
    assert life.store([KEYS[4]], [4096]).is_successful()
    life.pool.forget_all()
    life.pool.allocate(4 * SLOT)
    assert life.load([KEYS[4]], [4096]) == [False]


def test_a_pool_that_workers_cannot_map_is_an_error_that_tells_what_to_do(
    module: Any, tmp_path: Path
) -> None:
    private = fakes.PrivatePool(POOL)
    params = {"file": str(tmp_path / "s"), "storage_size": 1 << 20, "slot_bytes": SLOT}
    params |= {"num_of_shard": 1}
    with pytest.raises(KVCacheMemoryError, match="--no-l1-use-lazy and --shm-name"):
        module.LightMemL2Adapter(params, l1_memory_desc=private.description)
    with pytest.raises(InvalidArgumentError, match="L1 pool"):
        module.LightMemL2Adapter(params)
    assert not (tmp_path / "s").exists()


def test_deleting_takes_out_of_store_and_accounts(live: Callable[..., Life]) -> None:
    life = live()
    listener = fakes.Listener()
    life.adapter.register_listener(listener)
    mine = [key(n, cache_salt="me") for n in range(3)]
    life.store(mine, [SLOT, 10, SLOT + 1])
    life.store([key(9)], [SLOT])
    wait_until(lambda: len(listener.stored) == 4)
    assert not life.adapter.supports_global_eviction
    usage = life.adapter.get_usage()
    assert usage.bytes_by_cache_salt == {"me": 2 * SLOT + 11, "": SLOT}
    assert (usage.total_bytes_used, usage.total_capacity_bytes) == (5 * SLOT, 64 * SLOT)
    life.store(mine, [SLOT, 10, SLOT + 1])  # once more is no more
    assert life.adapter.get_usage().bytes_by_cache_salt == usage.bytes_by_cache_salt
    life.adapter.delete([*mine, key(77)])
    assert listener.deleted == mine
    assert life.adapter.get_usage().bytes_by_cache_salt["me"] == 0
    assert life.adapter.get_usage().total_bytes_used == SLOT
    assert life.hits([*mine, key(9)], [SLOT, 10, SLOT + 1, SLOT]) == [False] * 3 + [True]


def test_what_is_looked_up_or_loaded_is_told_as_used(live: Callable[..., Life]) -> None:
    life = live()
    listener = fakes.Listener()
    life.adapter.register_listener(listener)
    life.store(KEYS[:2], [SLOT] * 2)
    life.lookup([KEYS[0], key(9)], {0: fakes.MemoryObject(0, SLOT).layout()})
    assert listener.accessed == [KEYS[0]]
    life.load([KEYS[1]], [SLOT])
    wait_until(lambda: listener.accessed == [KEYS[0], KEYS[1]])


def test_closing_finishes_stores_and_lets_go_of_memory_and_descriptors(
    live: Callable[..., Life], tmp_path: Path
) -> None:
    life = live()
    fds = [life.adapter.get_store_event_fd(), life.adapter.get_load_event_fd()]
    objects = life.fill(KEYS, SIZES)
    life.adapter.submit_store_task(KEYS, objects)
    life.end()
    life.adapter.close()  # once more does nothing
    for fd in fds:
        with pytest.raises(OSError, match="descriptor"):
            os.fstat(fd)
    assert maintenance.inspect(tmp_path / "store").blocks == 8
    # LMCache's controllers are gone by now; whoever calls all the same gets misses.
    number = life.adapter.submit_load_task(KEYS, objects)
    assert bits(life.adapter.query_load_result(number)) == [False] * 8
    assert not life.adapter.report_status()["is_healthy"]
    assert life.adapter.get_usage().total_capacity_bytes == 0


def test_a_server_without_workers_is_not_healthy(
    live: Callable[..., Life], monkeypatch: pytest.MonkeyPatch
) -> None:
    life = live()
    assert life.adapter.report_status()["is_healthy"]
    service = life.adapter._transfers.service()
    monkeypatch.setattr(pool, "MAX_EARLY_DEATHS", 0)  # the first death ends the service
    for pid in service.worker_pids:
        psutil.Process(pid).kill()
    wait_until(lambda: not life.adapter.report_status()["is_healthy"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"flie": "x"},
        {"file": 3},
        {"namespace": None},
        {"load_timeout": -1},
        {"slot_bytes": 0},
        {"max_queued_bytes": -1},
        {"layout_in_keys": "no"},
        {"slot_bytes": 2 * POOL},
    ],
)
def test_wrong_options_are_errors_that_name_them(
    live: Callable[..., Life], wrong: dict[str, Any]
) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
        live(**wrong)


def test_a_store_of_other_slots_is_refused(live: Callable[..., Life]) -> None:
    live().end()
    with pytest.raises(ValueError, match="page"):
        live(slot_bytes=2 * SLOT)
