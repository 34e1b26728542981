"""PyLocalCacheService: two generations of arguments, one store; the wrong guess is never a hit."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import xxhash

from light_mem import PyLocalCacheService
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

__all__ = ["idle", "rig"]  # fixtures

BIG = 1 << 64


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
