"""What tells one meaning of a key from another: any difference that could change bytes."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from light_mem import InvalidArgumentError
from light_mem.integrations import weights
from light_mem.integrations.namespace import Namespace
from light_mem.integrations.plain_data import plain
from light_mem.integrations.vllm import engine_config
from tests import vllm_fakes as fakes

KEY = bytes(range(36))


def engine(**parts: Any) -> dict[str, Any]:
    transfer = SimpleNamespace(kv_connector_extra_config={})
    return engine_config.describe_engine(fakes.VllmConfig(transfer, **parts))


def offloading(extra: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return engine_config.describe_offloading(
        fakes.OffloadingConfig({} if extra is None else extra, **changes)
    )


# --- the hash of a key ----------------------------------------------------------------------------


def test_a_hash_depends_on_every_bit_of_the_key_and_on_the_description() -> None:
    space = Namespace({"a": 1})
    seen = {space.hash(KEY), Namespace({"a": 2}).hash(KEY), Namespace({}).hash(KEY)}
    for bit in range(len(KEY) * 8):
        other = bytearray(KEY)
        other[bit // 8] ^= 1 << bit % 8
        seen.add(space.hash(bytes(other)))
    seen |= {space.hash(KEY[:20]), space.hash(KEY + b"\0")}
    assert len(seen) == 3 + len(KEY) * 8 + 2
    assert all(0 <= value < 1 << 128 for value in seen)


def test_hashes_are_keyed_blake2b_for_good() -> None:
    # A change here makes every store of a user cold: then VERSION is to change too.
    text = b'{"model":"m","namespace_version":1}'
    digest = hashlib.blake2b(text, digest_size=32, person=b"lightmem.vllm").digest()
    keyed = hashlib.blake2b(KEY, digest_size=16, key=digest, person=b"lightmem.vllm")
    space = Namespace({"model": "m"})
    assert space.hashes([KEY]) == [int.from_bytes(keyed.digest(), "big")]
    assert space.name == digest.hex()[:32]


def test_the_order_of_the_description_does_not_matter() -> None:
    assert Namespace({"a": 1, "b": 2}).name == Namespace({"b": 2, "a": 1}).name


# --- configuration --------------------------------------------------------------------------------


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
        {"instance_id": "another"},
    ],
)
def test_a_setting_that_leaves_bytes_alone_does_not(same: dict[str, Any]) -> None:
    assert engine(**same) == engine()
    assert "secret" not in json.dumps(engine(**same))


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


# --- weights --------------------------------------------------------------------------------------

LARGE = (1 << 20) + 12345


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"hidden_size": 8}')
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(bytes(LARGE))
    return directory


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: write(m / "config.json", b'{"hidden_size": 9}'),
        lambda m: write(m / "model.safetensors", bytes(LARGE - 1)),
        lambda m: write(m / "model.safetensors", bytes([1]) * LARGE),
        lambda m: write(m / "model.safetensors", bytes(LARGE - 1) + b"1"),
        lambda m: write(m / "model.safetensors", b"1" + bytes(LARGE - 1)),
        lambda m: write(m / "more.safetensors", b""),
        lambda m: write(m / "modeling.py", b"x = 1"),
        lambda m: write(m / "preprocessor_config.json", b'{"image_mean": [0.5]}'),
        lambda m: (m / "model.safetensors").rename(m / "other.safetensors"),
    ],
)
def test_other_files_are_other_weights(model: Path, change: Callable[[Path], object]) -> None:
    before = weights.fingerprint(model)
    change(model)
    assert weights.fingerprint(model) != before


def test_a_copy_and_another_tokenizer_are_the_same_weights(model: Path, tmp_path: Path) -> None:
    before = weights.fingerprint(model)
    (model / "tokenizer.json").write_text("{1}")
    (model / "README.md").write_text("more")
    moved = tmp_path / "moved"
    model.rename(moved)
    assert weights.fingerprint(moved) == before


def test_a_file_in_the_hubs_cache_is_known_by_its_name(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "x"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    prints = []
    for digit in "ab":
        (blobs / (digit * 64)).write_bytes(bytes(LARGE))
        link = snapshot / "model.safetensors"
        link.unlink(missing_ok=True)
        link.symlink_to(blobs / (digit * 64))
        prints.append(weights.fingerprint(snapshot))
    assert prints[0] != prints[1]


def test_a_name_on_the_hub_stands_for_its_commit(tmp_path: Path) -> None:
    directory = tmp_path / "models--org--name"
    one, two = "1" * 40, "2" * 40
    (directory / "refs").mkdir(parents=True)
    (directory / "refs" / "main").write_text(one)
    for commit in (one, two):
        (directory / "snapshots" / commit).mkdir(parents=True)

    def identify(revision: str | None) -> dict[str, Any]:
        return weights.identify("org/name", given=None, revision=revision, hub_cache=str(tmp_path))

    assert identify(None) == identify("main") == identify(one) == {"commit": one}
    assert identify(two) == {"commit": two}
    with pytest.raises(InvalidArgumentError, match="org/name"):
        identify("v2")


def test_weights_that_nothing_tells_are_an_error_unless_the_user_does() -> None:
    with pytest.raises(InvalidArgumentError, match='"weights"'):
        weights.identify("org/name", given=None, revision=None, hub_cache=None)
    assert weights.identify("org/name", given="v3", revision=None, hub_cache=None) == {
        "given": "v3"
    }


def test_a_directory_without_weights_tells_nothing_of_them_unless_they_are_made_up(
    model: Path,
) -> None:
    """As servers have it that stream weights from an object store."""
    (model / "model.safetensors").unlink()
    with pytest.raises(InvalidArgumentError, match="no local path with weights"):
        weights.identify(str(model), given=None, revision=None, hub_cache=None)
    found = weights.identify(str(model), given=None, revision=None, hub_cache=None, dummy=True)
    assert found == {"files": weights.fingerprint(model)}
