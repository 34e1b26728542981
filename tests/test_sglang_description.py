"""What tells one meaning of SGLang's keys from another: any difference that could change bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from light_mem import InvalidArgumentError
from light_mem.integrations.namespace import Namespace
from light_mem.integrations.sglang import description
from light_mem.integrations.sglang.pool import HostPool
from tests import sglang_fakes as fakes
from tests.sglang_fake_pools import MHATokenToKVPoolHost, MLATokenToKVPoolHost
from tests.sglang_fakes import Bag, Context, model_settings
from tests.sglang_rig import KEYS, Life


def settings(**changes: Any) -> dict[str, Any]:
    """The settings of a server, by group; `changes` replace whole groups."""
    kernel = Bag(_path="exec.kernel", attention_backend="triton", triton_attention_num_kv_splits=8)
    groups = {
        "model": model_settings(),
        "exec": Bag(_path="exec", kernel=kernel, mamba_ssm_dtype="float32"),
        "spec": Bag(_path="spec", speculative_algorithm=None, speculative_draft_model_path=None),
        "lora": Bag(_path="lora", enable_lora=False, lora_paths=None, max_loras_per_batch=8),
        "parallel": Bag(_path="parallel", tp_size=2, nccl_port=3000, cp_strategy=None),
        "memory": Bag(_path="memory", hicache_size=8, enable_unified_memory=False),
    }
    return {**groups, **changes}


def name_of(groups: dict[str, Any]) -> str:
    return Namespace(description.describe_settings(groups)).name


@pytest.mark.parametrize(
    "changed",
    [
        {"model": model_settings(revision="v2")},
        {"model": model_settings(dtype="float16")},
        {"model": model_settings(quantization="fp8")},
        {"model": model_settings(kv_cache_dtype="fp8_e5m2")},
        {"model": model_settings(json_model_override_args='{"rope_theta": 1}')},
        {"model": model_settings(context_length=8192)},
        {"model": model_settings(load_format="dummy")},
        {"model": model_settings(something_new=1)},
        {"exec": Bag(_path="exec", mamba_ssm_dtype="float32")},
        {"exec": Bag(kernel=Bag(attention_backend="fa3"), mamba_ssm_dtype="float32")},
        {"spec": Bag(speculative_algorithm="EAGLE", speculative_draft_model_path="d")},
        {"lora": Bag(enable_lora=True, lora_paths=["a"])},
        {"parallel": Bag(cp_strategy="zigzag")},
        {"memory": Bag(enable_unified_memory=True)},
    ],
)
def test_a_setting_that_could_change_bytes_is_another_namespace(changed: dict[str, Any]) -> None:
    assert name_of(settings(**changed)) != name_of(settings())


@pytest.mark.parametrize(
    "changed",
    [
        {"model": model_settings(download_dir="/elsewhere")},
        {"model": model_settings(trust_remote_code=True)},
        {"model": model_settings(engine_info_bootstrap_port=7)},
        {"model": model_settings(_path="elsewhere")},
        {"lora": Bag(enable_lora=False, lora_paths=None, max_loras_per_batch=1)},
        {"parallel": Bag(tp_size=4, nccl_port=4000, cp_strategy=None)},
        {"memory": Bag(hicache_size=16, enable_unified_memory=False)},
    ],
)
def test_a_setting_that_leaves_bytes_alone_is_not(changed: dict[str, Any]) -> None:
    assert name_of(settings(**changed)) == name_of(settings())


def test_no_secret_is_part_of_it() -> None:
    groups = settings(exec=Bag(watermark_key="s3cret", enable_watermark=True))
    assert "s3cret" not in Namespace(description.describe_settings(groups)).text


# --- pools ----------------------------------------------------------------------------------------


def describe(host_pool: Any, name: str = "kv", **config: Any) -> dict[str, Any]:
    found = description.describe_pool(
        fakes.config({}, **config), HostPool(name, host_pool), host_pool
    )
    host_pool.close()
    return found


def test_the_size_of_a_pool_and_what_is_free_in_it_do_not_matter() -> None:
    used = MHATokenToKVPoolHost(pages=8)
    used.num_release_slots, used.fd, used.release_slots = 3, 7, [1]  # type: ignore[attr-defined]
    assert describe(used) == describe(MHATokenToKVPoolHost(pages=32))


def test_form_and_rank_do() -> None:
    seen = {
        repr(found)
        for found in (
            describe(MHATokenToKVPoolHost()),
            describe(MHATokenToKVPoolHost(), name="swa"),
            describe(MHATokenToKVPoolHost(layout="layer_first")),
            describe(MHATokenToKVPoolHost(heads=4, dim=32)),
            describe(MHATokenToKVPoolHost(layers=6, page_size=2)),
            describe(MLATokenToKVPoolHost()),
            describe(MLATokenToKVPoolHost(), is_mla_model=True),
            describe(MHATokenToKVPoolHost(), tp_rank=1, tp_size=2),
            describe(MHATokenToKVPoolHost(), tp_rank=1, tp_size=12),
            describe(MHATokenToKVPoolHost(), tp_rank=11, tp_size=2),
            describe(MHATokenToKVPoolHost(), pp_rank=1, pp_size=2),
            describe(MHATokenToKVPoolHost(), attn_cp_rank=1, attn_cp_size=2),
            describe(MHATokenToKVPoolHost(), model_name="m-packed"),
        )
    }
    assert len(seen) == 13


def test_replicas_are_not_told_apart() -> None:
    one, other = MLATokenToKVPoolHost, {"is_mla_model": True, "tp_size": 8}
    assert describe(one(), **other, tp_rank=0) == describe(one(), **other, tp_rank=7)
    multi_head = MHATokenToKVPoolHost
    assert describe(multi_head(), dp_rank=0) == describe(multi_head(), dp_rank=3)


# --- weights --------------------------------------------------------------------------------------


def weights_in(directory: Path, byte: int) -> str:
    directory.mkdir(exist_ok=True)
    (directory / "model.safetensors").write_bytes(bytes([byte]) * 5000)
    return str(directory)


def hits(patch: pytest.MonkeyPatch, store: Path, context: Context, write: bool = False) -> int:
    pool = MHATokenToKVPoolHost()
    with fakes.installed(patch, context) as module:
        life = Life(module, store, pool, {}, options={"weights": None})
        if write:
            life.store(KEYS, range(8))
        found = life.hits(KEYS)
        life.end()
    return found


def test_other_weights_under_the_same_path_find_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    context = Context(model=model_settings(model_path=weights_in(tmp_path / "m", 1)))
    assert hits(monkeypatch, tmp_path / "store", context, write=True) == 8
    weights_in(tmp_path / "m", 2)
    assert hits(monkeypatch, tmp_path / "store", context) == 0
    weights_in(tmp_path / "m", 1)
    assert hits(monkeypatch, tmp_path / "store", context) == 8


def test_other_draft_weights_find_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = Bag(
        speculative_algorithm="EAGLE",
        speculative_draft_model_path=weights_in(tmp_path / "draft", 1),
        speculative_draft_model_revision=None,
    )
    model = model_settings(model_path=weights_in(tmp_path / "m", 1))
    context = Context(model=model, spec=spec)
    assert hits(monkeypatch, tmp_path / "store", context, write=True) == 8
    weights_in(tmp_path / "draft", 2)
    assert hits(monkeypatch, tmp_path / "store", context) == 0


def test_weights_that_nothing_tells_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    context = Context(model=model_settings(model_path="nobody/knows", download_dir=str(tmp_path)))
    with pytest.raises(InvalidArgumentError, match='"weights"'):
        hits(monkeypatch, tmp_path / "store", context)


# --- imports --------------------------------------------------------------------------------------


def test_nothing_of_it_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, light_mem, light_mem.integrations\n"
        "assert not [m for m in sys.modules if m.startswith('light_mem.integrations.')]\n"
        "import light_mem.integrations.sglang.opening, light_mem.integrations.sglang.description\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('sglang', 'vllm')]\n"
    )
    root = Path(__file__).resolve().parents[1]
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=root, env={"PYTHONPATH": str(root)}
    )
