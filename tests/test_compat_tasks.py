"""PyLocalCacheService: which arguments are refused, and what its tasks say."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
from typing import Any

import numpy as np
import pytest
import torch

from light_mem import InvalidArgumentError, PyState, PyTask, State
from tests.compat_service import (
    ABORTED,
    FINISHED,
    N,
    Rig,
    cumulative,
    finish,
    idle,
    indexer,
    rig,
    some_tokens,
)
from tests.conftest import wait_until

__all__ = ["idle", "rig"]  # fixtures

BIG = 1 << 64


# --- bad arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"tokens": [-1, 2]},
        {"tokens": [BIG, 2]},
        {"tokens": [1.5, 2.5]},
        {"tokens": [1, True]},
        {"tokens": np.array([True, False])},
        {"tokens": torch.tensor([True, False])},
        {"hash_128s": [np.True_, 1]},
        {"tokens": np.array([1.5, 2.5])},
        {"tokens": "ab"},
        {"tokens": 12},
        {"hash_128s": [-1, 2]},
        {"hash_128s": [1 << 128, 2]},
        {"hash_128s": ["00" * 16, "11" * 16]},
        {"tokens": [1, 2, 3]},
        {"tokens": [1]},
        {"hash_128s": []},
        {"mode": "rw"},
        {"mode": b"w"},
        {"start_pos": -1},
        {"start_pos": 3},
        {"kv_page_indexer": indexer([0, 512])},
        {"kv_page_indexer": indexer([-1, 0])},
        {"kv_page_indexer": indexer([[0, 1]])},
        {"kv_page_indexer": torch.tensor([0.0, 1.0])},
        {"kv_page_indexer": torch.tensor([0, 1], dtype=torch.bfloat16)},
        {"kv_page_indexer": indexer([3, 3]), "mode": "r"},
    ],
    ids=str,
)
def test_bad_arguments_are_value_errors_before_anything_is_queued(
    idle: Rig, arguments: dict[str, Any]
) -> None:
    good: dict[str, Any] = {"kv_page_indexer": indexer([0, 1]), "mode": "w"}
    if "hash_128s" not in arguments:
        good["tokens"] = [1, 2]
    ask: Any = idle.service
    with pytest.raises(ValueError):  # noqa: PT011 - the kind is the promise, not the text
        ask.create(**{**good, **arguments})
    assert idle.service.service.stats()["write_tasks"] == 0
    assert idle.service.service.stats()["read_tasks"] == 0


def test_the_lengths_that_do_not_fit_are_both_named(idle: Rig) -> None:
    with pytest.raises(InvalidArgumentError, match="3 pages for 100 tokens") as caught:
        idle.service.create(tokens=list(range(100)), kv_page_indexer=indexer([0, 1, 15]), mode="w")
    assert pickle.loads(pickle.dumps(caught.value)).values == {"pages": 3, "length": 100}
    with pytest.raises(InvalidArgumentError, match="start_pos 3") as caught:
        idle.service.create(tokens=[1], kv_page_indexer=indexer([0]), mode="w", start_pos=3)
    assert pickle.loads(pickle.dumps(caught.value)).values == {"start_pos": 3, "length": 1}


@pytest.mark.parametrize("kind", [list, np.array, lambda p: torch.tensor(p, dtype=torch.int64)])
def test_pages_may_be_any_row_of_integers(rig: Rig, kind: Any) -> None:
    assert finish(rig.service.create([5, 6], kind([8, 9]), "w")) == [FINISHED]


# --- tasks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1, N - 1, N, N + 3, 2 * N, 2 * N + 4, 2 * N + 5])
def test_start_pos_leaves_the_blocks_before_it_alone(rig: Rig, start: int) -> None:
    length = 2 * N + 5
    hashes = cumulative(some_tokens(length))
    rig.fill("start", range(length))
    finish(rig.service.create(hash_128s=hashes, kv_page_indexer=indexer(range(length)), mode="w"))
    rig.wipe()
    task = rig.service.create(
        hash_128s=hashes, kv_page_indexer=indexer(range(length)), mode="r", start_pos=start
    )
    begin = start // N * N
    assert finish(task) == [FINISHED] * (3 - start // N)
    assert all(rig.wiped(page) for page in range(begin))
    assert all(rig.holds("start", page, page) for page in range(begin, length))


def test_start_pos_at_the_end_of_full_blocks_is_a_task_that_is_ready(rig: Rig) -> None:
    task = rig.service.create(some_tokens(N), indexer(range(N)), "r", N)
    assert task.ready()
    assert task.state() == []


def test_an_empty_list_is_ready_at_once(rig: Rig) -> None:
    empty = torch.tensor([], dtype=torch.int32)
    for arguments in ({"tokens": []}, {"hash_128s": []}):
        task = rig.service.create(kv_page_indexer=empty, mode="w", **arguments)
        assert task.ready()
        assert task.data_safe()
        assert task.state() == task.page_already_list == []
    assert rig.service.query([]) == rig.service.query(hash_128s=[]) == []


def test_page_already_list_has_the_pages_of_stored_blocks_and_stays_so(rig: Rig) -> None:
    hashes = cumulative(some_tokens(3 * N))
    pages = list(range(100, 100 + 3 * N))
    finish(rig.service.create(hash_128s=hashes[:N], kv_page_indexer=indexer(pages[:N]), mode="w"))
    task = rig.service.create(hash_128s=hashes, kv_page_indexer=indexer(pages), mode="w")
    listed = task.page_already_list
    listed.clear()  # a copy: the next reader must not see this
    assert task.page_already_list == pages[:N]
    finish(task)
    assert task.page_already_list == pages[:N]
    again = rig.service.create(hash_128s=hashes, kv_page_indexer=indexer(pages), mode="w")
    assert again.ready()
    assert again.page_already_list == pages
    reading = rig.service.create(hash_128s=hashes, kv_page_indexer=indexer(pages), mode="r")
    assert reading.page_already_list == []
    finish(reading)


def test_active_threads_counts_unready_tasks_of_one_mode(rig: Rig) -> None:
    finish(rig.service.create([1], indexer([0]), "w"))
    pids = rig.service.service.worker_pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        tasks = [rig.service.create([n], indexer([n]), "w") for n in (2, 3)]
        tasks.append(rig.service.create([1], indexer([9]), "r"))
        assert (rig.service.active_threads("w"), rig.service.active_threads("r")) == (2, 1)
        assert not any(task.ready() or task.data_safe() for task in tasks)
        assert {s for task in tasks for s in task.state()} <= {PyState.Initial, PyState.Working}
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    assert [finish(task) for task in tasks] == [[FINISHED]] * 3
    wait_until(lambda: not rig.service.active_threads("w") and not rig.service.active_threads("r"))
    with pytest.raises(ValueError, match="mode"):
        rig.service.active_threads("x")
    with pytest.raises(InvalidArgumentError, match="PyTask, not None"):
        rig.service.abort(None)  # type: ignore[arg-type]


def test_a_task_is_ready_when_abort_returns(rig: Rig) -> None:
    for attempt in range(5):
        tokens = some_tokens(8 * N, seed=attempt)
        task = rig.service.create(tokens=tokens, kv_page_indexer=indexer(range(8 * N)), mode="w")
        rig.service.abort(task)
        assert task.ready()
        assert set(task.state()) <= {FINISHED, ABORTED}
        assert rig.service.query(tokens=tokens) == [s == FINISHED for s in task.state()]


def test_states_are_the_ones_of_both_interfaces() -> None:
    assert [(s.name, s.value) for s in PyState] == [
        ("Initial", 0),
        ("Working", 1),
        ("Finished", 2),
        ("Aborted", 3),
    ]
    assert PyState.Finished == State.Finished


def test_tasks_can_be_awaited_and_pickled(rig: Rig) -> None:
    async def both() -> tuple[PyTask, PyTask]:
        task = rig.service.create(some_tokens(N), indexer(range(N)), "w")
        return task, await task

    task, awaited = asyncio.run(both())
    assert awaited is task
    assert pickle.loads(pickle.dumps(task)).state() == [FINISHED]
