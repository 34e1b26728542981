"""`service.stats()`: every number an operator asks for, and that it is the right one."""

from __future__ import annotations

import json
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from light_mem import State, TaskTableFullError
from light_mem.engine.table_layout import FINISHED
from light_mem.index import format as fmt
from light_mem.index.ages import AGE_BOUNDS, AgeBucket, by_age
from tests.service_rig import WAIT, rig

NAMES = """queried hits misses bytes_read bytes_written read_rate write_rate read_queue write_queue
    read_latency write_latency evictions damaged lost_races dropped_stores restarts ages workers
    active_read_tasks active_write_tasks blocks used_slots slots""".split()


def test_all_of_it_is_there_and_json_knows_it(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        r.write(["a", "b", "c"], [0, 1, 2])
        r.read(["a", "nothing"], [3, 4])
        r.service.query(["a", "b", "nothing"])
        stats = r.service.stats()
        assert json.loads(json.dumps(stats)) == stats
        assert set(NAMES) <= set(stats)
        assert (stats["queried"], stats["hits"], stats["misses"]) == (3, 2, 1)
        assert (stats["bytes_written"], stats["bytes_read"]) == (3 * 4096, 4096)
        assert stats["missing"] == 1  # known at `create`, and still added to what workers missed
        assert stats["read_rate"] == pytest.approx(4096 * 1e9 / stats["read_ns"])
        assert sum(age["blocks"] for age in stats["ages"]) == 3
        assert "ages" not in r.service.stats(ages=False)


def test_tasks_are_counted_by_their_time_from_create_to_ready(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        r.write(["a", "b", "c"], [0, 1, 2])
        for _ in range(4):
            r.read(["a", "b"], [5, 6])
        r.write(["a", "b"], [0, 1])  # stored: ready at once, seen by no worker
        stats = r.service.stats()
        assert stats["write_latency"]["count"] == 1
        assert stats["read_latency"]["count"] == 4
        assert stats["write_tasks"] == 2

        [pid] = r.service.worker_pids
        os.kill(pid, signal.SIGSTOP)
        task = r.service.create("read", ["a"], [7])
        began = time.monotonic()  # after `create`, whose beginning is not in the latency
        assert not task.wait(0.3)
        waited = time.monotonic() - began
        os.kill(pid, signal.SIGCONT)
        assert task.wait(WAIT)
        after = r.service.stats()["read_latency"]
        assert after["count"] == 5
        total = after["mean"] * 5 - stats["read_latency"]["mean"] * 4
        assert total >= waited
        assert after["p99"] >= 0.9 * waited > stats["read_latency"]["p50"]


def test_tasks_of_several_workers_are_all_counted(tmp_path: Path) -> None:
    with rig(tmp_path, workers=2, pages=64, slots=4096) as r:
        tasks = [
            r.service.create("write", [f"{n} {page}" for page in range(64)], range(64))
            for n in range(50)
        ]
        assert all(task.wait(WAIT) for task in tasks)
        count = r.service.stats()["write_latency"]["count"]
        # Two workers that finish a task's last blocks at the same instant may both count it.
        assert 50 <= count <= 55


def test_a_task_is_counted_though_its_worker_loses_the_processor_over_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rig(tmp_path, run=False) as r:
        r.service.create("write", ["a"], [0])
        table = r.service._session.table
        [cell] = r.service._session.queue.claim(1)
        table.states[cell] = FINISHED
        add, seen = table.latencies.add, []

        def interrupted(*arguments: int) -> None:
            if not seen:
                seen.append(0)
                seen[0] = r.service.stats()["write_latency"]["count"]
            add(*arguments)

        monkeypatch.setattr(table.latencies, "add", interrupted)
        table.finish(int(table.cells["row"][cell]), 1)
        assert seen == [1]


def test_a_task_that_is_seen_ready_is_counted_before_its_worker_comes_to_that(
    tmp_path: Path,
) -> None:
    with rig(tmp_path, run=False) as r:
        task = r.service.create("write", ["a"], [0])
        table = r.service._session.table
        [cell] = r.service._session.queue.claim(1)
        assert r.service.stats()["write_latency"]["count"] == 0
        table.states[cell] = FINISHED  # ... and here the worker loses its processor
        assert task.ready()
        assert r.service.stats()["write_latency"]["count"] == 1
        table.finish(int(table.cells["row"][cell]), 1)
        assert r.service.stats()["write_latency"]["count"] == 1


def test_a_client_sees_the_same_and_adds_to_it(tmp_path: Path) -> None:
    with rig(tmp_path) as r, pickle.loads(pickle.dumps(r.service.client())) as client:
        r.write(["a"], [0])
        assert client.query("a")
        task = client.create("read", ["a"], [1])
        assert task.wait(WAIT)
        assert client.stats() == r.service.stats()
        assert client.stats()["read_latency"]["count"] == 1


def test_dropped_stores_are_those_nobody_took(tmp_path: Path) -> None:
    with rig(tmp_path, run=False, max_blocks=4, create_timeout=0.0) as r:
        tasks = [r.service.create("write", list("abcd"), [0, 1, 2, 3])]
        with pytest.raises(TaskTableFullError):
            r.service.create("write", list("xyz"), [4, 5, 6])
        assert r.service.stats()["dropped_stores"] == 3
        with pytest.raises(TaskTableFullError):
            r.service.create("write", ["x", "y"], [4, 5])
        r.service.count_dropped(7)
        assert r.service.stats()["dropped_stores"] == 12
        r.service.abort(tasks[0])
        assert set(tasks[0].state()) == {State.Aborted}
        assert r.service.stats()["write_latency"]["count"] == 1  # aborted is ready


# --- ages -----------------------------------------------------------------------------------------

NOW = 2_000_000_000 * 10**9


def entries(*ages: float) -> np.ndarray:
    """Entries of blocks used so many seconds ago, each of 1000 bytes more than the one before."""
    made = np.zeros(len(ages), fmt.ENTRY)
    made["tag"] = fmt.make_tag(fmt.LIVE, 1, 7)
    made["used"] = [NOW - int(age * 10**9) for age in ages]
    made["nbytes"] = 1000 * np.arange(1, len(ages) + 1)
    return made


def aged(made: np.ndarray) -> list[AgeBucket]:
    return by_age(made, made["used"], NOW)


def test_blocks_are_counted_by_age() -> None:
    found = aged(entries(0, 59.9, 60, 86399, 86401, 10 * 365 * 86400, -50))
    assert [bucket.below for bucket in found] == [*AGE_BOUNDS, None]
    counted = {bucket.below: (bucket.blocks, bucket.nbytes) for bucket in found if bucket.blocks}
    assert counted == {
        60: (3, 1000 + 2000 + 7000),  # one was used in the future: another clock
        300: (1, 3000),
        86400: (1, 4000),
        259200: (1, 5000),
        None: (1, 6000),
    }


@pytest.mark.parametrize("state", [fmt.FREE, fmt.WRITING, fmt.EXTENT])
def test_what_is_no_stored_block_has_no_age(state: int) -> None:
    made = entries(1, 2)
    made["tag"][0] = fmt.make_tag(state, 1, 7)
    assert sum(bucket.blocks for bucket in aged(made)) == 1


def test_many_entries_are_all_counted() -> None:
    assert sum(bucket.blocks for bucket in aged(entries(*[70] * 150_000))) == 150_000
    assert sum(bucket.blocks for bucket in aged(entries())) == 0


def test_damage_of_the_counts_of_look_ups_stops_none(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        r.service._engine._index.header["lookups"] = 2**64 - 1
        r.service._engine._index.header["hits"] = 2**64 - 1
        assert r.service.query(["a", "b"]) == [False, False]
        assert r.service.match_prefix(["a"]) == 0
        assert r.service.query("a") is False
