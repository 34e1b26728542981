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


@pytest.fixture
def draft(tmp_path: Path) -> Callable[[bytes], Path]:
    """Writes the files of a draft model, with these weights."""

    def write(content: bytes) -> Path:
        directory = tmp_path / "draft"
        directory.mkdir(exist_ok=True)
        (directory / "model.safetensors").write_bytes(content * 100)
        return directory

    return write


def with_draft(live: Callable[..., Life], model: Path, draft: Any, **options: Any) -> Life:
    """A life of an engine of this model that speculates with this draft."""
    extra: dict[str, Any] = {}
    target = fakes.ModelConfig(model=str(model))
    speculation = fakes.SpeculativeConfig(
        method="draft_model",
        model=str(draft),
        target_model_config=target,
        draft_model_config=fakes.ModelConfig(model=str(draft)),
    )
    engine = fakes.VllmConfig(
        SimpleNamespace(kv_connector_extra_config=extra),
        model_config=target,
        speculative_config=speculation,
    )
    named = fakes.OffloadingModelConfig(name=str(model))
    made = live(spec_of(extra, model=named), **{"weights": None, **options})
    assert engine.speculative_config is speculation  # found while it lived
    return made


def test_other_weights_of_a_draft_find_nothing(
    live: Callable[..., Life], draft: Callable[[bytes], Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"1" * 100)
    with_draft(live, model, draft(b"1")).store(1, KEYS, list(range(8)))
    assert with_draft(live, model, draft(b"2")).hits(KEYS) == [False] * 8
    assert with_draft(live, model, draft(b"1")).hits(KEYS) == [True] * 8


def test_weights_of_a_draft_that_nothing_tells_are_an_error_unless_the_user_does(
    live: Callable[..., Life], draft: Callable[[bytes], Path]
) -> None:
    with pytest.raises(InvalidArgumentError, match="org/draft"):
        with_draft(live, draft(b"1"), "org/draft")
    with_draft(live, draft(b"1"), "org/draft", weights="v3").store(1, KEYS, list(range(8)))
    assert with_draft(live, draft(b"1"), "org/draft", weights="v3").hits(KEYS) == [True] * 8


def test_a_draft_that_is_the_model_itself_is_not_asked_for(
    live: Callable[..., Life], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As with n-grams, and with layers that guess tokens in the model's own files."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"1" * 100)
    asked = []

    def identify(name: str, **_: Any) -> dict[str, Any]:
        asked.append(name)
        return {}

    monkeypatch.setattr("light_mem.integrations.weights.identify", identify)
    with_draft(live, model, model)
    assert asked == [str(model)]


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


@pytest.mark.parametrize(
    ("engines", "tiers", "warned"), [(0, 10, True), (9, 10, True), (0, 0, True), (30, 10, False)]
)
def test_an_engine_that_vllm_kills_before_the_tier_has_ended_is_warned_of(
    live: Callable[..., Life],
    caplog: pytest.LogCaptureFixture,
    engines: int,
    tiers: float,
    warned: bool,
) -> None:
    extra: dict[str, Any] = {}
    engine = fakes.VllmConfig(
        SimpleNamespace(kv_connector_extra_config=extra), shutdown_timeout=engines
    )
    live(spec_of(extra), shutdown_timeout=tiers)
    said = [line for line in caplog.messages if "--shutdown-timeout" in line]
    assert len(said) == (1 if warned else 0)
    if warned:
        assert f"kills this engine {engine.shutdown_timeout} s after" in said[0]


def test_an_engine_that_is_not_found_is_not_warned_of(
    live: Callable[..., Life], caplog: pytest.LogCaptureFixture
) -> None:
    live()
    assert not [line for line in caplog.messages if "--shutdown-timeout" in line]
