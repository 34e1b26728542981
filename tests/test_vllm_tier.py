"""The tier as vLLM sees it: store, restart, look-up, load; against fakes of vLLM's types."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from light_mem import InvalidArgumentError, maintenance
from light_mem.integrations.vllm import plugin
from tests import vllm_fakes as fakes
from tests.payload import page_bytes_of
from tests.vllm_rig import KEYS, ROW_BYTES, Life, R, key, live, module

__all__ = ["live", "module"]  # fixtures


def test_a_new_engine_loads_what_the_last_one_stored(live: Callable[..., Life]) -> None:
    first = live()
    assert first.hits(KEYS) == [False] * 8
    result = first.store(1, KEYS, list(range(8)))
    assert result.success
    assert result.transfer_bytes == 8 * ROW_BYTES
    assert result.transfer_time >= 0
    first.end()
    second = live()
    assert second.hits([*KEYS, key(9)]) == [True] * 8 + [False]
    rows = [30, 3, 17, 5, 8, 0, 1, 2]
    result = second.load(1, KEYS, rows)
    assert result.success
    assert result.successful_keys is None
    assert all(second.holds(k, row) for k, row in zip(KEYS, rows, strict=True))


def test_keys_may_be_a_set_in_the_order_of_their_rows(live: Callable[..., Life]) -> None:
    life = live()
    keys = set(KEYS)  # the scheduler's jobs have sets
    for row, k in enumerate(keys):
        life.primary.put(row, page_bytes_of(k, 0, ROW_BYTES))
    life.tier.submit_store(fakes.job(1, keys, range(8)))
    assert life.wait(1)[1].success
    assert life.load(2, [KEYS[5]], [20]).success
    assert life.holds(KEYS[5], 20)


def test_groups_of_one_hash_are_blocks_of_their_own(live: Callable[..., Life]) -> None:
    life = live()
    life.store(1, [key(1, group=0)], [0])
    assert life.hits([key(1, group=0), key(1, group=1)]) == [True, False]


def test_a_load_that_finds_a_part_says_which(live: Callable[..., Life]) -> None:
    life = live()
    life.store(1, KEYS[:2], [0, 1])
    result = life.load(2, [KEYS[0], key(77), KEYS[1]], [5, 6, 7])
    assert not result.success
    assert result.successful_keys == (KEYS[0], KEYS[1])
    assert life.holds(KEYS[0], 5)
    assert life.holds(KEYS[1], 7)


def test_a_load_that_finds_nothing_fails_and_is_not_tried_again_by_its_request(
    live: Callable[..., Life],
) -> None:
    life = live()
    result = life.load(1, [KEYS[0]], [0])
    assert not result.success
    assert result.successful_keys is None
    life.store(2, [KEYS[0]], [1])
    other = fakes.ReqContext("another")
    assert life.hits([KEYS[0]]) == [False]
    assert life.hits([KEYS[0]], other) == [True]
    life.tier.on_request_finished(R)
    assert life.hits([KEYS[0]]) == [True]


def test_a_damaged_block_is_computed_anew(live: Callable[..., Life], tmp_path: Path) -> None:
    life = live()
    life.store(1, [KEYS[0]], [0])
    life.end()
    data = tmp_path / "store" / "shard-000.data"
    content = bytearray(data.read_bytes())
    content[4096 + 100] ^= 1
    data.write_bytes(content)
    life = live()
    assert life.hits([KEYS[0]]) == [True]
    assert not life.load(1, [KEYS[0]], [0]).success
    assert life.hits([KEYS[0]], fakes.ReqContext("another")) == [False]


def test_stores_beyond_the_queue_are_dropped_and_counted(live: Callable[..., Life]) -> None:
    life = live(max_queued_blocks=3)
    result = life.store(1, KEYS, list(range(8)))
    assert not result.success
    assert life.hits(KEYS) == [True] * 3 + [False] * 5
    told = life.tier.get_stats().values
    assert told["vllm:kv_offload_light_mem_dropped_blocks"] == 5
    assert told["vllm:kv_offload_light_mem_dropped_stores"] == 1
    assert told["vllm:kv_offload_light_mem_stored_blocks"] == 3
    assert life.store(2, KEYS[3:6], [3, 4, 5]).success  # there is room again


def test_stats_are_told_once_and_under_declared_names(
    live: Callable[..., Life], module: Any
) -> None:
    life = live()
    assert life.tier.get_stats() is None
    life.store(1, KEYS, list(range(8)))
    life.load(2, [KEYS[0], key(77)], [9, 10])
    told = life.tier.get_stats().values
    assert told["vllm:kv_offload_light_mem_stored_blocks"] == 8
    assert told["vllm:kv_offload_light_mem_loaded_blocks"] == 1
    assert told["vllm:kv_offload_light_mem_failed_load_blocks"] == 1
    assert set(told) <= set(module.LightMemTier.build_metric_definitions({}))
    assert life.tier.get_stats() is None


def test_touched_blocks_outlive_others(live: Callable[..., Life]) -> None:
    life = live(max_queued_blocks=32)  # room for 64
    old = [key(n) for n in range(32)]
    life.store(1, old, list(range(32)))
    life.store(2, [key(n) for n in range(32, 64)], list(range(32)))
    life.tier.touch(old, R)
    life.tier.drain_jobs()
    life.store(3, [key(n) for n in range(64, 72)], list(range(8)))
    assert life.hits(old) == [True] * 32
    assert sum(life.hits([key(n) for n in range(32, 64)])) == 24


def test_shutdown_finishes_stores_and_lets_go_of_the_memory(
    live: Callable[..., Life], tmp_path: Path
) -> None:
    life = live()
    life.tier.submit_store(fakes.job(1, KEYS, range(8)))
    life.end()  # BufferError when the tier still holds the view
    life.tier.shutdown()  # once more does nothing
    assert maintenance.inspect(tmp_path / "store").blocks == 8
    assert life.hits(KEYS) == [False] * 8


def test_after_draining_every_result_is_there(live: Callable[..., Life]) -> None:
    life = live()
    for n in range(8):
        life.tier.submit_store(fakes.job(n, [KEYS[n]], [n]))
    life.tier.drain_jobs()
    assert {result.job_id for result in life.tier.get_finished_jobs()} == set(range(8))


@pytest.mark.parametrize(
    "wrong", [{"flie": "x"}, {"file": 3}, {"locality": "HERE"}, {"load_timeout": -1}]
)
def test_wrong_options_are_errors_that_name_them(
    live: Callable[..., Life], wrong: dict[str, Any]
) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
        live(**wrong)


def test_a_store_of_other_rows_is_refused(live: Callable[..., Life], tmp_path: Path) -> None:
    maintenance_store = tmp_path / "store"
    life = live()
    life.end()
    before = sorted(p.name for p in maintenance_store.iterdir())
    with pytest.raises(ValueError, match="shards"):
        live(num_of_shard=2)
    assert sorted(p.name for p in maintenance_store.iterdir()) == before


def test_the_short_name_is_registered_once(module: Any) -> None:
    plugin.register()
    plugin.register()
    assert fakes.SecondaryTierFactory.tiers == {"light_mem": (module.__name__, "LightMemTier")}


def test_a_vllm_without_tiers_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The very module, which is found without its package once it was imported.
    monkeypatch.setitem(sys.modules, "vllm.v1.kv_offload.tiering.factory", None)
    caplog.set_level(logging.DEBUG, "light_mem")
    plugin.register()
    [line] = caplog.messages
    assert "this vLLM has no secondary tiers" in line
