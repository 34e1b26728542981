"""The smallest SGLang that the backend can be imported with: types as in SGLang 0.5.23, no logic.

`installed(monkeypatch)` puts it into `sys.modules` and imports the backend against it.
`tools/integration/sglang_backend.py` compares all of this, and the host pools of
`sglang_fake_pools`, with the real classes.
"""

from __future__ import annotations

import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import pytest  # not where they are compared with the real classes

BACKEND = "light_mem.integrations.sglang.backend"
ENGINE = "light_mem.integrations.sglang.engine"
VERSION = "0.5.23"


@dataclass
class HiCacheStorageConfig:
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    attn_cp_rank: int
    attn_cp_size: int
    is_mla_model: bool
    enable_storage_metrics: bool
    is_page_first_layout: bool
    model_name: str | None
    tp_lcm_size: int | None = None
    should_split_heads: bool = False
    dp_rank: int = 0
    extra_config: dict[str, Any] | None = None
    dcp_size: int = 1
    dcp_rank: int = 0
    logical_page_size: int | None = None


@dataclass
class HiCacheStorageExtraInfo:
    prefix_keys: list[str] | None = None
    extra_info: dict[str, Any] | None = None


class PoolName(str, Enum):
    KV = "kv"
    MAMBA = "mamba"
    SWA = "swa"
    INDEXER = "indexer"
    DRAFT = "draft"

    def __str__(self) -> str:
        return self.value


class PoolHitPolicy(str, Enum):
    ALL_PAGES = "all_pages"
    TRAILING_PAGES = "trailing_pages"
    BLOCK_GROUPS = "block_groups"


@dataclass
class PoolTransfer:
    name: PoolName
    host_indices: torch.Tensor | None = None
    device_indices: torch.Tensor | None = None
    keys: list[str] | None = None
    hit_policy: PoolHitPolicy = PoolHitPolicy.ALL_PAGES
    nodes_to_load: list[Any] | None = None
    indices_from_pool: PoolName | None = None
    block_pages: int = 0
    group_pages: int = 0


@dataclass
class PoolTransferResult:
    kv_hit_pages: int
    extra_pool_hit_pages: dict[str, int]
    restorable_prefix_pages: list[int] | None = None


class HiCacheStorage(ABC):
    """The methods of the real class, with their arguments."""

    mem_pool_host: Any
    registered_pools: dict[Any, Any]

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        self.mem_pool_host = mem_pool_host

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        if not hasattr(self, "registered_pools"):
            self.registered_pools = {}
        self.registered_pools[host_pool_name] = host_pool

    def on_host_pools_registered(self) -> None:
        return None

    def batch_exists_v2(self, keys: Any, pool_transfers: Any = None, extra_info: Any = None) -> Any:
        raise NotImplementedError

    def batch_get_v2(self, transfers: Any, extra_info: Any = None) -> Any:
        raise NotImplementedError

    def batch_set_v2(self, transfers: Any, extra_info: Any = None) -> Any:
        raise NotImplementedError

    def batch_get_v1(self, keys: Any, host_indices: Any, extra_info: Any = None) -> Any:
        return None

    def batch_set_v1(self, keys: Any, host_indices: Any, extra_info: Any = None) -> Any:
        return None

    @abstractmethod
    def get(self, key: Any, target_location: Any = None, target_sizes: Any = None) -> Any: ...

    @abstractmethod
    def batch_get(
        self, keys: Any, target_locations: Any = None, target_sizes: Any = None
    ) -> Any: ...

    @abstractmethod
    def set(
        self, key: Any, value: Any = None, target_location: Any = None, target_sizes: Any = None
    ) -> Any: ...

    @abstractmethod
    def batch_set(
        self,
        keys: Any,
        values: Any = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> Any: ...

    @abstractmethod
    def exists(self, key: Any) -> Any: ...

    def batch_exists(self, keys: Any, extra_info: Any = None) -> Any:
        raise NotImplementedError

    def clear(self) -> Any:
        return None

    def get_stats(self) -> Any:
        return None


@dataclass
class StorageMetrics:
    prefetch_pgs: list[int] = field(default_factory=list)
    backup_pgs: list[int] = field(default_factory=list)
    prefetch_bandwidth: list[float] = field(default_factory=list)
    backup_bandwidth: list[float] = field(default_factory=list)


# --- settings -------------------------------------------------------------------------------------


class Bag(SimpleNamespace):
    """As SGLang's bag of resolved settings: leaves and bags are attributes."""


class Context:
    """SGLang's runtime context, with the bags that were published."""

    def __init__(self, **bags: Bag) -> None:
        self.bags = bags

    def is_config_namespace_published(self, name: str) -> bool:
        return name in self.bags

    def config_bag(self, name: str) -> Bag:
        return self.bags[name]


def model_settings(**changes: Any) -> Bag:
    """The group "model" of a server of the model `m`."""
    settings = {
        "model_path": "m",
        "revision": None,
        "dtype": "auto",
        "quantization": None,
        "kv_cache_dtype": "auto",
        "json_model_override_args": "{}",
        "context_length": 4096,
        "load_format": "auto",
        "download_dir": None,
        "trust_remote_code": False,
        "_path": "model",
    }
    return Bag(**{**settings, **changes})


# --- in the place of SGLang -----------------------------------------------------------------------


class FakeModule(ModuleType):
    """A module that is a package too."""

    __path__: list[str] = []  # noqa: RUF012


def _modules(context: Context) -> dict[str, dict[str, Any]]:
    here = globals()
    storage = (
        "HiCacheStorage HiCacheStorageConfig HiCacheStorageExtraInfo PoolHitPolicy PoolName "
        "PoolTransfer PoolTransferResult"
    )
    return {
        "sglang": {"__version__": VERSION},
        "sglang.srt": {},
        "sglang.srt.runtime_context": {"get_context": lambda: context},
        "sglang.srt.mem_cache.hicache_storage": {name: here[name] for name in storage.split()},
        "sglang.srt.observability.metrics_collector": {"StorageMetrics": StorageMetrics},
        "huggingface_hub": {"constants": SimpleNamespace(HF_HUB_CACHE="/nonexistent")},
    }


@contextmanager
def installed(patch: pytest.MonkeyPatch, context: Context | None = None) -> Iterator[Any]:
    """The backend's module, imported against these fakes."""
    for name, content in _modules(context or Context(model=model_settings())).items():
        parts = name.split(".")
        for n in range(1, len(parts)):
            parent = ".".join(parts[:n])
            if not isinstance(sys.modules.get(parent), FakeModule):
                patch.setitem(sys.modules, parent, FakeModule(parent))
        module = sys.modules.get(name)
        if not isinstance(module, FakeModule):
            module = FakeModule(name)
            patch.setitem(sys.modules, name, module)
        module.__dict__.update(content)
        if len(parts) > 1:
            setattr(sys.modules[".".join(parts[:-1])], parts[-1], module)
    for name in (BACKEND, ENGINE):
        sys.modules.pop(name, None)
    try:
        yield importlib.import_module(BACKEND)
    finally:
        for name in (BACKEND, ENGINE):
            sys.modules.pop(name, None)


def config(extra: dict[str, Any], **changes: Any) -> HiCacheStorageConfig:
    """What SGLang's controller makes for rank 0 of 1 of a multi-head model."""
    fields: dict[str, Any] = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": False,
        "is_page_first_layout": True,
        "model_name": "m",
        "extra_config": extra,
    }
    return HiCacheStorageConfig(**{**fields, **changes})
