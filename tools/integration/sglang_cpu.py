"""SGLang's real host pools and controller on a machine without a GPU: what they need for that.

Three things stand in for what is not here, none of them between SGLang and the storage backend:
- torchvision, which is imported with the pools (for image models) and never used by them;
- pinning: the pools' allocators are SGLang's, their memory is just not registered with CUDA;
- copies between device and host pools (SGLang has kernels for GPUs only): `copy_on_cpu`.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import types
from typing import Any

import sglang  # before torchvision's stand-in: transformers must not see that one
import torch

PAGE_SIZE = 16
LAYERS = 4


class _Nothing(types.ModuleType):
    """A module in which every name is an empty class."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (), {}))
        return getattr(self, name)


class _NoTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Nothing(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        return None


if importlib.util.find_spec("torchvision") is None:
    sys.meta_path.append(_NoTorchvision())

from sglang.srt.mem_cache.device_pool_info import MambaStateBufferInfo  # noqa: E402
from sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler import (  # noqa: E402
    build_kv_only_group,
)
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool  # noqa: E402
from sglang.srt.mem_cache.pool_host import common  # noqa: E402
from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost  # noqa: E402
from sglang.srt.runtime_context import get_context, get_parallel  # noqa: E402

VERSION: str = sglang.__version__


def _allocate(
    dims: Any,
    dtype: torch.dtype,
    device: str,
    pin_memory: bool,
    allocator: Any,
    registration_granularity_bytes: int | None = None,
) -> torch.Tensor:
    return allocator.allocate(dims, dtype=dtype, device=device)


common.ALLOC_MEMORY_FUNCS["cpu"] = _allocate


class Settings:
    """SGLang's published settings while it lasts; what a launcher does for a scheduler."""

    def __init__(self, extra_config: dict[str, Any], layout: str, **fields: Any) -> None:
        self._published = get_context().override_server_args(
            enable_hierarchical_cache=True,
            hicache_storage_backend="dynamic",
            hicache_storage_backend_extra_config=json.dumps(extra_config),
            hicache_mem_layout=layout,
            hicache_ratio=2.0,
            hicache_size=0,
            hicache_write_policy="write_through",
            hicache_storage_prefetch_policy="wait_complete",
            device="cpu",
            **fields,
        )

    def __enter__(self) -> Settings:
        self._published.install()
        get_parallel().override_permanently(
            tp_rank=0,
            pp_rank=0,
            attn_tp_rank=0,
            attn_dp_rank=0,
            attn_dcp_rank=0,
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._published.restore()


def device_pool(kind: str, tokens: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A real device pool, in CPU memory; `kind` is "mha" or "mla"."""
    common_fields: dict[str, Any] = {
        "size": tokens,
        "page_size": PAGE_SIZE,
        "dtype": dtype,
        "layer_num": LAYERS,
        "device": "cpu",
        "enable_memory_saver": False,
    }
    if kind == "mla":
        return MLATokenToKVPool(kv_lora_rank=96, qk_rope_head_dim=32, **common_fields)
    return MHATokenToKVPool(head_num=2, head_dim=64, **common_fields)


def host_pools(kind: str, device: Any) -> Any:
    """SGLang's HostPoolGroup for a device pool, made as its assembler makes it. The settings that
    are published choose layout and allocator."""
    group = build_kv_only_group(
        page_size=PAGE_SIZE,
        kv_pool=device,
        full_layer_mapping={n: n for n in range(LAYERS)},
        use_mla=kind == "mla",
    )
    group.anchor_entry.host_pool.pin_memory = False  # of pages that it makes for callers
    return group


def state_pool(slots: int) -> MambaPoolHost:
    """A real host pool of recurrent states, two buffers of the allocator "shm", a state a slot."""
    generator = torch.Generator().manual_seed(0)
    temporal = torch.rand((LAYERS, slots, 4, 8, 16), generator=generator)
    conv = torch.rand((LAYERS, slots, 48, 3), generator=generator).to(torch.bfloat16)
    return MambaPoolHost(
        MambaStateBufferInfo(temporal=temporal, conv=(conv,)),
        2.0,
        0,
        device_capacity=slots,
        pin_memory=False,
        allocator_type="shm",
        layout="page_first",
    )


def copy_on_cpu(host_pool: Any) -> None:
    """Give a multi-head pool in the layout page_first copies that need no GPU."""
    assert host_pool.layout == "page_first"
    host = (host_pool.k_buffer, host_pool.v_buffer)  # [tokens, layers, heads, dim]
    device = (host_pool.device_k_buffers, host_pool.device_v_buffers)

    def backup(pool: Any, host_indices: Any, device_indices: Any, io_backend: str) -> None:
        for here, layers in zip(host, device, strict=True):
            for n, layer in enumerate(layers):
                here[host_indices, n] = layer[device_indices]

    def load(
        pool: Any,
        host_indices: Any,
        device_indices: Any,
        layer_id: int,
        io_backend: str,
        *,
        is_draft: bool = False,
    ) -> None:
        for here, layers in zip(host, device, strict=True):
            layers[layer_id][device_indices] = here[host_indices, layer_id]

    host_pool.backup_from_device_all_layer = backup
    host_pool.load_to_device_per_layer = load
