"""What the LMCache adapter refuses at the start, its accounts, and its end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from light_mem import InvalidArgumentError, KVCacheMemoryError, maintenance
from light_mem.engine import pool
from tests import lmcache_fakes as fakes
from tests.conftest import wait_until
from tests.lmcache_rig import KEYS, POOL, SIZES, SLOT, Life, bits, key, live, module

__all__ = ["live", "module"]  # fixtures


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
