"""LocalCacheService: the service in the process that owns the KV tensor and the workers."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from light_mem import blocks
from light_mem.client import CacheClient
from light_mem.engine.base import BlockIO, Outcome
from light_mem.engine.kvmemory import (
    MemorySource,
    close_source,
    share_tensor,
    tensor_was_moved,
)
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.pool import WorkerPool
from light_mem.engine.process import fork_token
from light_mem.engine.settings import EngineSettings
from light_mem.engine.small_reads import SmallReads
from light_mem.engine.small_writes import SmallWrites
from light_mem.engine.table_memory import Sizes
from light_mem.engine.task_table import TaskTable
from light_mem.errors import InvalidArgumentError, ServiceClosedError
from light_mem.filesystem import warn_of_network
from light_mem.index.keys import HashValue, as_key
from light_mem.layouts import Layout
from light_mem.service import DEFAULT_CREATE_TIMEOUT, CacheService
from light_mem.service_close import ServiceEnding
from light_mem.service_settings import ServiceSettings
from light_mem.session import Session
from light_mem.startup import start_line
from light_mem.task import CacheTask
from light_mem.waiting import LIVENESS_SECONDS

if TYPE_CHECKING:
    import torch

log = logging.getLogger("light_mem")

DEFAULT_MAX_BLOCKS = 65536
# Each block costs some 20 us whatever its length, each page or region is a Python object: what has
# more of them had better be queued. (16 blocks of 64 KiB take 400 us here, and workers 680.)
_SMALL_READ_BLOCKS = 16
_SMALL_PIECES = 256


class LocalCacheService(CacheService):
    """A disk cache of KV pages for one server, shared with other servers on the machine.

    The server's process owns the KV tensor; `num_workers` worker processes copy between its pages
    and the mapped shard files in the directory `file`. What is stored outlives the service.

    file            directory of the store; made when it is missing
    storage_size    bytes of pages that the store holds at most; allocated at once
    num_of_shard    shards of a new store; an existing one must have as many
    kvcache         uint8 CPU tensor [num_pages, page_bytes], contiguous. Where workers cannot map
                    its memory it is moved to shared memory in place, or refused: see
                    docs/reference.md
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
    small_read_bytes  a read of at most so many bytes, of up to 16 blocks in the page cache,
                    is made by `create` itself: sooner than a worker would wake. 0: never. None:
                    what LIGHTMEM_SMALL_READ_BYTES says, 1 MiB if nothing
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
        settings = ServiceSettings.checked(
            file,
            storage_size,
            num_of_shard,
            kvcache,
            num_workers,
            EngineSettings(verify, durability, page_cache, time_to_live),
            worker_cpus=worker_cpus,
            small_read_bytes=small_read_bytes,
            small_write_bytes=small_write_bytes,
            max_blocks=max_blocks,
        )
        source = self._open(settings, kvcache)
        self._kvcache = kvcache  # the workers map its memory: it lives as long as the service
        self._started = False
        self._start_guard = threading.Lock()
        self._ending = ServiceEnding(
            self._pool,
            self._session,
            self._engine,
            source,
            (self._small_writes, self._small_reads),
        )
        weakref.finalize(self, self._ending)  # when the object goes, or the interpreter ends
        if log.isEnabledFor(logging.INFO):
            line = start_line(self._engine.geometry, self._session.table, source, settings)
            log.info("%s", line)

    def _open(self, settings: ServiceSettings, kvcache: torch.Tensor) -> MemorySource:
        """Share the tensor, open the store, make the task table and the pool of workers; when one
        of them fails none is left."""
        s = settings
        with ExitStack() as undo:
            source = share_tensor(kvcache)
            undo.callback(close_source, source)
            self._kvcache, self._address = kvcache, kvcache.data_ptr()
            self._memory = kvcache.numpy()  # once it is shared: what is exported is not moved
            engine = LocalStorageEngine.open_store(
                s.directory,
                page_bytes=s.page_bytes,
                num_of_shard=s.num_of_shard,
                storage_size=s.storage_size,
                block_pages=s.pages_per_block,
                settings=s.engine._replace(page_cache="keep"),  # only workers drop
                recover=False,  # the pool's thread does it, off the way to the first request
            )
            undo.callback(engine.close)
            warn_of_network(s.directory)
            table = TaskTable.create(
                Sizes.for_blocks(s.max_blocks),
                store=os.fsdecode(s.directory),
                page_bytes=s.page_bytes,
                num_pages=s.num_pages,
                pages_per_block=s.pages_per_block,
                workers=s.num_workers,
                identity=engine.identity,
            )
            undo.callback(table.close)
            self._session = Session.open(table, table.lock_path())
            undo.callback(self._session.close)
            self._small_read_bytes = s.small_read_bytes
            self._small_write_bytes = s.small_write_bytes
            self._small_reads = SmallReads(engine, table)
            self._small_writes = small_writes = SmallWrites(
                engine, table, s.page_bytes <= s.small_write_bytes
            )
            self._pool = WorkerPool(
                table,
                self._session.queue,
                s.num_workers,
                source,
                settings=s.engine,
                cpus=s.cpus,
                engine=engine,
                prepare=small_writes.prepare,
            )
            undo.pop_all()
        self._engine = engine
        return source

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
        self._check_open()
        if self._pool.failure:
            raise self._pool.error("the service has no workers any more")
        if self._session.table.shutdown:
            raise ServiceClosedError(
                "the workers of the service were ended: what is left are delete, stats, check "
                "and close"
            )

    def _create(self, kind: int, hashes: list[HashValue], layout: Layout) -> CacheTask:
        if self._kvcache.data_ptr() != self._address:
            raise tensor_was_moved(self._address)
        return super()._create(kind, hashes, layout)

    def _check_delete(self) -> None:
        self._check_open()  # no worker is wanted: what must not stay goes when none is left too

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
        deleted. Of use are then `delete`, `stats`, `check` and `close`; calls that need workers or
        the queue raise ServiceClosedError. Calling it again is as calling `close` again."""
        self._check_open()
        self._small_reads.close()
        self._small_writes.close()
        self._pool.stop()

    def close(self, drain: float = 0.0) -> None:
        """Stop the workers after the blocks in their hands, abort what waits, leave the store.

        drain   seconds to wait before that for the tasks that there are, of clients too, to become
                ready; this process can make no new ones meanwhile. (Not where a signal's handler
                interrupts a `create`: until that goes on nothing is done.)

        Blocks that were to be written and are not are counted in a warning. Nothing stays behind
        but what open views hold, until they are closed too. Task objects keep their states. Also
        happens, without `drain`, at the end of a `with` block, when the object goes and when the
        interpreter ends. Calling it again, from any thread or a signal's handler, waits for the
        end, or ends what a Ctrl-C has broken off; in a forked child it does nothing. Raises
        InvalidArgumentError.
        """
        drain = blocks.seconds("drain", drain)
        was_open, self._closed = not self._closed, True
        if drain and was_open and self._started and self._fork_token == fork_token():
            self._drain(time.monotonic() + drain)
        self._ending()

    def _drain(self, deadline: float) -> None:
        """Wait until no task is under way, or nobody is there to do them."""
        table = self._session.table
        while not (table.shutdown or self._pool.failure or self._session.queue.is_mine):
            mark = int(table.header["done_seq"][0])  # before the look: what is ready after it wakes
            left = deadline - time.monotonic()
            if left <= 0 or not table.is_busy:
                return
            table.futex.wait(table.done_word, mark, min(left, LIVENESS_SECONDS))

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self.worker_pids)} workers"
        return f"<LocalCacheService {str(self._engine.directory)!r}, {state}>"

    def __reduce__(self) -> tuple[Any, ...]:
        raise InvalidArgumentError(
            "a LocalCacheService stays in its process: hand service.client() over instead"
        )
