"""The smallest SGLang that the backend can be imported with: types as in SGLang 0.5.23, no logic.

`installed(monkeypatch)` puts it into `sys.modules` and imports the backend against it. The host
pools lay out their memory and name it as the real ones do. `tools/integration/sglang_backend.py`
compares all of this with the real classes.
"""

from __future__ import annotations

import importlib
import mmap
import os
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


# --- host pools -----------------------------------------------------------------------------------


def shared(dims: tuple[int, ...], dtype: torch.dtype, fds: list[int]) -> torch.Tensor:
    """As SGLang's allocator "shm": a memfd, mapped and kept open."""
    count = int(torch.Size(dims).numel())
    fd = os.memfd_create("sglang_host_pool", os.MFD_CLOEXEC)
    os.ftruncate(fd, count * dtype.itemsize)
    fds.append(fd)
    return torch.frombuffer(mmap.mmap(fd, 0), dtype=dtype, count=count).reshape(dims)


def private(dims: tuple[int, ...], dtype: torch.dtype, fds: list[int]) -> torch.Tensor:
    """As SGLang's default allocator may do: memory of this process alone."""
    return torch.zeros(dims, dtype=dtype)


class HostPool:
    """A host pool with indices [size], a page of `page_size` of them."""

    def __init__(self, pages: int, page_size: int, layout: str, layers: int) -> None:
        self.page_size = page_size
        self.layout = layout
        self.size = pages * page_size
        self.page_num = pages
        self.layer_num = layers
        self.start_layer = 0
        self.end_layer = layers
        self._fds: list[int] = []
        self.kv_buffer: Any = None

    @property
    def logical_page_size(self) -> int:
        return self.page_size

    def close(self) -> None:
        self.kv_buffer = None
        while self._fds:
            os.close(self._fds.pop())


class MHATokenToKVPoolHost(HostPool):
    """K and V of every head: two pieces a page, or two a layer."""

    def __init__(
        self,
        pages: int = 32,
        page_size: int = 4,
        layout: str = "page_first",
        dtype: torch.dtype = torch.float16,
        layers: int = 3,
        heads: int = 2,
        dim: int = 64,
        allocate: Any = shared,
    ) -> None:
        super().__init__(pages, page_size, layout, layers)
        self.dtype = dtype
        self.head_num, self.head_dim, self.v_head_dim = heads, dim, dim
        dims = {
            "layer_first": (2, layers, self.size, heads, dim),
            "page_first": (2, self.size, layers, heads, dim),
            "page_first_direct": (2, pages, layers, page_size, heads, dim),
        }[layout]
        self.kv_buffer = allocate(dims, dtype, self._fds)

    def get_hybrid_pool_buffer(self) -> list[torch.Tensor]:
        return [self.kv_buffer[0], self.kv_buffer[1]]

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        assert len(indices) % self.page_size == 0
        base = self.kv_buffer.data_ptr()
        row = self.head_num * self.head_dim * self.dtype.itemsize
        half = self.layer_num * self.size * row
        starts = indices.tolist()[:: self.page_size]
        if self.layout == "layer_first":
            step, length = self.size * row, self.page_size * row
            addresses = [
                base + start * row + layer * step + part
                for start in starts
                for layer in range(self.layer_num)
                for part in (0, half)
            ]
        else:
            length = self.layer_num * self.page_size * row
            addresses = [
                base + start * self.layer_num * row + part for start in starts for part in (0, half)
            ]
        return addresses, [length] * len(addresses)


class MLATokenToKVPoolHost(HostPool):
    """Compressed KV, the same on all tensor-parallel ranks: one piece a page."""

    def __init__(
        self,
        pages: int = 32,
        page_size: int = 4,
        layout: str = "page_first",
        dtype: torch.dtype = torch.bfloat16,
        layers: int = 3,
        width: int = 96,
        allocate: Any = shared,
    ) -> None:
        super().__init__(pages, page_size, layout, layers)
        self.dtype = dtype
        self.kv_cache_dim = width
        dims = {
            "layer_first": (layers, self.size, 1, width),
            "page_first": (self.size, layers, 1, width),
            "page_first_direct": (pages, layers, page_size, 1, width),
        }[layout]
        self.kv_buffer = allocate(dims, dtype, self._fds)

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        assert len(indices) % self.page_size == 0
        base = self.kv_buffer.data_ptr()
        row = self.kv_cache_dim * self.dtype.itemsize
        starts = indices.tolist()[:: self.page_size]
        if self.layout == "layer_first":
            length = self.page_size * row
            addresses = [
                base + start * row + layer * self.size * row
                for start in starts
                for layer in range(self.layer_num)
            ]
        else:
            length = self.layer_num * self.page_size * row
            addresses = [base + start * self.layer_num * row for start in starts]
        return addresses, [length] * len(addresses)


class StatePool(HostPool):
    """As the pool of recurrent layers: two pieces a page, each in a buffer of its own."""

    def __init__(self, pages: int = 8, temporal: int = 640, conv: int = 96) -> None:
        super().__init__(pages, 1, "page_first", 1)
        self.buffers = [
            shared((pages, temporal), torch.float32, self._fds),
            shared((pages, conv), torch.bfloat16, self._fds),
        ]

    def get_hybrid_pool_buffer(self) -> list[torch.Tensor]:
        return self.buffers

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        found = [(b[i].data_ptr(), b[i].nbytes) for i in indices.tolist() for b in self.buffers]
        return [address for address, _ in found], [length for _, length in found]

    def close(self) -> None:
        self.buffers = []
        super().close()


class LogicalHostPool(HostPool):
    """Indices only, for models whose side pools have all the bytes."""

    def __init__(self, pages: int = 32, page_size: int = 4) -> None:
        super().__init__(pages, page_size, "page_first", 0)

    def get_page_buffer_meta(self, indices: torch.Tensor) -> None:
        return None


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
        "HiCacheStorage HiCacheStorageConfig HiCacheStorageExtraInfo PoolHitPolicy PoolTransfer "
        "PoolTransferResult"
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
