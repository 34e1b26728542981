"""Configurations of an engine, as vLLM's dataclasses name them; no logic."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelConfig:
    model: str = "m"
    revision: str | None = None
    dtype: str = "bfloat16"
    quantization: str | None = None
    hf_overrides: dict[str, Any] = field(default_factory=dict)
    max_model_len: int = 4096
    seed: int = 0
    tokenizer: str = "t"
    hf_token: str | None = None


@dataclass
class CacheConfig:
    block_size: int = 16
    cache_dtype: str = "auto"
    prefix_caching_hash_algo: str = "sha256"
    num_gpu_blocks: int | None = None


@dataclass
class LoadConfig:
    load_format: str = "auto"
    download_dir: str | None = None


@dataclass
class LoRAConfig:
    max_lora_rank: int = 16
    max_loras: int = 1


@dataclass
class ParallelConfig:
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    data_parallel_rank: int = 0
    data_parallel_index: int = 0
    data_parallel_master_port: int = 29500
    rank: int = 0
    world_size: int = 1
    node_rank: int = 0
    distributed_executor_backend: str = "mp"
    worker_cls: str = "auto"
    cp_kv_cache_interleave_size: int = 1
    _data_parallel_master_port_list: list[int] = field(default_factory=list)


@dataclass
class SpeculativeConfig:
    method: str = "ngram"
    model: str | None = "ngram"
    revision: str | None = None
    num_speculative_tokens: int = 3
    target_model_config: ModelConfig | None = None
    target_parallel_config: ParallelConfig | None = None
    draft_model_config: ModelConfig | None = None
    draft_parallel_config: ParallelConfig | None = None
    draft_load_config: LoadConfig | None = None


@dataclass
class VllmConfig:
    kv_transfer_config: Any
    model_config: ModelConfig = field(default_factory=ModelConfig)
    cache_config: CacheConfig = field(default_factory=CacheConfig)
    load_config: LoadConfig = field(default_factory=LoadConfig)
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    lora_config: LoRAConfig | None = None
    speculative_config: SpeculativeConfig | None = None
    instance_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    shutdown_timeout: int = 0


@dataclass(frozen=True)
class OffloadingGroupConfig:
    tokens_per_block: int = 16
    layer_names: tuple[str, ...] = ("layers.0", "layers.1")
    group_id: int = 0


@dataclass(frozen=True)
class OffloadingModelConfig:
    name: str = "m"
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class OffloadingCacheConfig:
    tokens_per_hash: int = 16
    blocks_per_chunk: int = 1


@dataclass(frozen=True)
class OffloadingParallelConfig:
    rank: int = 0
    world_size: int = 1
    tp_size: int = 1
    pp_size: int = 1
    data_parallel_index: int = 0
    data_parallel_size: int = 1
    data_parallel_rank_local: int | None = None


@dataclass(frozen=True)
class OffloadingConfig:
    extra_config: Any
    groups: tuple[OffloadingGroupConfig, ...] = (OffloadingGroupConfig(),)
    worker_kv_bytes_per_block: int = 4096
    enable_kv_cache_events: bool = False
    engine_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    model: OffloadingModelConfig = field(default_factory=OffloadingModelConfig)
    cache: OffloadingCacheConfig = field(default_factory=OffloadingCacheConfig)
    parallel: OffloadingParallelConfig = field(default_factory=OffloadingParallelConfig)
    replicated_layout: bool = False
    canonical_layout: bool = False
    kv_cache_layout: str | None = "NHD"


class TieringOffloadingSpec:
    def __init__(self, config: OffloadingConfig) -> None:
        self.config = config
        self.extra_config = config.extra_config
        self.replicated_layout = config.replicated_layout
