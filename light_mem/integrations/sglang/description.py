"""What a key of SGLang means besides the tokens it stands for, as plain data for a namespace.

SGLang's key is a hash of the tokens up to a page's end, with the request's extra key (an adapter)
and salt. It does not hold the model, its weights, the type of the cache, the layout of a page or
the rank: the same key names other bytes under any other of those.

Of SGLang's settings of model and execution everything counts that is not known to leave the bytes
alone: a setting that a later SGLang adds there makes a cache cold, and never wrong. Of the other
groups what is known to matter counts. How a page lies in the device's memory: see device.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from light_mem.integrations.plain_data import plain
from light_mem.integrations.sglang.device import describe_device
from light_mem.integrations.sglang.pool import HostPool

# Settings of these groups, by SGLang's names of the groups...
GROUPS = ("model", "exec", "spec", "lora", "parallel", "memory")
# ... all of them but those that leave the bytes of a page alone: loading, sampling, logging,
# graphs, communication. Secrets are among them.
_IGNORED = re.compile(
    r"""
    trust_remote_code|is_embedding|download_dir|model_checksum|delete_ckpt.*
    |modelopt_(checkpoint_save|export)_path|weight_loader_.*|weight_cache_.*|remote_instance_.*
    |engine_info_.*|checkpoint_engine_.*|startup_weight_load_mode|modelexpress_config
    |watermark.*|.*_watermark.*|(enable_)?return_.*|.*memory_saver|.*weights_cpu_backup
    |.*custom_logit_processor|.*outlines.*|grammar_backend|sampling_.*|.*cuda_?graph.*
    |.*torch_compile.*|.*nvtx.*|.*autotune.*|.*nccl.*|.*custom_all_reduce|.*mscclpp.*|.*symm_mem
    |eplb_.*|enable_eplb|expert_.*|.*expert_balancedness.*|elastic_ep.*|ep_join_.*|mooncake_.*
    |tbo_.*|enable_(two|single)_batch_overlap|offload_.*|cpu_offload_gb|ple_offload_.*
    |.*_seed|gpu_id
    """,
    re.VERBOSE,
)
# Of the other groups only these count.
_PICKED = {
    "spec": re.compile(
        r"speculative_(algorithm|draft_model_(path|revision|quantization)|draft_load_format"
        r"|draft_kv_cache_dtype|draft_window_size|draft_sink_size|token_map)"
        r"|enable_multi_layer_eagle|uno_lora_path"
    ),
    "lora": re.compile(r"enable_lora|lora_paths|lora_target_modules|max_lora_rank"),
    "parallel": re.compile(r"cp_strategy|enable_(prefill_cp|dsa_cache_layer_split|.*kv_cache.*)"),
    "memory": re.compile(r"enable_(page_major_kv_layout|unified_memory|hisparse)"),
}
# What of a host pool follows from how large it is, or where it runs.
_CAPACITY = re.compile(
    r"size|page_num|.*_num_pages|num_.*pages|.*_page_num|device_capacity_tokens|host_size"
    r"|staging_.*|num_release_slots|fd|device|pin_memory|can_use_.*|pool_label|gpu_device"
)


def describe_settings(groups: Mapping[str, Any]) -> dict[str, Any]:
    """What of SGLang's settings decides what a page holds.

    groups   SGLang's bags of resolved settings by the names of GROUPS; bags may hold bags
    """
    return {name: _describe_bag(bag, _PICKED.get(name)) for name, bag in groups.items() if bag}


def _describe_bag(bag: Any, picked: re.Pattern[str] | None) -> dict[str, Any]:
    described = {}
    for name, value in sorted(vars(bag).items()):
        if name.startswith("_"):
            continue
        if type(value) is type(bag):
            described[name] = _describe_bag(value, picked)
        elif picked.fullmatch(name) if picked else not _IGNORED.fullmatch(name):
            described[name] = plain(value)
    return described


def describe_pool(config: Any, pool: HostPool, host_pool: Any) -> dict[str, Any]:
    """What a page of one host pool is: its pool, form (in the device's memory too) and rank.

    config      SGLang's HiCacheStorageConfig
    host_pool   SGLang's pool that `pool` describes

    Ranks of data parallelism hold the same bytes under the same keys, and so do, where it is
    replicated (MLA), those of tensor parallelism: they share blocks.
    """
    form = {
        name: plain(value)
        for name, value in sorted(vars(host_pool).items())
        if not name.startswith("_") and not _CAPACITY.fullmatch(name) and _is_plain(value)
    }
    return {
        "model_name": config.model_name,
        "pool": pool.name,
        "class": plain(type(host_pool)),
        "form": form,
        "device": describe_device(host_pool),
        "pieces": pool.piece_bytes.tolist(),
        "tp": None
        if is_replicated(config, pool.name, host_pool)
        else [
            config.tp_rank,
            config.tp_size,
        ],
        "pp": [config.pp_rank, config.pp_size],
        "cp": [config.attn_cp_rank, config.attn_cp_size],
        "dcp": [config.dcp_rank, config.dcp_size, config.logical_page_size],
    }


def is_replicated(config: Any, name: str, host_pool: Any) -> bool:
    """Whether all tensor-parallel ranks have the same bytes in this pool. Pools of heads and
    recurrent states are cut among them, beside a replicated pool kv too."""
    return bool(config.is_mla_model) and name != "mamba" and not hasattr(host_pool, "head_num")


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):  # lists are about what is free, or tensors
        return len(value) < 1000 and all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))
