"""PyLocalCacheService: two generations of arguments, one store; the wrong guess is never a hit."""

from __future__ import annotations

import asyncio
import inspect
import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from light_mem import InvalidArgumentError, PyLocalCacheService, PyState, PyTask, State
from tests.compat_service import (
    N,
    Rig,
    cumulative,
    finish,
    indexer,
    opened,
    some_tokens,
)
from tests.conftest import wait_until

FINISHED, ABORTED = PyState.Finished, PyState.Aborted
BIG = 1 << 64


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with opened(tmp_path / "cache_file") as rig:
        yield rig


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """One service for calls that must change nothing."""
    with opened(tmp_path_factory.mktemp("idle") / "cache_file") as rig:
        yield rig


# --- hashes --------------------------------------------------------------------------------------


def test_the_constructor_has_the_defaults_of_the_original() -> None:
    parameters = list(inspect.signature(PyLocalCacheService).parameters.values())
    assert [p.name for p in parameters] == [
        "kvcache_tensor",
        "file",
        "storage_size",
        "num_shard",
        "num_worker",
    ]
    assert [p.default for p in parameters[2:]] == [32 << 30, 32, 16]


def test_the_hash_of_a_block_is_the_digest_of_its_own_chunk_of_tokens(rig: Rig) -> None:
    tokens = some_tokens(N)
    tail = tokens[:3]
    digests = [
        xxhash.xxh3_128(np.array(chunk, np.uint64).tobytes()).hexdigest()
        for chunk in (tokens, tokens, tail)
    ]
    assert rig.service.hash(tokens + tokens + tail) == digests
    assert rig.service.hash([]) == []
    assert rig.service.hash(np.array(tokens)) == digests[:1]


@pytest.mark.parametrize("length", [1, N - 1, N, N + 1, 2 * N + 5])
def test_blocks_are_stored_under_the_digests_that_hash_returns(rig: Rig, length: int) -> None:
    tokens = some_tokens(length, seed=length)
    assert set(
        finish(rig.service.create(tokens=tokens, kv_page_indexer=indexer(range(length)), mode="w"))
    ) == {FINISHED}
    digests = rig.service.hash(tokens)
    assert len(digests) == -(-length // N)
    assert rig.service.service.query(digests) == [True] * len(digests)


@pytest.mark.parametrize("length", [1, N - 1, N, N + 1, 2 * N + 5])
def test_a_cumulative_block_is_stored_under_its_last_hash(rig: Rig, length: int) -> None:
    hashes = cumulative(some_tokens(length, seed=length))
    finish(rig.service.create(hash_128s=hashes, kv_page_indexer=indexer(range(length)), mode="w"))
    stored = [key for key in hashes if rig.service.service.query(key)]
    last = sorted({*range(N - 1, length, N), length - 1})
    assert stored == [hashes[at] for at in last]
    assert rig.service._hash(hashes) == [f"{key:032x}" for key in stored]


GENERATIONS = {"tokens": some_tokens, "hash_128s": lambda count: cumulative(some_tokens(count))}


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_pages_come_back_into_other_pages_in_their_order(
    rig: Rig, generation: str, named: bool
) -> None:
    length = 2 * N + 9
    values = GENERATIONS[generation](length)
    first = ((), {generation: values}) if named else ((values,), {})
    written, read = list(range(300, 300 + length)), list(range(length))[::-1]
    rig.fill(generation, written)
    ask: Any = rig.service
    assert ask.query(*first[0], **first[1]) == [False] * 3
    task = ask.create(*first[0], kv_page_indexer=indexer(written), mode="w", **first[1])
    assert finish(task) == [FINISHED] * 3
    assert ask.query(*first[0], **first[1]) == [True] * 3
    rig.wipe()
    task = ask.create(*first[0], kv_page_indexer=indexer(read), mode="r", **first[1])
    assert finish(task) == [FINISHED] * 3
    assert all(rig.holds(generation, at, page) for at, page in enumerate(read))
    assert all(rig.wiped(page) for page in range(length, 512))


def test_all_arguments_may_be_positional(rig: Rig) -> None:
    tokens = some_tokens(N + 2)
    rig.fill("positional", range(N + 2))
    assert finish(rig.service.create(tokens, indexer(range(N + 2)), "w", 0)) == [FINISHED] * 2
    rig.wipe()
    assert finish(rig.service.create(tokens, indexer(range(N + 2)), "r", N)) == [FINISHED]
    assert rig.holds("positional", N, N)
    assert rig.wiped(0)


# --- lists without a name ------------------------------------------------------------------------


@pytest.mark.parametrize("low", [0, 1 << 32, 1 << 63], ids=["tokens", "above 2**32", "64-bit"])
def test_unnamed_prompts_that_end_in_the_same_token_never_share_a_block(rig: Rig, low: int) -> None:
    ours = [low + token for token in some_tokens(N - 1, seed=1)] + [low + 7]
    theirs = [low + token for token in some_tokens(N - 1, seed=2)] + [low + 7]
    finish(rig.service.create(ours, indexer(range(N)), "w"))
    assert rig.service.query(ours) == [True]
    assert rig.service.query(theirs) == [False]
    assert finish(rig.service.create(theirs, indexer(range(N)), "r")) == [ABORTED]


def test_page_hashes_of_64_bits_named_tokens_are_found_unnamed(rig: Rig) -> None:
    """The older LightLLM: `create(tokens=)` and `query(...)` of 64-bit page hashes."""
    hashes = [value % BIG for value in cumulative(some_tokens(N + 3))]
    assert max(hashes) > 1 << 63
    finish(rig.service.create(tokens=hashes, kv_page_indexer=indexer(range(N + 3)), mode="w"))
    assert rig.service.query(hashes) == rig.service.query(tokens=hashes) == [True, True]


@pytest.mark.parametrize("limit", [1 << 16, BIG, 1 << 128])
def test_hash_128s_of_any_size_that_create_named_are_found_unnamed(rig: Rig, limit: int) -> None:
    """The newer LightLLM names them in `create`, not in `query`."""
    hashes = [value % limit for value in cumulative(some_tokens(N + 3))]
    finish(rig.service.create(hash_128s=hashes, kv_page_indexer=indexer(range(N + 3)), mode="w"))
    assert rig.service.query(hashes) == rig.service.query(hash_128s=hashes) == [True, True]
    assert rig.service.query(hashes[:-1]) == [True, False]


def test_create_refuses_an_unnamed_list_of_small_and_large_values(rig: Rig) -> None:
    mixed = [7, BIG + 7]
    with pytest.raises(ValueError, match="name it"):
        rig.service.create(mixed, indexer([0, 1]), "w")
    finish(rig.service.create(hash_128s=mixed, kv_page_indexer=indexer([0, 1]), mode="w"))
    assert rig.service.query(mixed) == [True]
    assert rig.service.query([8, BIG + 7]) == [True]  # the last cumulative hash says it all
    assert rig.service.query([BIG + 7, 7]) == [False]


def test_one_generation_must_be_given(idle: Rig) -> None:
    ask: Any = idle.service
    for arguments in ((), {"tokens": [1], "hash_128s": [1]}):
        with pytest.raises(TypeError, match="one of them"):
            ask.query(**dict(arguments))
    with pytest.raises(TypeError, match="one of them"):
        ask.create([1], indexer([0]), "w", tokens=[1])
    with pytest.raises(TypeError, match="kv_page_indexer"):
        ask.create([1], mode="w")


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
