"""vLLM's configuration as plain data, for a namespace.

Everything counts that is not known to leave the bytes of the cache alone: a setting that a later
vLLM adds then makes a cache cold, and never wrong.
"""

from __future__ import annotations

import gc
from typing import Any

from light_mem.integrations.plain_data import plain

# What of vLLM's configuration decides what a row holds.
_PARTS = (
    "model_config",
    "cache_config",
    "attention_config",
    "load_config",
    "parallel_config",
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
    # Who talks to whom, and where: most differs from start to start or from replica to replica of
    # data parallelism, and replicas hold the same bytes under the same key. `rank` and
    # `world_size` are of all replicas here; OffloadingParallelConfig has those of one.
    "ParallelConfig": frozenset(
        """
        data_parallel_size data_parallel_size_local data_parallel_rank data_parallel_rank_local
        data_parallel_index data_parallel_master_ip data_parallel_master_port
        data_parallel_rpc_port data_parallel_backend data_parallel_external_lb
        data_parallel_hybrid_lb dp_sync_interval disable_nccl_for_dp_synchronization
        _data_parallel_master_port_list _coord_store_port _api_process_count _api_process_rank
        rank world_size master_addr master_port node_rank nnodes
        distributed_executor_backend distributed_timeout_seconds cpu_distributed_timeout_seconds
        ray_workers_use_nsight ray_runtime_env placement_group
        numa_bind numa_bind_nodes numa_bind_cpus assigned_physical_gpu_ids
        disable_custom_all_reduce enable_shm_tensor_arena max_parallel_loading_workers
        enable_batch_sharded_sampling enable_ep_weight_filter is_moe_model
        enable_dbo ubatch_size dbo_decode_token_threshold dbo_prefill_token_threshold
        enable_eplb eplb_config expert_placement_strategy enable_elastic_ep elastic_ep_max_dp_size
        enable_fault_tolerance fault_tolerance_config _allow_auto_resolve_cp_interleave_size
        """.split()
    ),
    # The target's are those of the engine: see `describe_engine`.
    "SpeculativeConfig": frozenset({"target_model_config", "target_parallel_config"}),
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


def describe_offloading(config: Any) -> dict[str, Any]:
    """vLLM's OffloadingConfig: groups, layouts, sizes and the further options of the spec."""
    described = plain(config, _IGNORED)
    extra = {k: v for k, v in dict(config.extra_config).items() if k not in _IGNORED_EXTRA}
    return {**described, "extra_config": plain(extra, _IGNORED)}


def describe_engine(config: Any) -> dict[str, Any]:
    """vLLM's VllmConfig: what of it decides what a row holds."""
    described = {part: plain(getattr(config, part, None), _IGNORED) for part in _PARTS}
    if getattr(config.load_config, "load_format", None) == "dummy":
        described["dummy_seed"] = config.model_config.seed  # the weights follow from it
    target = plain(_target_model(config), _IGNORED)
    if target not in (None, described["model_config"]):
        described["target_model_config"] = target
    return described


def find_engine_config(kind: type, extra_config: object) -> Any | None:
    """The VllmConfig (of this class) of the engine whose connector has this very `extra_config`.

    vLLM hands a tier less than a key must hold: no revision, no quantization, no overrides. The
    configuration is in the same process, and `extra_config` is one object for both. None when it
    cannot be found.
    """
    found = None
    for candidate in gc.get_objects():
        if type(candidate) is not kind:  # isinstance() would run code of lazy proxies
            continue
        transfer = getattr(candidate, "kv_transfer_config", None)
        if getattr(transfer, "kv_connector_extra_config", None) is not extra_config:
            continue
        target = _target_model(candidate)
        if target is None or target is getattr(candidate, "model_config", None):
            return candidate
        # A draft model has a copy with a model_config of its own, in the worker, which may be in
        # this process.
        found = candidate
    return found


def _target_model(config: Any) -> Any | None:
    """The ModelConfig that the engine speculates for; None when it does not."""
    speculative = getattr(config, "speculative_config", None)
    return getattr(speculative, "target_model_config", None)
