"""The adapter as LMCache sees it: store, restart, look-up, load; against fakes of its types."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import lmcache_fakes as fakes
from tests.conftest import wait_until
from tests.lmcache_rig import KEYS, POOL, SIZES, SLOT, Life, bits, key, live, module

__all__ = ["live", "module"]  # fixtures


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
