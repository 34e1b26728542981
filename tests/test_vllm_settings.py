"""Which settings of an engine count for a namespace: all that could change bytes, no others."""

from __future__ import annotations

import dataclasses
import enum
import gc
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from light_mem.integrations.plain_data import plain
from light_mem.integrations.vllm import engine_config
from tests import vllm_fakes as fakes


def engine(**parts: Any) -> dict[str, Any]:
    transfer = SimpleNamespace(kv_connector_extra_config={})
    return engine_config.describe_engine(fakes.VllmConfig(transfer, **parts))


def offloading(extra: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return engine_config.describe_offloading(
        fakes.OffloadingConfig({} if extra is None else extra, **changes)
    )


def replica(index: int, port: int) -> fakes.ParallelConfig:
    """One of four replicas of data parallelism, as a start with these ports has it."""
    return fakes.ParallelConfig(
        data_parallel_size=4,
        data_parallel_rank=index,
        data_parallel_index=index,
        data_parallel_master_port=port,
        rank=index,
        world_size=4,
        node_rank=index,
        _data_parallel_master_port_list=[port + 1, port + 2],
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"model_config": fakes.ModelConfig(revision="v2")},
        {"model_config": fakes.ModelConfig(dtype="float16")},
        {"model_config": fakes.ModelConfig(quantization="fp8")},
        {"model_config": fakes.ModelConfig(hf_overrides={"rope_scaling": {"factor": 2.0}})},
        {"model_config": fakes.ModelConfig(max_model_len=8192)},
        {"cache_config": fakes.CacheConfig(block_size=32)},
        {"cache_config": fakes.CacheConfig(cache_dtype="fp8")},
        {"cache_config": fakes.CacheConfig(prefix_caching_hash_algo="xxhash")},
        {"load_config": fakes.LoadConfig(load_format="dummy")},
        {"parallel_config": fakes.ParallelConfig(cp_kv_cache_interleave_size=16)},
        {"parallel_config": fakes.ParallelConfig(worker_cls="mine.Worker")},
        {"lora_config": fakes.LoRAConfig()},
    ],
)
def test_a_setting_of_the_engine_that_changes_bytes_counts(changed: dict[str, Any]) -> None:
    assert engine(**changed) != engine()


@pytest.mark.parametrize(
    "same",
    [
        {"model_config": fakes.ModelConfig(tokenizer="another", hf_token="secret", seed=5)},
        {"cache_config": fakes.CacheConfig(num_gpu_blocks=12345)},
        {"load_config": fakes.LoadConfig(download_dir="/elsewhere")},
        {"parallel_config": replica(index=1, port=31111)},
        {"instance_id": "another"},
    ],
)
def test_a_setting_that_leaves_bytes_alone_does_not(same: dict[str, Any]) -> None:
    assert engine(**same) == engine()
    assert "secret" not in json.dumps(engine(**same))


def speculating(parallel: fakes.ParallelConfig, **settings: Any) -> dict[str, Any]:
    """An engine that speculates by n-grams: vLLM gives the draft the target's configurations."""
    model = fakes.ModelConfig()
    parts = {"target_model_config": model, "draft_model_config": model, **settings}
    speculation = fakes.SpeculativeConfig(
        target_parallel_config=parallel, **{"draft_parallel_config": parallel, **parts}
    )
    return engine(model_config=model, parallel_config=parallel, speculative_config=speculation)


def test_speculation_is_the_same_in_every_start_and_replica() -> None:
    first = speculating(replica(index=0, port=31000))
    assert first == speculating(replica(index=1, port=42000)) != engine()
    assert first != speculating(replica(index=0, port=31000), num_speculative_tokens=4)
    assert "target_model_config" not in first["speculative_config"]  # the engine's, as it is


def test_a_draft_of_its_own_counts_and_so_does_its_target() -> None:
    found = [
        speculating(fakes.ParallelConfig(), draft_model_config=fakes.ModelConfig(dtype="float16")),
        speculating(fakes.ParallelConfig(), draft_parallel_config=None, method="eagle"),
        speculating(fakes.ParallelConfig(), target_model_config=fakes.ModelConfig(dtype="float8")),
        speculating(fakes.ParallelConfig()),
    ]
    assert len({json.dumps(one, sort_keys=True) for one in found}) == len(found)


def test_the_seed_counts_where_the_weights_follow_from_it() -> None:
    dummy = fakes.LoadConfig(load_format="dummy")
    one = engine(load_config=dummy, model_config=fakes.ModelConfig(seed=1))
    two = engine(load_config=dummy, model_config=fakes.ModelConfig(seed=2))
    assert one != two


def test_a_setting_that_nobody_knows_yet_counts() -> None:
    @dataclasses.dataclass
    class CacheConfig(fakes.CacheConfig):
        new_layout: str = "a"

    assert engine(cache_config=CacheConfig()) != engine(cache_config=CacheConfig(new_layout="b"))


@pytest.mark.parametrize(
    "changed",
    [
        {"parallel": fakes.OffloadingParallelConfig(tp_size=2)},
        {"parallel": fakes.OffloadingParallelConfig(pp_size=2)},
        {"parallel": fakes.OffloadingParallelConfig(rank=1)},
        {"parallel": fakes.OffloadingParallelConfig(world_size=2)},
        {"groups": (fakes.OffloadingGroupConfig(tokens_per_block=32),)},
        {"groups": (fakes.OffloadingGroupConfig(layer_names=("layers.0",)),)},
        {"groups": (fakes.OffloadingGroupConfig(), fakes.OffloadingGroupConfig(group_id=1))},
        {"cache": fakes.OffloadingCacheConfig(blocks_per_chunk=2)},
        {"worker_kv_bytes_per_block": 8192},
        {"model": fakes.OffloadingModelConfig(name="other")},
        {"replicated_layout": True},
        {"canonical_layout": True},
        {"extra": {"canonical_layout": True}},
        {"extra": {"an_option_of_a_later_vllm": 1}},
    ],
)
def test_the_layout_of_a_row_counts(changed: dict[str, Any]) -> None:
    assert offloading(**changed) != offloading()


def test_what_differs_from_life_to_life_does_not_count() -> None:
    first = offloading({"cpu_bytes_to_use": 1, "secondary_tiers": [{"type": "light_mem"}]})
    assert first == offloading({"cpu_bytes_to_use": 2}, enable_kv_cache_events=True)


def test_the_configuration_is_the_one_that_shares_the_options_object() -> None:
    extra: dict[str, Any] = {"same": 1}
    equal: dict[str, Any] = {"same": 1}
    mine = fakes.VllmConfig(SimpleNamespace(kv_connector_extra_config=extra))
    other = fakes.VllmConfig(SimpleNamespace(kv_connector_extra_config=equal))
    assert engine_config.find_engine_config(fakes.VllmConfig, extra) is mine
    assert engine_config.find_engine_config(fakes.VllmConfig, equal) is other
    assert engine_config.find_engine_config(fakes.VllmConfig, dict(extra)) is None


@pytest.mark.parametrize("draft_first", [False, True])
def test_a_drafts_copy_of_the_configuration_is_not_taken_for_the_engines(
    draft_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM makes it where the worker is in the scheduler's process."""
    extra: dict[str, Any] = {}
    model = fakes.ModelConfig(revision="v2")
    mine = fakes.VllmConfig(
        SimpleNamespace(kv_connector_extra_config=extra),
        model_config=model,
        speculative_config=fakes.SpeculativeConfig(target_model_config=model),
    )
    drafts = dataclasses.replace(mine, model_config=fakes.ModelConfig(model="draft"))
    objects = [drafts, mine] if draft_first else [mine, drafts]
    monkeypatch.setattr(gc, "get_objects", lambda: objects)
    assert engine_config.find_engine_config(fakes.VllmConfig, extra) is mine


class Colour(enum.Enum):
    RED = 1


def test_plain_data_is_json_without_addresses() -> None:
    class Opaque:
        pass

    odd = {
        "set": {"b", "a", "c"},
        "enum": Colour.RED,
        "type": Opaque,
        "object": Opaque(),
        "function": wraps,
        "bytes": b"\x01",
        "path": Path("/x"),
        "nan": float("nan"),
        3: (1, [2.5, None, True]),
        "config": SimpleNamespace(to_dict=lambda: {"rope": 1}),
    }
    found = plain(odd)
    text = json.dumps(found, allow_nan=False)
    assert " at 0x" not in text
    assert found["set"] == ["a", "b", "c"]
    assert found["enum"] == "Colour.RED"
    assert found["config"] == {"rope": 1}
    assert found["3"] == [1, [2.5, None, True]]
    assert found == plain(odd)


def wraps() -> None:
    """A function in a configuration."""


def test_a_cycle_ends() -> None:
    loop: dict[str, Any] = {}
    loop["self"] = loop
    assert json.dumps(plain(loop))


def test_a_description_is_the_same_in_another_process() -> None:
    program = (
        "from light_mem.integrations.plain_data import plain\n"
        "from light_mem.integrations.namespace import Namespace\n"
        "print(Namespace({'x': plain({'b', 'a', 'c', 'd'})}).name)"
    )
    names = {
        subprocess.run(
            [sys.executable, "-c", program],
            check=True,
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(names) == 1
