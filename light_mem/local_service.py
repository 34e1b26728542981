"""LocalCacheService: the service in the process that owns the KV tensor and the workers."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from light_mem import blocks
from light_mem.client import CacheClient
from light_mem.engine import page_cache as cache_policy
from light_mem.engine.affinity import place_workers
from light_mem.engine.base import BlockIO, Outcome
from light_mem.engine.in_server import InServer
from light_mem.engine.kvmemory import MemorySource, close_source, share_tensor
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.opening import MAX_SHARDS, check_descriptors, check_sizes
from light_mem.engine.pool import WorkerPool
from light_mem.engine.process import fork_token
from light_mem.engine.small_reads import SmallReads
from light_mem.engine.small_writes import SmallWrites
from light_mem.engine.table_layout import MAX_BLOCKS, MAX_PATH_BYTES, MAX_WORKERS
from light_mem.engine.table_memory import Sizes
from light_mem.engine.task_table import TaskTable
from light_mem.errors import InvalidArgumentError, WorkerStartError
from light_mem.filesystem import warn_of_network
from light_mem.index.keys import HashValue, as_key
from light_mem.layouts import Layout
from light_mem.service import DEFAULT_CREATE_TIMEOUT, CacheService
from light_mem.session import Session
from light_mem.startup import start_line

if TYPE_CHECKING:
    import torch

log = logging.getLogger("light_mem")

DEFAULT_MAX_BLOCKS = 65536
# Each block costs some 50 us whatever its length, each page or region is a Python object: what has
# more of them is sooner queued than read here.
_SMALL_READ_BLOCKS = 4
_SMALL_PIECES = 64


class LocalCacheService(CacheService):
    """A disk cache of KV pages for one server, shared with other servers on the machine.

    The server's process owns the KV tensor; `num_workers` worker processes copy between its pages
    and the mapped shard files in the directory `file`. What is stored outlives the service.

    file            directory of the store; made when it is missing
    storage_size    bytes of pages that the store holds at most; allocated at once
    num_of_shard    shards of a new store; an existing one must have as many
    kvcache         uint8 CPU tensor [num_pages, page_bytes], contiguous. Where workers cannot map
                    its memory it is moved to shared memory in place, or refused: see the README
    num_workers     worker processes, 1 to 127
    verify          check each block's checksum when it is read
    time_to_live    seconds that blocks written by this service live, counted from the write: a use
                    does not prolong it. Then they are a miss, and the first to be evicted. None:
                    until they are evicted
    durability      "kernel": the kernel writes when it likes; what a power cut takes is a miss.
                    "flush": Finished means on the device
    page_cache      "keep": the kernel decides which blocks stay in its page cache; one that is not
                    there is read past it, and brought in when its worker is idle. "drop": what
                    was written or read is written out and dropped, for stores larger than memory
                    beside other users of the page cache
    worker_cpus     None: workers run anywhere. "spread": each has a core of its own, on the NUMA
                    nodes in turn. A list with one element a worker: a CPU number, or several
    small_read_bytes  a read of at most so many bytes, of up to 4 blocks that lie in the page cache,
                    is made by `create` itself: sooner than a worker would wake. 0: never. None:
                    what LIGHTMEM_SMALL_READ_BYTES says, 262144 if nothing
    small_write_bytes  the same of a write of one block (LIGHTMEM_SMALL_WRITE_BYTES), unless others
                    wait to be written, or durability or page_cache want what `create` must not
                    wait for
    max_blocks      capacity of the task table: blocks that each process may have in tasks
    create_timeout  seconds that `create` waits for room in a full task table

    Not carried: replication, compression, and anything about models: hashes are the caller's.
    """

    def __init__(
        self,
        file: str | os.PathLike[str],
        storage_size: int,
        num_of_shard: int,
        kvcache: torch.Tensor,
        num_workers: int,
        *,
        verify: bool = True,
        durability: str = "kernel",
        page_cache: str = "keep",
        time_to_live: float | None = None,
        worker_cpus: str | Sequence[int] | Sequence[Sequence[int]] | None = None,
        small_read_bytes: int | None = None,
        small_write_bytes: int | None = None,
        max_blocks: int = DEFAULT_MAX_BLOCKS,
        create_timeout: float = DEFAULT_CREATE_TIMEOUT,
    ) -> None:
        super().__init__(blocks.seconds("create_timeout", create_timeout))
        blocks.yes_or_no("verify", verify)
        num_workers = blocks.whole_number("num_workers", num_workers, 1, MAX_WORKERS - 1)
        num_of_shard = blocks.whole_number("num_of_shard", num_of_shard, 1, MAX_SHARDS)
        storage_size = blocks.whole_number("storage_size", storage_size, 1, 2**63 - 1)
        max_blocks = blocks.whole_number("max_blocks", max_blocks, 1, MAX_BLOCKS)
        if durability not in ("kernel", "flush"):
            raise InvalidArgumentError(
                f'durability is "kernel" or "flush", not {durability!r}', durability=durability
            )
        page_cache = cache_policy.choose(page_cache)
        cpus = place_workers(worker_cpus, num_workers)
        if time_to_live is not None and not blocks.seconds("time_to_live", time_to_live):
            raise InvalidArgumentError("time_to_live is more than 0 seconds, or None")
        small_read_bytes = blocks.small_read_bytes(small_read_bytes)
        small_write_bytes = blocks.small_write_bytes(small_write_bytes)
        directory = blocks.store_path(file)
        if len(os.fsencode(directory)) > MAX_PATH_BYTES:
            raise InvalidArgumentError(f"the path of a store has at most {MAX_PATH_BYTES} bytes")
        page_bytes, num_pages = blocks.tensor_sizes(kvcache)
        per_block = blocks.pages_per_block(page_bytes)
        check_sizes(page_bytes, num_of_shard, storage_size, per_block)
        check_descriptors(num_of_shard)
        with ExitStack() as undo:
            source = share_tensor(kvcache)
            undo.callback(close_source, source)
            self._memory = kvcache.numpy()  # once it is shared: what is exported is not moved
            engine = LocalStorageEngine.open_store(
                directory,
                page_bytes=page_bytes,
                num_of_shard=num_of_shard,
                storage_size=storage_size,
                block_pages=per_block,
                verify=verify,
                durability=durability,
                time_to_live=time_to_live,
                recover=False,  # the pool's thread does it, off the way to the first request
            )
            undo.callback(engine.close)
            warn_of_network(directory)
            table = TaskTable.create(
                Sizes.for_blocks(max_blocks),
                store=os.fsdecode(directory),
                page_bytes=page_bytes,
                num_pages=num_pages,
                pages_per_block=per_block,
                workers=num_workers,
            )
            undo.callback(table.close)
            self._session = Session.open(table, table.lock_path())
            undo.callback(self._session.close)
            # Where blocks are to leave the page cache, or to be on the device, workers see to that.
            keep = page_cache == cache_policy.KEEP
            self._small_read_bytes = small_read_bytes if keep else 0
            self._small_write_bytes = small_write_bytes if keep and durability == "kernel" else 0
            self._small_reads = SmallReads(engine, table)
            self._small_writes = small_writes = SmallWrites(
                engine, table, page_bytes <= self._small_write_bytes
            )
            self._pool = WorkerPool(
                table,
                self._session.queue,
                num_workers,
                source,
                verify=verify,
                durability=durability,
                page_cache=page_cache,
                time_to_live=time_to_live,
                cpus=cpus,
                is_stored=engine.is_stored,
                recover=engine.recover,
                prepare=small_writes.prepare,
                now_and_then=engine.end_dropped,
            )
            undo.pop_all()
        self._engine = engine
        self._kvcache = kvcache  # the workers map its memory: it lives as long as the service
        self._started = False
        self._start_guard = threading.Lock()
        self._finalizer = weakref.finalize(
            self,
            _close,
            self._pool,
            self._session,
            engine,
            source,
            (self._small_reads, self._small_writes),
            fork_token(),
        )
        if log.isEnabledFor(logging.INFO):
            line = start_line(
                directory,
                engine.geometry,
                table,
                source,
                verify=verify,
                durability=durability,
                page_cache=page_cache,
                time_to_live=time_to_live,
                cpus=cpus,
            )
            log.info("%s", line)

    def run(self) -> None:
        """Start the workers and return when they are ready; raises WorkerStartError.

        Calling it again does nothing. Tasks created before wait until then.
        """
        self._check()
        with self._start_guard:
            if not self._started:
                self._pool.start()
                self._started = True

    def _check(self) -> None:
        super()._check() if not self._pool.failure else self._raise_failure()

    def _check_delete(self) -> None:
        self._check_open()  # no worker is wanted: what must not stay goes when none is left too

    def _raise_failure(self) -> None:
        raise WorkerStartError(f"the service has no workers any more: {self._pool.failure}")

    def _read_at_once(self, hashes: list[HashValue], layout: Layout) -> bool:
        if len(hashes) > _SMALL_READ_BLOCKS or not self._is_small(layout, self._small_read_bytes):
            return False
        return self._small_reads.read(
            [
                BlockIO(*as_key(value), layout.place_of(at, self._memory))
                for at, value in enumerate(hashes)
            ]
        )

    def _write_at_once(self, hashes: list[HashValue], layout: Layout) -> Outcome | None:
        if len(hashes) != 1 or not self._is_small(layout, self._small_write_bytes):
            return None
        place = layout.place_of(0, self._memory)
        return self._small_writes.write(BlockIO(*as_key(hashes[0]), place))

    def _is_small(self, layout: Layout, limit: int) -> bool:
        return (
            0 < layout.nbytes_in_all <= limit and layout.pieces <= _SMALL_PIECES and self._started
        )

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers now."""
        return self._pool.pids

    def client(self) -> CacheClient:
        """A client for another process of this server: pickle it over, or use it here."""
        self._check()
        return CacheClient(self._session.table.address(), self._create_timeout)

    def end_workers(self) -> None:
        """Stop the workers as `close` does, and stay in the store: nothing touches the KV tensor
        any more, every block is Finished or Aborted, and what was Finished wrongly can still be
        deleted. All else but `delete`, `stats` and `close` raises ServiceClosedError. Calling it
        again does nothing."""
        self._check_open()
        self._small_reads.close()
        self._small_writes.close()
        self._pool.stop()

    def close(self) -> None:
        """Stop the workers after the blocks in their hands, abort what waits, leave the store.

        Nothing stays behind but what open views hold, until they are closed too. Task objects
        keep their states. Also happens when the object goes
        and when the interpreter ends. Calling it again, or in a forked child, does nothing.
        """
        self._closed = True
        self._finalizer()


def _close(
    pool: WorkerPool,
    session: Session,
    engine: LocalStorageEngine,
    source: MemorySource,
    in_server: Sequence[InServer],
    token: int,
) -> None:
    if token != fork_token():
        return  # a forked child: the workers and the locks are its parent's
    with ExitStack() as steps:  # the last comes first, and none is left out when one fails
        steps.callback(engine.close)
        steps.callback(close_source, source)
        steps.callback(session.table.close)
        steps.callback(session.close)
        steps.callback(pool.stop)
        for mover in in_server:
            steps.callback(mover.close)
