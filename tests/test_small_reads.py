"""Short reads of what lies in the page cache: `create` makes them itself."""

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path

import pytest

import light_mem
from light_mem import InvalidArgumentError, LocalCacheService, ServiceClosedError, State
from tests.cached import can_forget, forget, forget_all
from tests.engine_helpers import let_go
from tests.service_rig import WAIT, Rig, rig
from tests.small_rig import LIMIT, PAGE, data_file, go_on, stored

__all__ = ["stored"]  # fixtures


@pytest.mark.parametrize("pages", [[20], [20, 21], [23, 20, 31, 16]])
def test_a_short_read_is_ready_when_create_returns(stored: Rig, pages: list[int]) -> None:
    stored.blank(pages)
    before = stored.service.stats()
    task = stored.service.create("read", list(range(len(pages))), pages)
    assert task.ready()
    assert task.data_safe()
    assert task.state() == [State.Finished] * len(pages)
    assert [block.pages for block in task.blocks] == [(page,) for page in pages]
    assert pickle.loads(pickle.dumps(task)).state() == task.state()
    for key, page in enumerate(pages):
        assert stored.holds(key, [page])
    numbers = stored.service.stats()
    assert numbers["blocks_read"] - before["blocks_read"] == len(pages)
    assert numbers["bytes_read"] - before["bytes_read"] == len(pages) * PAGE
    assert numbers["read_tasks"] - before["read_tasks"] == 1
    assert numbers["read_latency"]["count"] - before["read_latency"]["count"] == 1
    assert numbers["read_ns"] > before["read_ns"]
    assert numbers["active_read_tasks"] == 0


def test_what_is_longer_than_the_limit_is_left_to_the_workers(stored: Rig) -> None:
    task = stored.service.create("read", list(range(5)), list(range(20, 25)))
    assert not task.ready()
    go_on(stored)
    assert task.wait(WAIT)
    assert all(stored.holds(n, [20 + n]) for n in range(5))


def test_more_than_a_few_blocks_are_left_to_the_workers(stored: Rig) -> None:
    regions = [(20 * PAGE + 200 * n, 100) for n in range(17)]
    go_on(stored)
    names = [f"short {n}" for n in range(17)]
    assert stored.service.create_regions("write", names, regions).wait(WAIT)
    os.kill(stored.service.worker_pids[0], signal.SIGSTOP)
    assert stored.service.create_regions("read", names[:16], regions[:16]).ready()
    task = stored.service.create_regions("read", names, regions)
    assert not task.ready()
    go_on(stored)
    assert task.wait(WAIT)
    assert task.state() == [State.Finished] * 17


def test_what_is_not_in_the_page_cache_is_left_to_the_workers(stored: Rig, tmp_path: Path) -> None:
    if not can_forget(tmp_path):
        pytest.skip("this file system drops no pages")
    forget_all(data_file(stored))
    task = stored.service.create("read", [3], [20])
    assert not task.ready()
    go_on(stored)
    assert task.wait(WAIT)
    assert stored.holds(3, [20])


def test_what_is_not_in_the_page_cache_is_not_even_begun_to_be_read(
    stored: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_forget(tmp_path):
        pytest.skip("this file system drops no pages")
    asked: list[int] = []
    preadv = os.preadv

    def recorded(descriptor: int, buffers: list[memoryview], at: int, flags: int) -> int:
        asked.append(at)
        return preadv(descriptor, buffers, at, flags)

    monkeypatch.setattr(os, "preadv", recorded)
    assert stored.service.create("read", [3], [20]).ready()
    assert len(asked) == 1
    forget(data_file(stored))
    # The kernel would begin to read it ahead, and wait in there where the device's queue is full.
    task = stored.service.create("read", [3], [21])
    assert not task.ready()
    assert len(asked) == 1
    go_on(stored)
    assert task.wait(WAIT)
    assert stored.holds(3, [21])


def test_one_missing_block_leaves_the_others_to_the_workers(stored: Rig) -> None:
    stored.blank([20, 21])
    task = stored.service.create("read", [3, 99], [20, 21])
    assert task.state()[1] is State.Aborted
    assert stored.is_blank([20])  # nothing is copied before all were found
    assert stored.is_blank([21])
    go_on(stored)
    assert task.wait(WAIT)
    assert task.state() == [State.Finished, State.Aborted]
    assert stored.holds(3, [20])


def test_a_block_of_another_length_is_missing(stored: Rig) -> None:
    task = stored.service.create_regions("read", [3], [(20 * PAGE, 100)])
    go_on(stored)
    assert task.wait(WAIT)
    assert task.state() == [State.Aborted]


def test_a_read_counts_as_use_for_eviction(tmp_path: Path) -> None:
    with rig(tmp_path, page_bytes=PAGE, slots=64, small_read_bytes=LIMIT, pages=64) as r:
        r.write(range(64), range(64))
        (worker,) = r.service.worker_pids
        os.kill(worker, signal.SIGSTOP)
        assert r.service.create("read", [0], [1]).ready()
        os.kill(worker, signal.SIGCONT)
        r.write(["one more"], [2])
        assert r.service.query(0)
        assert not r.service.query(1)
    let_go(r)


@pytest.mark.parametrize("options", [{"small_read_bytes": 0}, {"page_cache": "drop"}])
def test_it_can_be_turned_off(tmp_path: Path, options: dict[str, object]) -> None:
    with rig(tmp_path, page_bytes=PAGE, **{"small_read_bytes": LIMIT, **options}) as r:
        r.write([1], [0])
        (worker,) = r.service.worker_pids
        os.kill(worker, signal.SIGSTOP)
        task = r.service.create("read", [1], [20])
        assert not task.ready()
        os.kill(worker, signal.SIGCONT)
        assert task.wait(WAIT)
        assert r.holds(1, [20])
    let_go(r)


def test_before_run_and_through_a_client_the_workers_read(tmp_path: Path) -> None:
    with rig(tmp_path, page_bytes=PAGE, small_read_bytes=LIMIT) as r:
        r.write([1], [0])
        client = r.service.client()
        (worker,) = r.service.worker_pids
        os.kill(worker, signal.SIGSTOP)
        task = client.create("read", [1], [20])  # it has no KV tensor
        assert not task.ready()
        os.kill(worker, signal.SIGCONT)
        assert task.wait(WAIT)
        client.close()
    with rig(tmp_path, page_bytes=PAGE, small_read_bytes=LIMIT, run=False) as r:
        task = r.service.create("read", [1], [20])
        assert not task.ready()
        r.service.run()
        assert task.wait(WAIT)
        assert r.holds(1, [20])
    let_go(r)


def test_the_environment_gives_the_limit_that_no_argument_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = light_mem.allocate_kvcache(8, PAGE)
    for text in ("-1", "much", "1.5"):
        monkeypatch.setenv("LIGHTMEM_SMALL_READ_BYTES", text)
        with pytest.raises(InvalidArgumentError, match="LIGHTMEM_SMALL_READ_BYTES.*" + text):
            LocalCacheService(tmp_path / "s", 1 << 20, 1, kv, 1)
    for wrong in (-1, 1.5, "much"):
        with pytest.raises(InvalidArgumentError, match="small_read_bytes"):
            LocalCacheService(tmp_path / "s", 1 << 20, 1, kv, 1, small_read_bytes=wrong)  # type: ignore[arg-type]
    monkeypatch.setenv("LIGHTMEM_SMALL_READ_BYTES", str(PAGE))
    with rig(tmp_path, page_bytes=PAGE) as r:
        r.write([1, 2], [0, 1])
        (worker,) = r.service.worker_pids
        os.kill(worker, signal.SIGSTOP)
        assert r.service.create("read", [1], [20]).ready()
        assert not (two := r.service.create("read", [1, 2], [21, 22])).ready()
        os.kill(worker, signal.SIGCONT)
        assert two.wait(WAIT)
    let_go(r)


def test_nothing_is_read_once_the_workers_are_ended(stored: Rig) -> None:
    go_on(stored)
    stored.service.end_workers()
    with pytest.raises(ServiceClosedError):
        stored.service.create("read", [1], [20])
    assert not stored.service._small_reads.read([])


def test_a_read_of_nothing_counts_as_a_task_that_took_no_time(stored: Rig) -> None:
    before = stored.service.stats(ages=False)
    assert stored.service.create("read", [], []).ready()
    numbers = stored.service.stats(ages=False)
    assert numbers["read_tasks"] - before["read_tasks"] == 1
    assert numbers["read_latency"] == before["read_latency"]
    assert numbers["read_ns"] == before["read_ns"]
