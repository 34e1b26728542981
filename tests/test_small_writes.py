"""Writes of one short block: `create` makes them itself."""

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path
from typing import Any

import filelock
import pytest

import light_mem
from light_mem import InvalidArgumentError, LocalCacheService, State
from light_mem.engine import opening, small_writes
from light_mem.index import retention
from tests.engine_helpers import let_go
from tests.service_rig import WAIT, Rig, rig
from tests.small_rig import LIMIT, PAGE, at_any_speed, create, go_on, held, prepared, stopped

__all__ = ["at_any_speed", "stopped"]  # fixtures


@pytest.mark.parametrize("pages", [[3], [3, 4], [9, 2, 31, 16]])
def test_a_short_write_is_ready_when_create_returns(stopped: Rig, pages: list[int]) -> None:
    before = stopped.service.stats()
    task = create(stopped, 7, pages)
    assert task.ready()
    assert task.data_safe()
    assert task.state() == [State.Finished]
    assert task.get_page_already_list() == []
    assert pickle.loads(pickle.dumps(task)).state() == task.state()
    numbers = stopped.service.stats()
    change = {name: numbers[name] - before[name] for name in ("blocks_written", "write_tasks")}
    assert change == {"blocks_written": 1, "write_tasks": 1}
    assert numbers["bytes_written"] - before["bytes_written"] == len(pages) * PAGE
    assert numbers["write_latency"]["count"] - before["write_latency"]["count"] == 1
    assert numbers["write_ns"] > before["write_ns"]
    assert numbers["active_write_tasks"] == 0
    assert stopped.service.query(7)
    assert held(stopped, 7, pages)


def test_what_is_stored_already_is_not_written_again(stopped: Rig) -> None:
    stopped.fill(7, [3])
    assert stopped.service.create("write", [7], [3]).ready()
    before = stopped.service.stats()
    stopped.blank([4])
    task = stopped.service.create("write", [7], [4])
    assert task.state() == [State.Finished]
    assert task.get_page_already_list() == [4]
    numbers = stopped.service.stats()
    assert numbers["blocks_written"] == before["blocks_written"]
    assert numbers["present"] == before["present"] + 1
    assert held(stopped, 7, [5])


def test_a_full_store_gives_the_place_of_the_oldest_block(stopped: Rig) -> None:
    for key in range(64):
        assert create(stopped, key, [key % 32]).ready()
    assert stopped.service.query(0)  # used now
    for key in (64, 65):
        assert create(stopped, key, [key % 32]).ready()
    assert stopped.service.query(list(range(66))) == [True, False, False] + [True] * 63
    assert stopped.service.stats()["evictions"] == 2
    assert all(held(stopped, key, [1]) for key in (0, 3, 63, 64, 65))


@pytest.mark.parametrize("why", ["long", "several", "queued", "locked", "slow", "large shard"])
def test_what_create_should_not_wait_for_is_left_to_the_workers(
    stopped: Rig, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    others = []
    lock = filelock.FileLock(
        Path(stopped.service._engine.directory) / "shard-000.lock", thread_local=False
    )
    if why == "long":
        task = create(stopped, 7, [3, 4, 5, 6, 8])
    elif why == "several":
        stopped.fill(7, [3])
        stopped.fill(8, [4])
        task = stopped.service.create("write", [7, 8], [3, 4])
    elif why == "queued":
        others.append(create(stopped, 9, [10, 11, 12, 13, 14]))
        task = create(stopped, 7, [3])
    elif why == "locked":
        with lock:
            task = create(stopped, 7, [3])
            assert not task.ready()
    elif why == "slow":
        monkeypatch.setattr(small_writes, "SLOW_NS", 0)
        assert create(stopped, 6, [2]).ready()
        task = create(stopped, 7, [3])
    else:
        monkeypatch.setattr(small_writes, "MAX_SLOTS", 63)
        writes = small_writes.SmallWrites(
            stopped.service._engine, stopped.service._session.table, True
        )
        monkeypatch.setattr(stopped.service, "_small_writes", writes)
        task = create(stopped, 7, [3])
    assert not task.ready()
    go_on(stopped)
    assert all(t.wait(WAIT) for t in (task, *others))
    assert held(stopped, 7, [3, 4, 5, 6, 8] if why == "long" else [3])


@pytest.mark.parametrize(
    "options", [{"small_write_bytes": 0}, {"page_cache": "drop"}, {"durability": "flush"}]
)
def test_it_can_be_turned_off(tmp_path: Path, options: dict[str, Any]) -> None:
    with rig(tmp_path, page_bytes=PAGE, **{"small_write_bytes": LIMIT, **options}) as r:
        prepared(r)
        (worker,) = r.service.worker_pids
        os.kill(worker, signal.SIGSTOP)
        task = create(r, 1, [0])
        assert not task.ready()
        os.kill(worker, signal.SIGCONT)
        assert task.wait(WAIT)
        assert held(r, 1, [20])
    let_go(r)


def test_a_block_lives_as_long_as_the_service_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rig(tmp_path, page_bytes=PAGE, small_write_bytes=LIMIT, time_to_live=50.0) as r:
        prepared(r)
        assert create(r, 1, [0]).ready()
        assert r.service.query(1)
        later = retention.clock() + 100
        monkeypatch.setattr(retention, "clock", lambda: later)
        assert not r.service.query(1)
    let_go(r)


def test_before_run_and_through_a_client_the_workers_write(tmp_path: Path) -> None:
    with rig(tmp_path, page_bytes=PAGE, run=False) as r:
        prepared(r)
        task = create(r, 1, [0])
        assert not task.ready()
        r.service.run()
        assert task.wait(WAIT)
        client = r.service.client()
        (worker,) = r.service.worker_pids
        os.kill(worker, signal.SIGSTOP)
        r.fill(2, [4])
        task = client.create("write", [2], [4])  # it has no KV tensor
        assert not task.ready()
        os.kill(worker, signal.SIGCONT)
        assert task.wait(WAIT)
        client.close()
        assert held(r, 2, [20])
    let_go(r)


def test_the_environment_gives_the_limit_that_no_argument_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = light_mem.allocate_kvcache(8, PAGE)
    for wrong in (-1, 1.5, "much"):
        with pytest.raises(InvalidArgumentError, match="small_write_bytes"):
            LocalCacheService(tmp_path / "s", 1 << 20, 1, kv, 1, small_write_bytes=wrong)  # type: ignore[arg-type]
    monkeypatch.setenv("LIGHTMEM_SMALL_WRITE_BYTES", "much")
    with pytest.raises(InvalidArgumentError, match=r"LIGHTMEM_SMALL_WRITE_BYTES.*much"):
        LocalCacheService(tmp_path / "s", 1 << 20, 1, kv, 1)
    monkeypatch.setenv("LIGHTMEM_SMALL_WRITE_BYTES", str(PAGE))
    with rig(tmp_path, page_bytes=PAGE) as r:
        prepared(r)
        (worker,) = r.service.worker_pids
        os.kill(worker, signal.SIGSTOP)
        assert create(r, 1, [20]).ready()
        assert not (two := create(r, 2, [21, 22])).ready()
        os.kill(worker, signal.SIGCONT)
        assert two.wait(WAIT)
    let_go(r)


def test_to_write_what_is_stored_counts_as_use(tmp_path: Path) -> None:
    with rig(tmp_path, page_bytes=PAGE, slots=64, small_write_bytes=LIMIT) as r:
        prepared(r)
        for key in range(64):
            assert create(r, key, [key % 32]).ready()
        assert create(r, 0, [0]).get_page_already_list() == []  # regions have no pages
        assert create(r, 64, [1]).ready()
        assert r.service.query([0, 1, 2]) == [True, False, True]
    let_go(r)


def test_without_descriptors_to_spare_the_shards_are_not_opened_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rig(tmp_path, page_bytes=PAGE, small_write_bytes=LIMIT, run=False) as r:
        needed = opening.descriptors_for(1)
        for soft, opened in (2 * needed - 1, False), (2 * needed, True):
            monkeypatch.setattr(opening.resource, "getrlimit", lambda _, soft=soft: (soft, soft))
            r.service._small_writes.prepare()
            assert r.service._engine.is_at_hand(0) == opened
    let_go(r)
