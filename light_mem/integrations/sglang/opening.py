"""The services of a rank's host pools, and each one's share of the room."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from fractions import Fraction

from light_mem.errors import InvalidArgumentError, KVCacheMemoryError, StoreFormatError
from light_mem.integrations.namespace import Namespace
from light_mem.integrations.settings import started
from light_mem.integrations.sglang.options import StorageOptions
from light_mem.integrations.sglang.pool import Buffer, HostPool, cannot_map
from light_mem.integrations.sglang.store import PageStore
from light_mem.local_service import LocalCacheService

log = logging.getLogger("light_mem")

KV = "kv"  # SGLang's name of the pool whose pages all others follow
_LATE = "draft"  # names of pools that SGLang registers after the others begin so
_CREATE_SECONDS = 10.0  # that a call waits for room among the tasks


class Opener:
    """Opens the stores of one rank's pools.

    A pool of one buffer is one store: in `path` for the pool kv, in `path`.<name> for a side pool;
    further buffers have a number behind that. All stores have room for as many pages (times
    `pool_ratio`), and of those that are opened together `storage_size` holds them all.
    """

    def __init__(self, path: str, options: StorageOptions, names: Collection[str]) -> None:
        """`names` are those that a pool can have; raises InvalidArgumentError when `pool_ratio` has
        others."""
        unknown = sorted(set(options.pool_ratio) - set(names))
        if unknown:
            raise InvalidArgumentError(
                f"pool_ratio names {unknown}; SGLang's pools are {sorted(names)}", unknown=unknown
            )
        self._path = path
        self._options = options
        self._pages = Fraction(0)  # of KV that there is room for; 0: nothing was opened

    def open(self, pools: Mapping[HostPool, Namespace]) -> dict[str, PageStore]:
        """Running stores by the names of the pools.

        Pools of a second call get as much room a page as those of the first, beyond
        `storage_size`. Errors are those of LocalCacheService; nothing stays open then.
        """
        if not self._pages:
            self._warn_of_unused_ratios(pools)
            a_page = sum(pool.page_bytes * self._ratio(pool) for pool in pools)
            self._pages = self._options.storage_size / a_page if a_page else Fraction(0)
        with ExitStack() as undo:
            stores = {}
            for pool, namespace in pools.items():
                services = []
                for number, buffer in enumerate(pool.buffers):
                    service = self._service(pool, number, buffer)
                    undo.callback(service.close)
                    services.append(service)
                stores[pool.name] = PageStore(
                    pool,
                    namespace,
                    services,
                    load_timeout=self._options.load_timeout,
                    store_timeout=self._options.store_timeout,
                )
            undo.pop_all()
        return stores

    def _service(self, pool: HostPool, number: int, buffer: Buffer) -> LocalCacheService:
        share = int(self._pages * self._ratio(pool) * buffer.page_bytes)
        try:
            service = LocalCacheService(
                self._path_of(pool, number),
                share,
                self._options.num_of_shard,
                buffer.memory,
                self._options.num_workers,
                verify=self._options.verify,
                durability=self._options.durability,
                page_cache=self._options.page_cache,
                time_to_live=self._options.time_to_live,
                create_timeout=_CREATE_SECONDS,
            )
        except InvalidArgumentError as error:
            if error.values.get("storage_size") != share or share == self._options.storage_size:
                raise
            raise self._too_small(pool, error) from error
        except KVCacheMemoryError as error:
            raise cannot_map(pool, error) from error
        except StoreFormatError as error:
            raise StoreFormatError(
                f"{error}. Pages of another size (another model, dtype, --page-size, --tp-size, or "
                'pipeline stages of other layers) need another "file": it may have {pp_rank}, '
                "{tp_rank} and {dp_rank} in it",
                **error.values,
            ) from error
        return started(service)

    def _too_small(self, pool: HostPool, error: InvalidArgumentError) -> InvalidArgumentError:
        """The error, which names a size that nobody gave, with what that comes from."""
        options = self._options
        return InvalidArgumentError(
            f"{error}. This is the share of SGLang's pool {pool.name} in storage_size "
            f"{options.storage_size}, with pool_ratio {dict(options.pool_ratio)}: give a larger "
            "storage_size, a larger pool_ratio or fewer shards (num_of_shard)",
            **{**error.values, "pool": pool.name, "pool_ratio": dict(options.pool_ratio)},
        )

    def _path_of(self, pool: HostPool, number: int) -> str:
        if pool.name == KV and not number:
            return self._path
        return f"{self._path}.{pool.name}" + (f".{number}" if number else "")

    def _ratio(self, pool: HostPool) -> Fraction:
        return Fraction(self._options.pool_ratio.get(pool.name, 1))

    def _warn_of_unused_ratios(self, pools: Mapping[HostPool, Namespace]) -> None:
        found = sorted(pool.name for pool in pools)
        unused = sorted(set(self._options.pool_ratio) - set(found))
        if unused := [name for name in unused if not name.startswith(_LATE)]:
            log.warning("pool_ratio names %s; this model's pools are %s", unused, found)
