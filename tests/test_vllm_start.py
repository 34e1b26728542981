"""What a tier finds out when it starts: whose bytes its keys name, and whether it may end well."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from light_mem import InvalidArgumentError
from tests import vllm_fakes as fakes
from tests.vllm_rig import KEYS, Life, live, module, spec_of

__all__ = ["live", "module"]  # fixtures


@pytest.mark.parametrize(
    "change",
    [
        {"parallel": fakes.OffloadingParallelConfig(tp_size=2, world_size=2)},
        {"model": fakes.OffloadingModelConfig(dtype="fp8_e4m3")},
        {"kv_cache_layout": "HND"},
        {"cache": fakes.OffloadingCacheConfig(tokens_per_hash=32)},
    ],
)
def test_another_configuration_finds_nothing(live: Callable[..., Life], change: Any) -> None:
    first = live()
    first.store(1, KEYS, list(range(8)))
    first.end()
    assert live(spec_of(**change)).hits(KEYS) == [False] * 8
    assert live(weights="others").hits(KEYS) == [False] * 8
    assert live(namespace="mine").hits(KEYS) == [False] * 8
    # Another life, another replica, another size of the primary tier: the same bytes.
    replica = fakes.OffloadingParallelConfig(data_parallel_index=1, data_parallel_size=2)
    same = spec_of({"cpu_bytes_to_use": 1 << 30}, parallel=replica)
    assert live(same).hits(KEYS) == [True] * 8


def test_the_engines_configuration_is_found_and_counts(
    live: Callable[..., Life], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"1" * 100)
    named = fakes.OffloadingModelConfig(name=str(model))

    def life(**settings: Any) -> Life:
        extra: dict[str, Any] = {}
        engine = fakes.VllmConfig(
            SimpleNamespace(kv_connector_extra_config=extra), fakes.ModelConfig(**settings)
        )
        made = live(spec_of(extra, model=named), weights=None)
        assert engine.model_config.model == "m"
        return made

    life().store(1, KEYS, list(range(8)))
    assert life().hits(KEYS) == [True] * 8
    assert life(quantization="fp8").hits(KEYS) == [False] * 8
    (model / "model.safetensors").write_bytes(b"2" * 100)
    assert life().hits(KEYS) == [False] * 8


def test_another_layout_in_the_environment_finds_nothing(
    live: Callable[..., Life], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_SSM_CONV_STATE_LAYOUT", "SD")
    live().store(1, KEYS, list(range(8)))
    monkeypatch.setenv("VLLM_SSM_CONV_STATE_LAYOUT", "DS")
    assert live().hits(KEYS) == [False] * 8
    monkeypatch.setenv("VLLM_SSM_CONV_STATE_LAYOUT", "SD")
    assert live().hits(KEYS) == [True] * 8


def test_without_the_engines_configuration_the_user_must_tell(live: Callable[..., Life]) -> None:
    with pytest.raises(InvalidArgumentError, match='Set "weights"'):
        live(weights=None)
