"""A server's cache in `sglang_backend.py`, from the radix tree down: told what to do by lines.

SGLang's UnifiedRadixCache with its HybridCacheController, threads and all, over a device pool in
CPU memory, driven as the scheduler drives it. KV of a token follows from its position and the
tokens up to its page's end, so that wrong bytes show themselves.
"""

from __future__ import annotations

import hashlib
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import sglang_cpu
import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import (
    CacheRequestHandle,
    InitLoadBackParams,
    InsertParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import get_server_args
from sglang_rank import serve

TOKENS = 2048
SECONDS = 60.0


class Server:
    """The commands."""

    def __init__(self) -> None:
        self._requests = 0

    def open(self, extra_config: dict[str, Any], fields: dict[str, Any]) -> Any:
        """None, or the error of a cache that refuses to start. `fields` are server arguments."""
        self._settings = sglang_cpu.Settings(extra_config, "page_first", **fields)
        self._settings.__enter__()
        self._device = sglang_cpu.device_pool("mha", TOKENS)
        self._allocator = PagedTokenToKVPoolAllocator(
            TOKENS, sglang_cpu.PAGE_SIZE, torch.bfloat16, "cpu", self._device, need_sort=False
        )
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=ReqToTokenPool(8, TOKENS, "cpu", False),
            token_to_kv_pool_allocator=self._allocator,
            page_size=sglang_cpu.PAGE_SIZE,
            tree_components=(ComponentType.FULL,),
            tree_core_backend="python",
        )
        self._cache = UnifiedRadixCache(params)
        try:
            self._cache.init_hicache(get_server_args(), params)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        sglang_cpu.copy_on_cpu(self._cache.host_pool_group.anchor_entry.host_pool)
        return None

    def insert(self, prompts: list[list[int]]) -> None:
        """Compute prompts (their KV is made up here) and wait until they are in the store."""
        for tokens in prompts:
            indices = self._allocator.alloc(len(tokens))
            for layer, k, v in self._layers():
                k[indices] = kv_of(tokens, layer, "k", k)
                v[indices] = kv_of(tokens, layer, "v", v)
            self._cache.insert(InsertParams(key=key_of(tokens), value=indices))
        cache = self._cache
        self._poll(lambda: not cache.ongoing_write_through and not cache.ongoing_backup)

    def fetch(self, tokens: list[int]) -> dict[str, Any]:
        """What a request with this prompt finds: tokens `on_device` at first, `loaded` from the
        store to the host pool, `usable` on the device in the end, and whether they are `right`."""
        cache = self._cache
        self._requests += 1
        handle = CacheRequestHandle(f"r{self._requests}", 0)
        match = cache.match_prefix(MatchPrefixParams(key=key_of(tokens)))
        on_device = match.device_prefix_len
        cache.prefetch_from_storage(
            handle,
            match.last_host_node,
            array("q", tokens[on_device:]),
            cache.get_last_hash_value(match.last_host_node),
            None,
            tokens[:on_device],
        )
        self._poll(lambda: cache.check_prefetch_progress(handle))
        loaded = cache.pop_prefetch_loaded_tokens(handle)
        match = cache.match_prefix(MatchPrefixParams(key=key_of(tokens)))
        request = SimpleNamespace(
            rid=handle.rid,
            last_node=match.last_device_node,
            swa_host_hit_length=0,
            mamba_host_hit_length=0,
            kv=SimpleNamespace(mamba_pool_idx=None),
        )
        if match.host_hit_length:
            cache.init_load_back(
                InitLoadBackParams(match.best_match_node, match.host_hit_length, req=request)
            )
            cache.ready_to_load_host_cache()
            self._poll(lambda: not cache.ongoing_load_back)
        match = cache.match_prefix(MatchPrefixParams(key=key_of(tokens)))
        usable = match.device_prefix_len
        indices = cache.path_device_indices(match.last_device_node)[:usable]
        right = all(
            torch.equal(buffer[indices], kv_of(tokens, layer, name, buffer)[:usable])
            for layer, k, v in self._layers()
            for name, buffer in (("k", k), ("v", v))
        )
        return {"on_device": on_device, "loaded": loaded, "usable": usable, "right": right}

    def clear(self) -> bool:
        """SGLang's admin command that clears the store."""
        done: bool = self._cache.clear_storage_backend()
        return done

    def detach(self) -> Any:
        """SGLang's admin command that takes the backend away; why not, if not."""
        done, message = self._cache.detach_storage_backend()
        return None if done else message

    def attach(self, extra_config: str, served_model_name: str) -> Any:
        """SGLang's admin command that gives it a backend; why not, if not."""
        done, message = self._cache.attach_storage_backend(
            storage_backend="dynamic",
            storage_backend_extra_config_json=extra_config,
            served_model_name=served_model_name,
        )
        return None if done else message

    def _layers(self) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        pool = self._device
        return [(n, pool.k_buffer[n], pool.v_buffer[n]) for n in range(sglang_cpu.LAYERS)]

    def _poll(self, condition: Callable[[], Any]) -> None:
        """The scheduler's loop, until something is so."""
        deadline = time.monotonic() + SECONDS
        while True:
            self._cache.check_hicache_events()
            if condition():
                return
            if time.monotonic() > deadline:
                raise TimeoutError("the cache does not get on")
            time.sleep(0.001)


def key_of(tokens: list[int]) -> RadixKey:
    return RadixKey(array("q", tokens))


def kv_of(tokens: list[int], layer: int, name: str, buffer: torch.Tensor) -> torch.Tensor:
    """KV of one layer, [tokens, heads, dim]: each page from all tokens up to its end."""
    pages = []
    size = sglang_cpu.PAGE_SIZE
    shape = (size, *buffer.shape[1:])
    for end in range(size, len(tokens) + 1, size):
        digest = hashlib.sha256(repr((layer, name, tokens[:end])).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        pages.append(torch.randn(shape, generator=generator).to(buffer.dtype))
    return torch.cat(pages)


if __name__ == "__main__":
    serve(Server())
