"""LightMemL2Adapter: the L2 adapter that LMCache makes. All that touches LMCache's types is here.

Written against LMCache 0.5.6. What it leaves to the store: LMCache's global eviction, for LightMem
evicts by itself; and locks, see `submit_lookup_and_lock_task`.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import lmcache
from lmcache.lmcache_native import Bitmap
from lmcache.logging import init_logger
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import AdapterUsage, L2AdapterInterface
from lmcache.v1.platform import create_event_notifier

from light_mem import __version__
from light_mem.errors import InvalidArgumentError, LightMemError
from light_mem.integrations.lmcache.jobs import Job
from light_mem.integrations.lmcache.keys import NO_LAYOUT, KeySpace, layout_text
from light_mem.integrations.lmcache.ledger import Ledger
from light_mem.integrations.lmcache.opening import Pool, open_service
from light_mem.integrations.lmcache.options import AdapterOptions
from light_mem.integrations.lmcache.transfers import Transfers
from light_mem.logs import Limited

if TYPE_CHECKING:
    from lmcache.v1.distributed.api import MemoryLayoutDesc
    from lmcache.v1.distributed.internal_api import L1MemoryDesc
    from lmcache.v1.memory_management import MemoryObj

logger = init_logger("lmcache.light_mem")

_MAX_LAYOUTS = 1024


class LightMemL2Adapter(L2AdapterInterface):
    """Objects of LMCache in a LightMem store: they outlive the server.

    The tensor of the service is the L1 pool, which its workers map: an object is copied once,
    between the pool and the store. Any thread; only `delete` and `close` wait for anything.
    """

    def __init__(
        self, config: Mapping[str, Any], l1_memory_desc: L1MemoryDesc | None = None
    ) -> None:
        """`config` is `adapter_params` of the configuration: see `AdapterOptions`."""
        super().__init__()
        options = AdapterOptions.parse(config)
        if l1_memory_desc is None:
            raise InvalidArgumentError("LightMem needs an L1 pool in memory, and LMCache has none")
        self._options = options
        self._pool = Pool(l1_memory_desc.ptr, l1_memory_desc.size, options.slot_bytes)
        self._space = KeySpace(
            {"lmcache": lmcache.__version__, "namespace": options.namespace},
            [field.name for field in dataclasses.fields(ObjectKey)],
        )
        service = open_service(self._pool, options)
        stored = service.stats(ages=False)
        self._capacity = int(stored["slots"]) * options.slot_bytes
        self._ledger = Ledger(self._capacity)
        self._layouts: dict[Any, bytes] = {}
        self._guard = threading.Lock()  # results and notifiers
        self._stores: dict[int, L2StoreResult] = {}
        self._lookups: dict[int, Bitmap] = {}
        self._loads: dict[int, Bitmap] = {}
        self._store_ready = create_event_notifier()
        self._lookup_ready = create_event_notifier()
        self._load_ready = create_event_notifier()
        self._closed = False
        self._limited = Limited(each=1, seconds=30.0)
        self._transfers = Transfers(
            service,
            self._finished,
            lambda obj: bool(obj.is_valid()),
            max_queued=options.max_queued_bytes or max(1, self._pool.nbytes // 2),
            store_timeout=options.store_timeout,
            load_timeout=options.load_timeout,
        )
        logger.info(
            "LightMem %s: store %s with %d objects, %d of %d bytes; L1 pool of %d bytes, of which "
            "%d are within reach; %d workers, namespace %s",
            __version__,
            options.file,
            stored["blocks"],
            int(stored["used_slots"]) * options.slot_bytes,
            self._capacity,
            l1_memory_desc.size,
            self._pool.nbytes,
            options.num_workers,
            self._space.name,
        )
        logger.debug("LightMem namespace %s is %s", self._space.name, self._space.text)

    # --- descriptors -----------------------------------------------------------------------------

    def get_store_event_fd(self) -> int:
        return int(self._store_ready.fileno())

    def get_lookup_and_lock_event_fd(self) -> int:
        return int(self._lookup_ready.fileno())

    def get_load_event_fd(self) -> int:
        return int(self._load_ready.fileno())

    # --- stores ----------------------------------------------------------------------------------

    def submit_store_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        """Queue a store. It succeeds when all of its objects are stored; what is stored already is
        not copied again."""
        hashes, regions = self._hashes(keys, objects), self._regions(objects)
        return self._transfers.store(keys, objects, hashes, regions)

    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]:
        with self._guard:
            done, self._stores = self._stores, {}
        return done

    # --- look-ups --------------------------------------------------------------------------------

    def submit_lookup_and_lock_task(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int:
        """Look the keys up, here and now: that hashes them and reads the mapped index without a
        lock, some microseconds a key, which another thread could not do beside this one.

        Nothing is locked. A look-up counts as use, so what it found is evicted last; what is gone
        by the time of the load is a miss in the load's bitmap, never other bytes. LMCache takes
        that: it drops the keys that a load did not bring, and shortens the hit.
        """
        number = self._transfers.number()
        found: list[int] = []
        try:
            wanted = self._wanted(keys, group_layout_descs)
            hits = self._transfers.find([h for _, h in wanted])
            found = [at for (at, _), hit in zip(wanted, hits, strict=True) if hit]
        except LightMemError as error:  # closed, or without workers
            self._limited.warning("look-ups fail: %s", str(error))
        bitmap = Bitmap(len(keys))
        bitmap.batched_set(found)
        with self._guard:
            self._lookups[number] = bitmap
            self._signal(self._lookup_ready)
        if found:
            hit_keys = [keys[at] for at in found]
            self._ledger.used(hit_keys)
            self._notify_keys_accessed(hit_keys)
        return number

    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None:
        with self._guard:
            return self._lookups.pop(task_id, None)

    def submit_unlock(self, keys: list[ObjectKey]) -> None:
        """Nothing was locked."""

    # --- loads -----------------------------------------------------------------------------------

    def submit_load_task(self, keys: list[ObjectKey], objects: list[MemoryObj]) -> int:
        """Queue a load. Objects whose bit is not set then hold anything."""
        hashes, regions = self._hashes(keys, objects), self._regions(objects)
        return self._transfers.load(keys, objects, hashes, regions)

    def query_load_result(self, task_id: int) -> Bitmap | None:
        with self._guard:
            return self._loads.pop(task_id, None)

    # --- the rest --------------------------------------------------------------------------------

    def delete(self, keys: list[ObjectKey]) -> None:
        """Take objects out of the store, those whose layout was seen in this life of the server.
        Waits for the locks of their shards."""
        try:
            hashes = [h for key in keys for h in self._space.known_hashes(key)]
            self._transfers.service().delete(hashes)
        except LightMemError as error:
            logger.warning("LightMem could not delete %d objects: %s", len(keys), str(error))
            return
        gone = self._ledger.gone(keys)
        if gone.keys:
            self._notify_keys_deleted(gone.keys, gone.sizes)

    def get_usage(self) -> AdapterUsage:
        """Bytes of the store, as slots: of all servers and lives. By salt: what this life of the
        server has stored and has no reason to think evicted."""
        usage = super().get_usage()
        try:
            stats = self._transfers.service().stats(ages=False)
        except LightMemError:
            return usage
        used = int(stats["used_slots"]) * self._options.slot_bytes
        return dataclasses.replace(
            usage, total_bytes_used=used, total_capacity_bytes=self._capacity
        )

    def report_status(self) -> dict[str, Any]:
        return {
            "is_healthy": self._transfers.is_alive(),
            "type": type(self).__name__,
            "file": self._options.file,
            "namespace": self._space.name,
            "capacity_bytes": self._capacity,
            "queued_bytes": self._transfers.queued_bytes(),
            **self._transfers.counters,
        }

    def close(self) -> None:
        """Finish stores for at most `shutdown_timeout` seconds; no worker touches the pool then."""
        self._transfers.close(self._options.shutdown_timeout)
        with self._guard:
            self._closed = True
            for notifier in (self._store_ready, self._lookup_ready, self._load_ready):
                notifier.close()

    # --- in between ------------------------------------------------------------------------------

    def _finished(self, job: Job) -> None:
        done = [at for at, yes in enumerate(job.done) if yes]
        keys = [job.keys[at] for at in done]
        sizes = [region[1] for at in done if (region := job.regions[at]) is not None]
        with self._guard:
            if job.load:
                bitmap = Bitmap(len(job.keys))
                bitmap.batched_set(done)
                self._loads[job.number] = bitmap
                self._signal(self._load_ready)
            else:
                result = L2StoreResult(len(done) == len(job.keys), sum(sizes))
                self._stores[job.number] = result
                self._signal(self._store_ready)
        if not keys:
            return
        if job.load:
            self._ledger.used(keys)
            self._notify_keys_accessed(keys)
            return
        new, out = self._ledger.stored(keys, sizes)
        if new.keys:
            self._notify_keys_stored(new.keys, new.sizes)
        if out.keys:
            self._notify_keys_deleted(out.keys, out.sizes)

    def _signal(self, notifier: Any) -> None:
        """Under the lock: the number of a closed descriptor may be another file's by now."""
        if not self._closed:
            notifier.notify()

    def _regions(self, objects: Iterable[MemoryObj]) -> list[tuple[int, int] | None]:
        return [self._pool.region(obj.data_ptr, obj.get_size()) for obj in objects]

    def _hashes(self, keys: Iterable[ObjectKey], objects: Iterable[MemoryObj]) -> list[int]:
        layouts = (self._layout(obj.get_shapes(), obj.get_dtypes()) for obj in objects)
        return self._space.hashes(keys, layouts)

    def _wanted(
        self, keys: list[ObjectKey], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> list[tuple[int, int]]:
        """Position and hash of each key whose layout is known."""
        layouts = {g: self._layout(d.shapes, d.dtypes) for g, d in group_layout_descs.items()}
        if not self._options.layout_in_keys:
            return [(at, self._space.hash(key, NO_LAYOUT)) for at, key in enumerate(keys)]
        return [
            (at, self._space.hash(key, layouts[key.object_group_id]))
            for at, key in enumerate(keys)
            if key.object_group_id in layouts
        ]

    def _layout(self, shapes: Iterable[Any], dtypes: Iterable[Any]) -> bytes:
        if not self._options.layout_in_keys:
            return NO_LAYOUT
        layout = (tuple(map(tuple, shapes)), tuple(dtypes))
        text = self._layouts.get(layout)
        if text is None:
            if len(self._layouts) >= _MAX_LAYOUTS:
                self._layouts.clear()
            text = self._layouts[layout] = layout_text(*layout)
        return text
