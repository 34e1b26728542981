"""LightMemStorage: the backend that SGLang loads, and all that touches the types of its storage.

Written against SGLang 0.5.23.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import sglang
import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)

from light_mem import __version__
from light_mem.errors import InvalidArgumentError, LightMemError, ServiceClosedError
from light_mem.integrations.namespace import Namespace
from light_mem.integrations.sglang import description
from light_mem.integrations.sglang.engine import describe_engine
from light_mem.integrations.sglang.hits import Demand, usable_prefixes
from light_mem.integrations.sglang.opening import KV, Opener
from light_mem.integrations.sglang.options import StorageOptions
from light_mem.integrations.sglang.pool import HostPool
from light_mem.integrations.sglang.store import PageStore
from light_mem.logs import Limited

log = logging.getLogger("light_mem")


class LightMemStorage(HiCacheStorage):
    """Pages of SGLang's host pools in a LightMem store: they outlive the server.

    One a rank; all ranks of a machine share the store. A page is one block of as many regions as
    the pool has pieces of it, copied between the pool and the store by worker processes that map
    both. SGLang makes it, registers the pools, then calls `on_host_pools_registered`, which opens
    the store; after that its threads call the `batch_*` methods, several at a time. They wait for
    the copy, for a bounded time (`load_timeout`, `store_timeout`), and answer what failed with
    False: SGLang computes it.

    Pages move in place only. The methods that pass tensors (`get`, `set`, `batch_get`,
    `batch_set`), which SGLang calls without `interface_v1`, find and store nothing; the backend
    refuses to start for such a configuration.
    """

    def __init__(
        self, storage_config: HiCacheStorageConfig, kwargs: dict[str, Any] | None = None
    ) -> None:
        """`storage_config.extra_config` has the options: see `StorageOptions`."""
        self._config = storage_config
        self._options = StorageOptions.parse(storage_config.extra_config or {})
        self._opener = Opener(
            self._options.path(
                {name: getattr(storage_config, name) for name in ("pp_rank", "tp_rank", "dp_rank")}
            ),
            self._options,
            [str(name) for name in PoolName],
        )
        self._pools: dict[str, Any] = {}  # SGLang's, by name, not opened yet
        self._stores: dict[str, PageStore] = {}
        self._opened = False
        self._limited = Limited(each=1)
        self._engine: dict[str, Any] | None = None
        self._metrics = _Metrics() if storage_config.enable_storage_metrics else None

    # --- pools -----------------------------------------------------------------------------------

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        super().register_mem_pool_host(mem_pool_host)
        self._register(mem_pool_host, KV)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        if str(host_pool_name) != KV:  # that one was registered before
            self._register(host_pool, str(host_pool_name))

    def on_host_pools_registered(self) -> None:
        if not self._opened:
            self._opened = True
            self._open()

    def _register(self, host_pool: Any, name: str) -> None:
        config = self._config
        cut = not description.is_replicated(config, name, host_pool)
        if cut and config.is_mla_model and config.tp_size > 1 and name != "mamba":
            raise InvalidArgumentError(
                f"SGLang stores the pool {name} of tensor-parallel rank 0 only, and each rank has "
                "other bytes in it: nothing would ever be found. Run this model without the draft "
                "model, or without this backend",
                pool=name,
            )
        self._pools[name] = host_pool
        if self._opened:
            self._open()  # one that SGLang adds later

    def _open(self) -> None:
        registered, self._pools = self._pools, {}
        pools: dict[HostPool, Namespace] = {}
        for name, host_pool in registered.items():
            pool = HostPool(name, host_pool)
            pools[pool] = self._namespace(pool, host_pool)
        stores = self._opener.open(pools)
        self._stores.update(stores)
        for name, store in stores.items():
            log.info("LightMem %s: pool %s of SGLang, %s", __version__, name, store.describe())
            log.debug("LightMem namespace %s is %s", store.namespace.name, store.namespace.text)

    def _namespace(self, pool: HostPool, host_pool: Any) -> Namespace:
        if self._engine is None:
            self._engine = describe_engine(self._options.weights)
        return Namespace(
            {
                "sglang": sglang.__version__,
                "engine": self._engine,
                "page": description.describe_pool(self._config, pool, host_pool),
                "namespace": self._options.namespace,
            }
        )

    # --- pages of the pool kv --------------------------------------------------------------------

    def batch_exists(
        self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> int:
        return self._store(KV).match_prefix(keys)

    def batch_get_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        return self._measured("prefetch", self._store(KV).load, keys, host_indices)

    def batch_set_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        return self._measured("backup", self._store(KV).store, keys, host_indices)

    def exists(self, key: str) -> bool:
        return self._store(KV).match_prefix([key]) == 1

    # --- pages of side pools ---------------------------------------------------------------------

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        kv_pages = self._store(KV).match_prefix(keys)
        demands = []
        for transfer in pool_transfers or []:
            if transfer.hit_policy == PoolHitPolicy.BLOCK_GROUPS:
                continue  # a second form of pages that the pool kv has; nothing waits for it
            stored = self._store(str(transfer.name)).stored(keys[:kv_pages])
            window = max(1, len(transfer.keys or ()))
            trailing = transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES
            demands.append(Demand(transfer.name, stored, window if trailing else 0))
        found = usable_prefixes(kv_pages, demands)
        return PoolTransferResult(found.pages, dict(found.by_pool), found.prefixes)

    def batch_get_v2(
        self,
        transfers: list[PoolTransfer],
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> dict[str, list[bool]]:
        return {t.name: self._transfer(t, self._store(str(t.name)).load) for t in transfers}

    def batch_set_v2(
        self,
        transfers: list[PoolTransfer],
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> dict[str, list[bool]]:
        return {t.name: self._transfer(t, self._store(str(t.name)).store) for t in transfers}

    def _transfer(
        self,
        transfer: PoolTransfer,
        move: Callable[[Sequence[str], torch.Tensor], list[bool]],
    ) -> list[bool]:
        keys = transfer.keys or []
        if transfer.host_indices is None:
            return [False] * len(keys)
        return move(keys, transfer.host_indices)

    # --- tensors: not carried --------------------------------------------------------------------

    def get(
        self, key: str, target_location: Any = None, target_sizes: Any = None
    ) -> torch.Tensor | None:
        self._limited.warning("the LightMem backend loads pages in place only, not into tensors")
        return None

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        return [self.get(key) for key in keys]

    def set(
        self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None
    ) -> bool:
        self._limited.warning("the LightMem backend stores pages in place only, not tensors")
        return False

    def batch_set(
        self,
        keys: list[str],
        values: Any = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        return all(self.set(key) for key in keys)

    # --- the rest --------------------------------------------------------------------------------

    def clear(self) -> bool:
        """Take everything out of the store, also what other servers put there."""
        try:
            taken = sum(store.clear() for store in self._stores.values())
        except LightMemError as error:
            log.warning("the store is not cleared: %s", str(error))
            return False
        log.info("SGLang cleared the store: %d blocks", taken)
        return True

    def get_stats(self) -> Any:
        """SGLang's StorageMetrics of what was moved since the last call; None without metrics."""
        return None if self._metrics is None else self._metrics.take()

    def close(self) -> None:
        """End the workers and let go of the pools' memory. Calling it again does nothing."""
        for store in self._stores.values():
            store.close()

    def _store(self, name: str) -> PageStore:
        try:
            return self._stores[name]
        except KeyError:
            raise ServiceClosedError(
                f"SGLang asks for pages of the pool {name}, which was not opened: its pools are "
                f"{sorted(self._stores)}",
                pool=name,
                pools=sorted(self._stores),
            ) from None

    def _measured(
        self,
        direction: str,
        move: Callable[[Sequence[str], torch.Tensor], list[bool]],
        keys: list[str],
        indices: torch.Tensor,
    ) -> list[bool]:
        began = time.perf_counter()
        done = move(keys, indices)
        if self._metrics is not None and keys:
            nbytes = sum(done) * self._stores[KV].page_bytes
            self._metrics.add(direction, len(keys), nbytes, time.perf_counter() - began)
        return done


class _Metrics:
    """Pages and GB/s of each call, for SGLang's histograms. Any thread."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._taken = self._new()

    def add(self, direction: str, pages: int, nbytes: int, seconds: float) -> None:
        """One call; `direction` is "prefetch" or "backup"."""
        with self._guard:
            getattr(self._taken, f"{direction}_pgs").append(pages)
            getattr(self._taken, f"{direction}_bandwidth").append(nbytes / seconds / 1e9)

    def take(self) -> Any:
        """What was added since the last call."""
        with self._guard:
            taken, self._taken = self._taken, self._new()
        return taken

    @staticmethod
    def _new() -> Any:
        from sglang.srt.observability.metrics_collector import StorageMetrics

        return StorageMetrics()
