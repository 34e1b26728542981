"""Are the fakes of the tests as SGLang's classes are? Run by `sglang_backend.py`."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import sglang_cpu
import torch
from sglang.srt.environ import envs
from sglang.srt.mem_cache import hicache_storage
from sglang.srt.observability.metrics_collector import StorageMetrics
from sglang.srt.runtime_context import get_context

from light_mem.integrations.sglang import description
from light_mem.integrations.sglang.backend import LightMemStorage
from light_mem.integrations.sglang.device import describe_device
from light_mem.integrations.sglang.pool import HostPool
from tests import sglang_fake_pools as fake_pools
from tests import sglang_fakes as fakes

_TOKENS = 512
_LAYOUTS = ("page_first", "page_first_direct", "layer_first")
# Settings that must be part of a namespace, by the names that SGLang has for them.
_SETTINGS = {
    "model": "model_path revision dtype quantization kv_cache_dtype json_model_override_args "
    "quantization_param_path load_format",
    "spec": "speculative_algorithm speculative_draft_model_path speculative_draft_model_revision "
    "speculative_draft_model_quantization speculative_draft_kv_cache_dtype",
    "lora": "enable_lora lora_paths",
    "parallel": "cp_strategy enable_dsa_cache_layer_split enable_kv_cache_sharding",
    "memory": "enable_page_major_kv_layout enable_unified_memory",
    "exec": "attention_backend mamba_ssm_dtype enable_deepseek_v4_fp4_indexer",
}


def differences() -> list[str]:
    """What is not as it is in SGLang; empty when all is."""
    return [*_methods(), *_records(), *_names(), *_pools(), *_device(), *_settings()]


def _methods() -> Iterator[str]:
    real = hicache_storage.HiCacheStorage
    for name, method in inspect.getmembers(real, inspect.isfunction):
        if name.startswith("_"):
            continue
        wanted = _arguments(method)
        for other in (fakes.HiCacheStorage, LightMemStorage):
            found = getattr(other, name, None)
            if found is None or _arguments(found) != wanted:
                yield f"{other.__module__}.{other.__name__}.{name}"
    if real.__abstractmethods__ != fakes.HiCacheStorage.__abstractmethods__:
        yield "the abstract methods of HiCacheStorage"


def _arguments(method: Any) -> list[tuple[str, Any, Any]]:
    found = inspect.signature(method).parameters.values()
    return [(p.name, p.kind, p.default) for p in found]


def _records() -> Iterator[str]:
    names = "HiCacheStorageConfig HiCacheStorageExtraInfo PoolTransfer PoolTransferResult".split()
    pairs = [(getattr(hicache_storage, name), getattr(fakes, name)) for name in names]
    for real, fake in [*pairs, (StorageMetrics, fakes.StorageMetrics)]:
        if _fields(real) != _fields(fake):
            yield f"the fields of {real.__name__}"


def _fields(record: Any) -> list[tuple[str, str]]:
    return [
        (field.name, "" if field.default is dataclasses.MISSING else str(field.default))
        for field in dataclasses.fields(record)
    ]


def _names() -> Iterator[str]:
    kinds: list[tuple[type[Enum], type[Enum]]] = [
        (hicache_storage.PoolName, fakes.PoolName),
        (hicache_storage.PoolHitPolicy, fakes.PoolHitPolicy),
    ]
    for real, fake in kinds:
        for member in fake:
            same = real.__members__.get(member.name)
            if same is None or same.value != member.value:
                yield f"{real.__name__}.{member.name}"
    if str(hicache_storage.PoolName.KV) != str(fakes.PoolName.KV):
        yield "the text of a PoolName"
    if fakes.VERSION != sglang_cpu.VERSION:
        yield f"the fakes are of SGLang {fakes.VERSION}, this is {sglang_cpu.VERSION}"


def _pools() -> Iterator[str]:
    for kind in ("mha", "mla"):
        for layout in _LAYOUTS:
            with sglang_cpu.Settings({"allocator": "shm"}, layout):
                group = sglang_cpu.host_pools(kind, sglang_cpu.device_pool(kind, _TOKENS))
            real = group.anchor_entry.host_pool
            size = {"pages": real.page_num, "page_size": real.page_size, "layout": layout}
            size |= {"layers": sglang_cpu.LAYERS, "dtype": torch.bfloat16}
            if kind == "mha":
                fake: Any = fake_pools.MHATokenToKVPoolHost(**size, heads=2, dim=64)
            else:
                fake = fake_pools.MLATokenToKVPoolHost(**size, width=128)
            if _geometry(real) != _geometry(fake):
                yield f"where the pages of a pool {kind} with the layout {layout} lie"
            for name in ("head_num", "logical_page_size", "get_hybrid_pool_buffer"):
                if hasattr(real, name) != hasattr(fake, name):
                    yield f"whether a pool {kind} has {name}"
            fake.close()


def _geometry(host_pool: Any) -> Any:
    pool = HostPool("kv", host_pool)
    pages = [3, 0, host_pool.page_num - 1]
    size = pool.page_tokens
    indices = torch.cat([torch.arange(n * size, (n + 1) * size) for n in pages])
    regions = [part.tolist() for part in pool.regions(indices, len(pages))]
    memory = [tuple(buffer.memory.shape) for buffer in pool.buffers]
    return size, pool.piece_bytes.tolist(), memory, regions


def _device() -> Iterator[str]:
    """Is a layout that the environment chose told from what the host pool holds, without its
    size?"""
    seen = []
    with sglang_cpu.Settings({"allocator": "shm"}, "page_first"):
        for tokens, by_head in ((_TOKENS, False), (2 * _TOKENS, False), (_TOKENS, True)):
            with envs.SGLANG_USE_HND_KVCACHE.override(by_head):
                group = sglang_cpu.host_pools("mha", sglang_cpu.device_pool("mha", tokens))
            seen.append(describe_device(group.anchor_entry.host_pool))
    if seen[0] != seen[1]:
        yield "what a host pool knows of the device is another for another size"
    if seen[0] == seen[2]:
        yield "a host pool does not know the layout of the device's memory"


def _settings() -> Iterator[str]:
    with sglang_cpu.Settings({"allocator": "shm"}, "page_first"):
        context = get_context()
        if not all(map(context.is_config_namespace_published, description.GROUPS)):
            yield "the groups of SGLang's settings"
            return
        groups = {name: context.config_bag(name) for name in description.GROUPS}
        found = description.describe_settings(groups)
    for group, names in _SETTINGS.items():
        for name in names.split():
            if name not in set(_leaves(found[group])):
                yield f"the setting {group}.{name}"
    unused = set(vars(fakes.model_settings())) - {"_path"} - set(vars(groups["model"]))
    if unused:
        yield f"settings of the fakes' model: {sorted(unused)}"


def _leaves(bag: dict[str, Any]) -> Iterator[str]:
    for name, value in bag.items():
        yield name
        if isinstance(value, dict):
            yield from _leaves(value)
