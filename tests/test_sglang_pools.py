"""Side pools of SGLang: what they store, which prefix they leave, and the room that they take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from light_mem import InvalidArgumentError, ServiceClosedError, StoreFormatError, maintenance
from tests.sglang_fake_pools import (
    LogicalHostPool,
    MHATokenToKVPoolHost,
    MLATokenToKVPoolHost,
    StatePool,
)
from tests.sglang_fakes import PoolHitPolicy, PoolName, PoolTransfer
from tests.sglang_rig import KEYS, Life, Live, indices_of, key, live, module

__all__ = ["live", "module"]  # fixtures


def transfer(name: str, keys: Sequence[str], pages: Sequence[int], page_size: int) -> PoolTransfer:
    return PoolTransfer(PoolName(name), indices_of(pages, page_size), keys=list(keys))


def asked(name: str, policy: PoolHitPolicy, window: int = 1) -> PoolTransfer:
    """A side pool in the question which prefix is stored."""
    return PoolTransfer(PoolName(name), keys=["?"] * window, hit_policy=policy)


def store(life: Life, name: str, keys: Sequence[str], pages: Sequence[int]) -> list[bool]:
    pool = life.side_pools[name]
    for k, page in zip(keys, pages, strict=True):
        life.fill(name + k, page, pool)
    done = life.backend.batch_set_v2([transfer(name, keys, pages, pool.page_size)])
    return done[name]


def load(life: Life, name: str, keys: Sequence[str], pages: Sequence[int]) -> list[bool]:
    pool = life.side_pools[name]
    life.blank(pages, pool)
    done = life.backend.batch_get_v2([transfer(name, keys, pages, pool.page_size)])
    return done[name]


def index_pool() -> Any:
    """One piece a page, smaller than those of KV."""
    return MLATokenToKVPoolHost(width=16)


def test_a_side_pool_comes_back_after_a_restart(live: Live) -> None:
    first = live(side_pools={"indexer": index_pool()})
    first.store(KEYS, range(8))
    assert store(first, "indexer", KEYS, range(8)) == [True] * 8
    first.end()
    second = live(side_pools={"indexer": index_pool()})
    pages = [9, 1, 8, 2, 7, 3, 6, 4]
    assert load(second, "indexer", KEYS, pages) == [True] * 8
    pool = second.side_pools["indexer"]
    assert all(second.holds("indexer" + k, p, pool) for k, p in zip(KEYS, pages, strict=True))
    assert second.load(KEYS, range(8)) == [True] * 8
    assert all(second.holds(k, n) for n, k in enumerate(KEYS))


def test_a_pool_of_two_buffers_is_there_when_both_are(live: Live, tmp_path: Path) -> None:
    life = live(side_pools={"mamba": StatePool()}, options={"storage_size": 1 << 22})
    assert store(life, "mamba", KEYS[:3], [0, 1, 2]) == [True] * 3
    pool = life.side_pools["mamba"]
    assert load(life, "mamba", KEYS[:3], [5, 7, 6]) == [True] * 3
    assert all(life.holds("mamba" + KEYS[n], p, pool) for n, p in enumerate([5, 7, 6]))
    life.end()
    # One buffer's store is lost: its pages are.
    maintenance.clear(tmp_path / "store.mamba.1")
    again = live(side_pools={"mamba": StatePool()}, options={"storage_size": 1 << 22})
    again.store(KEYS[:3], range(3))
    assert load(again, "mamba", KEYS[:3], [0, 1, 2]) == [False] * 3
    found = again.backend.batch_exists_v2(KEYS[:3], [asked("mamba", PoolHitPolicy.TRAILING_PAGES)])
    assert found.kv_hit_pages == 0


def test_which_prefix_is_usable_depends_on_all_pools(live: Live) -> None:
    pools = {"indexer": index_pool(), "mamba": StatePool()}
    life = live(side_pools=pools, options={"storage_size": 1 << 22})
    life.store(KEYS[:7], range(7))
    store(life, "indexer", KEYS[:6], range(6))
    store(life, "mamba", [KEYS[1], KEYS[4]], [0, 1])

    def prefix(*transfers: PoolTransfer) -> tuple[int, dict[Any, int], list[int]]:
        found = life.backend.batch_exists_v2(KEYS, list(transfers))
        pools = {str(name): pages for name, pages in found.extra_pool_hit_pages.items()}
        return found.kv_hit_pages, pools, found.restorable_prefix_pages

    every = asked("indexer", PoolHitPolicy.ALL_PAGES)
    last = asked("mamba", PoolHitPolicy.TRAILING_PAGES)
    assert prefix() == (7, {"kv": 7}, [1, 2, 3, 4, 5, 6, 7])
    assert prefix(every) == (6, {"kv": 7, "indexer": 6}, [1, 2, 3, 4, 5, 6])
    assert prefix(every, last) == (5, {"kv": 7, "indexer": 6, "mamba": 5}, [2, 5])
    assert prefix(asked("mamba", PoolHitPolicy.BLOCK_GROUPS))[0] == 7
    window = asked("indexer", PoolHitPolicy.TRAILING_PAGES, window=3)
    assert prefix(window)[2] == [1, 2, 3, 4, 5, 6]
    assert life.backend.batch_exists_v2([key(99)], [every]).kv_hit_pages == 0


def test_a_pool_without_memory_leaves_the_answer_to_the_others(live: Live) -> None:
    life = live(LogicalHostPool(), {"indexer": index_pool()})
    assert life.backend.batch_set_v1(KEYS, indices_of(range(8))) == [True] * 8
    store(life, "indexer", KEYS[:3], range(3))
    found = life.backend.batch_exists_v2(KEYS, [asked("indexer", PoolHitPolicy.ALL_PAGES)])
    assert found.kv_hit_pages == 3
    assert life.backend.batch_get_v1(KEYS, indices_of(range(8))) == [True] * 8


def test_pools_share_the_room_by_the_page(live: Live, tmp_path: Path) -> None:
    pools = {"indexer": index_pool(), "mamba": StatePool()}
    size, ratio = 1 << 22, {"mamba": 0.5}
    life = live(side_pools=pools, options={"storage_size": size, "pool_ratio": ratio})
    names = ["store", "store.indexer", "store.mamba", "store.mamba.1"]
    found = [maintenance.inspect(tmp_path / name) for name in names]
    kv, indexer, temporal, conv = (f.slots * f.shards for f in found)
    assert abs(kv - indexer) <= 1
    assert abs(kv - 2 * temporal) <= 2
    assert temporal == conv
    assert (
        size * 0.98
        < sum(f.page_bytes * n for f, n in zip(found, (kv, indexer, temporal, conv), strict=True))
        <= size
    )
    late = MLATokenToKVPoolHost(width=32)
    life.side_pools["draft"] = late
    life.backend.register_mem_host_pool_v2(late, PoolName.DRAFT)
    assert abs(maintenance.inspect(tmp_path / "store.draft").slots - kv) <= 1
    assert store(life, "draft", KEYS, range(8)) == [True] * 8


def test_a_draft_model_s_pool_comes_later_on_top_of_the_room(live: Live, tmp_path: Path) -> None:
    size = 1 << 21
    life = live(options={"storage_size": size, "pool_ratio": {"draft": 0.5}})
    late = MLATokenToKVPoolHost(width=32)
    life.side_pools["draft"] = late
    life.backend.register_mem_host_pool_v2(late, PoolName.DRAFT)
    kv, draft = (maintenance.inspect(tmp_path / name) for name in ("store", "store.draft"))
    assert kv.slots * kv.page_bytes > size * 0.98
    assert abs(kv.slots - 2 * draft.slots) <= 2
    assert store(life, "draft", KEYS, range(8)) == [True] * 8


def test_a_ratio_of_a_pool_that_the_model_lacks_is_a_warning(
    live: Live, caplog: pytest.LogCaptureFixture
) -> None:
    live(options={"pool_ratio": {"mamba": 0.5, "draft": 0.5}})
    [warning] = [r.getMessage() for r in caplog.records if "pool_ratio" in r.getMessage()]
    assert warning == "pool_ratio names ['mamba']; this model's pools are ['kv']"


def test_a_share_that_is_too_small_is_told_with_what_was_given(live: Live) -> None:
    size, ratio = 1 << 22, {"mamba": 0.001}
    with pytest.raises(InvalidArgumentError) as caught:
        live(side_pools={"mamba": StatePool()}, options={"storage_size": size, "pool_ratio": ratio})
    for told in ("pool mamba", f"storage_size {size}", "pool_ratio {'mamba': 0.001}"):
        assert told in str(caught.value)
    values = caught.value.values
    assert (values["pool"], values["pool_ratio"]) == ("mamba", ratio)
    assert 0 < values["storage_size"] < values["needed"] < size


def test_a_share_of_no_byte_is_told_with_what_was_given(live: Live) -> None:
    ratio = {"mamba": 1e-9}
    with pytest.raises(InvalidArgumentError, match=r"pool mamba in storage_size 4194304"):
        live(
            side_pools={"mamba": StatePool()},
            options={"storage_size": 1 << 22, "pool_ratio": ratio},
        )


def test_a_storage_size_that_is_too_small_is_told_as_it_was_given(live: Live) -> None:
    with pytest.raises(InvalidArgumentError, match="storage_size 5000 is too small") as caught:
        live(options={"storage_size": 5000})
    assert caught.value.values["storage_size"] == 5000


def test_nothing_stays_open_when_a_later_pool_is_refused(live: Live) -> None:
    live(side_pools={"indexer": index_pool()}).end()
    with pytest.raises(StoreFormatError):
        live(side_pools={"indexer": MLATokenToKVPoolHost(width=32)})


def test_a_transfer_without_indices_moves_nothing(live: Live) -> None:
    life = live(side_pools={"indexer": index_pool()})
    nothing = PoolTransfer(PoolName.INDEXER, keys=KEYS)
    assert life.backend.batch_set_v2([nothing]) == {"indexer": [False] * 8}
    assert life.backend.batch_get_v2([PoolTransfer(PoolName.INDEXER)]) == {"indexer": []}


def test_a_pool_that_was_not_registered_is_an_error(live: Live) -> None:
    life = live()
    with pytest.raises(ServiceClosedError, match="swa"):
        life.backend.batch_get_v2([transfer("swa", KEYS, range(8), 4)])


def test_a_cut_pool_beside_a_replicated_one_is_refused_with_several_ranks(live: Live) -> None:
    draft = {"draft": MHATokenToKVPoolHost()}
    with pytest.raises(InvalidArgumentError, match="draft") as caught:
        live(MLATokenToKVPoolHost(), draft, is_mla_model=True, tp_size=2)
    assert caught.value.values == {"pool": "draft"}
    draft["draft"].close()
    live(
        MLATokenToKVPoolHost(),
        {"draft": MHATokenToKVPoolHost()},
        is_mla_model=True,
    )


def test_states_are_cut_among_ranks_that_share_their_kv(live: Live) -> None:
    def rank(n: int) -> Life:
        return live(
            MLATokenToKVPoolHost(),
            {"mamba": StatePool()},
            is_mla_model=True,
            tp_rank=n,
            tp_size=2,
            options={"storage_size": 1 << 22},
        )

    first, second = rank(0), rank(1)
    first.store(KEYS, range(8))
    store(first, "mamba", KEYS[:2], [0, 1])
    assert second.hits(KEYS) == 8
    assert load(second, "mamba", KEYS[:2], [0, 1]) == [False] * 2


# --- pools that cannot give their pages in place --------------------------------------------------


class Strange(MLATokenToKVPoolHost):
    """A pool that SGLang might have: `answer` makes what it says of its pages."""

    def __init__(self, answer: Any = None, buffers: Any = None, **form: Any) -> None:
        super().__init__(**form)
        self._answer, self._named = answer, buffers

    def get_page_buffer_meta(self, indices: Any) -> Any:
        found = super().get_page_buffer_meta(indices)
        return self._answer(*found) if self._answer else found

    def get_hybrid_pool_buffer(self) -> Any:
        return self._named(self) if self._named else [self.kv_buffer]


def unsupported(addresses: list[int], lengths: list[int]) -> None:
    raise ValueError("Unsupported layout: page_head")


def outside(addresses: list[int], lengths: list[int]) -> Any:
    return [address - (1 << 40) for address in addresses], lengths


def odd(addresses: list[int], lengths: list[int]) -> Any:
    return addresses, [length - 1 for length in lengths]


@pytest.mark.parametrize(
    ("pool", "error"),
    [
        (lambda: Strange(unsupported), "--hicache-mem-layout page_first"),
        (lambda: Strange(outside), "outside of the buffers"),
        (lambda: Strange(buffers=lambda pool: []), "outside of the buffers"),
        (lambda: Strange(odd), "not a whole number of pages"),
    ],
)
def test_a_pool_without_pages_in_place_is_refused(live: Live, pool: Any, error: str) -> None:
    with pytest.raises(InvalidArgumentError, match=error):
        live(pool())


def test_a_pool_that_changes_its_pages_moves_none(live: Live) -> None:
    pool = Strange()
    life = live(pool)
    assert life.store(KEYS, range(8)) == [True] * 8
    pool._answer = odd
    assert life.backend.batch_get_v1(KEYS, indices_of(range(8))) == [False] * 8
    pool._answer = lambda *found: None
    assert life.backend.batch_set_v1([key(99)], indices_of([0])) == [False]
    assert life.hits([key(99)]) == 0
