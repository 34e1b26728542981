"""vLLM's configuration as plain data, for a namespace.

Everything counts that is not known to leave the bytes of the cache alone: a setting that a later
vLLM adds then makes a cache cold, and never wrong. Values whose text would name an address are
represented by their type, so that a description is the same after a restart.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import os
from collections.abc import Mapping, Set
from enum import Enum
from typing import Any

# What of vLLM's configuration decides what a row holds.
_PARTS = (
    "model_config",
    "cache_config",
    "attention_config",
    "load_config",
    "lora_config",
    "speculative_config",
    "mamba_config",
    "kernel_config",
    "engram_config",
    "diffusion_config",
    "additional_config",
)
# Settings that leave the bytes of a row alone, by the class that has them. Secrets are among them.
_IGNORED: dict[str, frozenset[str]] = {
    "ModelConfig": frozenset(
        """
        tokenizer tokenizer_mode tokenizer_revision skip_tokenizer_init served_model_name hf_token
        seed allowed_local_media_path allowed_media_domains max_logprobs logprobs_mode
        generation_config override_generation_config logits_processors io_processor_plugin
        renderer_num_workers enable_sleep_mode sleep_preserve_parameter_names sleep_mode_backend
        sleep_mode_offload_cudagraph enable_nccl_comm_suspend enable_cumem_allocator enforce_eager
        return_sampling_mask use_fp64_gumbel enable_trace_replay
        """.split()
    ),
    "CacheConfig": frozenset(
        """
        gpu_memory_utilization num_gpu_blocks num_gpu_blocks_override num_cpu_blocks
        kv_cache_size_tokens kv_cache_max_concurrency kv_cache_memory_bytes kv_offloading_size
        kv_offloading_backend simple_cpu_offload_num_blocks prefix_cache_retention_interval
        user_specified_block_size enable_prefix_caching
        """.split()
    ),
    "LoadConfig": frozenset(
        """
        download_dir use_tqdm_on_load safetensors_load_strategy safetensors_prefetch_num_threads
        safetensors_prefetch_block_size device pt_load_map_location
        """.split()
    ),
    "LoRAConfig": frozenset({"max_loras", "max_cpu_loras"}),
    "OffloadingConfig": frozenset({"engine_id", "enable_kv_cache_events", "extra_config"}),
    # Replicas hold the same bytes under the same key.
    "OffloadingParallelConfig": frozenset(
        {"data_parallel_index", "data_parallel_size", "data_parallel_rank_local"}
    ),
}
_IGNORED_EXTRA = frozenset(
    """
    secondary_tiers cpu_bytes_to_use eviction_policy cache_policy_module_path backpressure
    offload_prompt_only store_threshold max_tracker_size tier_poll_interval_s
    self_describing_kv_events spec_name spec_module_path
    """.split()
)
_MAX_DEPTH = 24  # deeper is a cycle


def describe_offloading(config: Any) -> dict[str, Any]:
    """vLLM's OffloadingConfig: groups, layouts, sizes and the further options of the spec."""
    described = plain(config)
    extra = {k: v for k, v in dict(config.extra_config).items() if k not in _IGNORED_EXTRA}
    return {**described, "extra_config": plain(extra)}


def describe_engine(config: Any) -> dict[str, Any]:
    """vLLM's VllmConfig: what of it decides what a row holds."""
    described = {part: plain(getattr(config, part, None)) for part in _PARTS}
    if getattr(config.load_config, "load_format", None) == "dummy":
        described["dummy_seed"] = config.model_config.seed  # the weights follow from it
    return described


def find_engine_config(kind: type, extra_config: object) -> Any | None:
    """The VllmConfig (of this class) of the engine whose connector has this very `extra_config`.

    vLLM hands a tier less than a key must hold: no revision, no quantization, no overrides. The
    configuration is in the same process, and `extra_config` is one object for both. None when it
    cannot be found.
    """
    for candidate in gc.get_objects():
        if type(candidate) is not kind:  # isinstance() would run code of lazy proxies
            continue
        transfer = getattr(candidate, "kv_transfer_config", None)
        if getattr(transfer, "kv_connector_extra_config", None) is extra_config:
            return candidate
    return None


def plain(value: Any, depth: int = 0) -> Any:
    """`value` as JSON data that is the same in every process that has an equal one."""
    if value is None or (isinstance(value, (bool, int, str)) and not isinstance(value, Enum)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if depth > _MAX_DEPTH:
        return "..."
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, (bytes, bytearray)):
        return bytes(value).hex()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(plain(k, depth + 1)): plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, depth + 1) for item in value]
    if isinstance(value, Set):
        return sorted((plain(item, depth + 1) for item in value), key=repr)
    return _plain_object(value, depth)


def _plain_object(value: Any, depth: int) -> Any:
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    kind = type(value)
    if dataclasses.is_dataclass(value):
        ignored = _IGNORED.get(kind.__name__, frozenset())
        return {
            field.name: plain(getattr(value, field.name), depth + 1)
            for field in dataclasses.fields(value)
            if field.name not in ignored and hasattr(value, field.name)
        }
    if callable(getattr(value, "to_dict", None)):  # a configuration of transformers
        return plain(value.to_dict(), depth + 1)
    if kind.__module__ == "torch":  # torch.dtype, torch.device
        return str(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return f"{kind.__module__}.{kind.__qualname__}"
