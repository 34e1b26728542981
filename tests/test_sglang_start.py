"""What the SGLang backend refuses at the start, and its life apart from pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from light_mem import InvalidArgumentError, KVCacheMemoryError, StoreFormatError, maintenance
from light_mem.engine import kvmemory
from tests import sglang_fakes as fakes
from tests.sglang_fake_pools import MHATokenToKVPoolHost, private
from tests.sglang_rig import KEYS, PAGES, Life, Live, indices_of, key, live, module

__all__ = ["live", "module"]  # fixtures


def test_a_private_pool_is_refused_with_the_setting_that_helps(live: Live) -> None:
    with pytest.raises(KVCacheMemoryError, match='"allocator": "shm"') as caught:
        live(MHATokenToKVPoolHost(allocate=private))
    assert caught.value.values["pool"] == "kv"


def test_memory_that_nobody_can_map_is_refused_with_that_setting(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvmemory, "open_region", lambda region: None)
    with pytest.raises(KVCacheMemoryError, match='"allocator": "shm"'):
        live()


def test_the_backend_refuses_to_pass_tensors(live: Live) -> None:
    with pytest.raises(InvalidArgumentError, match='"interface_v1": 1'):
        live(options={"interface_v1": 0})


def test_methods_that_pass_tensors_find_and_store_nothing(live: Live) -> None:
    life = live()
    life.store(KEYS, range(8))
    target = torch.zeros(16)
    assert life.backend.get(KEYS[0], target) is None
    assert life.backend.batch_get(KEYS, [target] * 8) == [None] * 8
    assert life.backend.set(key(99), target) is False
    assert life.backend.batch_set([key(99)], [target]) is False
    assert not target.any()
    assert life.hits([key(99)]) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"storage": 1},
        {"storage_size": 0},
        {"storage_size": "1g"},
        {"num_workers": 0},
        {"load_timeout": -1},
        {"store_timeout": "a while"},
        {"weights": ""},
        {"namespace": 3},
        {"file": 7},
        {"verify": "no"},
        {"durability": "never"},
        {"pool_ratio": {"kv": 0.5}},
        {"pool_ratio": {"mamba": 0}},
        {"pool_ratio": {"mambo": 1.0}},  # no pool of SGLang
        {"pool_ratio": 2},
    ],
)
def test_wrong_options_are_refused_at_the_start(live: Live, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError):
        live(options=options)


@pytest.mark.parametrize("name", ["file", "storage_size"])
def test_options_that_must_be_there(module: Any, name: str) -> None:
    options = {"interface_v1": 1, "file": "f", "storage_size": 1 << 20}
    del options[name]
    with pytest.raises(InvalidArgumentError, match=f"missing options \\['{name}'\\]"):
        module.LightMemStorage(fakes.config(options))


def test_sglang_s_own_keys_are_no_options(module: Any) -> None:
    options: dict[str, Any] = {"interface_v1": 1, "file": "f", "storage_size": 1 << 20}
    options |= {"prefetch_threshold": 256, "tp_lcm_size": 8, "prefetch_timeout_base": 1}
    module.LightMemStorage(fakes.config(options)).close()


def test_pages_of_another_size_need_another_store(live: Live) -> None:
    live().end()
    with pytest.raises(StoreFormatError, match=r"\{pp_rank\}"):
        live(MHATokenToKVPoolHost(layers=2))


def test_ranks_may_be_in_the_path(live: Live, tmp_path: Path) -> None:
    path = {"file": str(tmp_path / "a" / "pp{pp_rank}-tp{tp_rank}-dp{dp_rank}")}
    live(options=path, pp_rank=1, pp_size=2, tp_rank=2, tp_size=4, dp_rank=3)
    assert maintenance.inspect(tmp_path / "a" / "pp1-tp2-dp3").blocks == 0


def test_settings_that_cannot_be_found_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pool = MHATokenToKVPoolHost()
    with (
        fakes.installed(monkeypatch, fakes.Context()) as module,
        pytest.raises(InvalidArgumentError, match='"weights"'),
    ):
        Life(module, tmp_path / "store", pool, {}, options={"weights": None})
    pool.close()


# --- the rest -------------------------------------------------------------------------------------


def test_numbers_of_indices_and_keys_must_fit(live: Live) -> None:
    life = live()
    assert life.backend.batch_set_v1(KEYS, indices_of(range(7))) == [False] * 8
    assert life.backend.batch_get_v1(KEYS[:2], indices_of([0, 0])) == [False] * 2
    outside = indices_of([PAGES + 8])
    assert life.backend.batch_set_v1(KEYS[:1], outside) == [False]
    assert life.hits(KEYS) == 0
    assert life.backend.batch_get_v1([], indices_of([0])[:0]) == []


def test_clear_takes_everything_out(live: Live) -> None:
    life = live()
    life.store(KEYS, range(8))
    assert life.backend.clear() is True
    assert life.hits(KEYS) == 0
    life.end()
    assert life.backend.clear() is False


def test_a_closed_backend_finds_nothing(live: Live) -> None:
    life = live()
    life.store(KEYS, range(8))
    life.backend.close()
    life.backend.close()
    assert life.hits(KEYS) == 0
    assert life.load(KEYS, range(8)) == [False] * 8
    assert all(life.is_blank(n) for n in range(8))
    assert life.store([key(99)], [0]) == [False]


def test_another_backend_may_take_over_the_same_pool(module: Any, tmp_path: Path) -> None:
    pool = MHATokenToKVPoolHost()
    first = Life(module, tmp_path / "store", pool, {})
    first.store(KEYS, range(8))
    first.backend.close()
    second = Life(module, tmp_path / "store", pool, {})
    assert second.load(KEYS, range(8, 16)) == [True] * 8
    assert all(second.holds(k, 8 + n) for n, k in enumerate(KEYS))
    second.end()


def test_metrics_tell_each_call_once(live: Live) -> None:
    life = live(enable_storage_metrics=True)
    life.store(KEYS, range(8))
    life.load(KEYS[:3], range(3))
    found = life.backend.get_stats()
    assert (found.backup_pgs, found.prefetch_pgs) == ([8], [3])
    assert len(found.backup_bandwidth) == len(found.prefetch_bandwidth) == 1
    assert min(found.backup_bandwidth + found.prefetch_bandwidth) > 0
    assert life.backend.get_stats().backup_pgs == []
    assert live(options={"namespace": "b"}).backend.get_stats() is None
