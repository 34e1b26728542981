"""CacheService and LocalCacheService: what an inference server imports."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from abc import ABC
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from light_mem import blocks
from light_mem.engine.kvmemory import MemorySource, close_source, share_tensor
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.opening import MAX_SHARDS, check_sizes
from light_mem.engine.pool import WorkerPool
from light_mem.engine.process import fork_token, refuse_fork
from light_mem.engine.task_table import (
    MAX_BLOCKS,
    MAX_PATH_BYTES,
    MAX_WORKERS,
    READ,
    WORKER_COUNTERS,
    WRITE,
    Sizes,
    TableAddress,
    TaskTable,
)
from light_mem.errors import InvalidArgumentError, ServiceClosedError, WorkerStartError
from light_mem.filesystem import warn_of_network
from light_mem.index import keys as keymath
from light_mem.index.keys import HashValue
from light_mem.session import Session
from light_mem.task import CacheTask, check_server

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from light_mem.maintenance import VerifyReport

log = logging.getLogger("light_mem")

DEFAULT_MAX_BLOCKS = 65536
DEFAULT_CREATE_TIMEOUT = 10.0
# An abort waits for copies in hand: a piece each, some 100 us. Longer means a stopped worker.
_ABORT_SECONDS = 10.0


class CacheService(ABC):
    """What every process of a server can do with the cache: look up, create, abort, delete.

    Methods may be called from any thread. In a forked child they raise ForkedProcessError.
    """

    _session: Session
    _engine: LocalStorageEngine

    def __init__(self, create_timeout: float) -> None:
        self._create_timeout = create_timeout
        self._fork_token = fork_token()
        self._closed = False

    # --- sizes -----------------------------------------------------------------------------------

    def page_size(self) -> int:
        """Bytes of a page."""
        return int(self._session.table.header["page_bytes"][0])

    def block_size(self) -> int:
        """Bytes of a full block: `pages_per_block` pages."""
        return self.page_size() * self.pages_per_block

    @property
    def pages_per_block(self) -> int:
        """Pages of a full block."""
        return int(self._session.table.header["pages_per_block"][0])

    @property
    def num_pages(self) -> int:
        """Pages of the KV tensor."""
        return int(self._session.table.header["num_pages"][0])

    # --- look-ups --------------------------------------------------------------------------------

    def query(self, hashes: HashValue | Sequence[HashValue]) -> Any:
        """Whether a hash is stored: bool for one hash, list[bool] for a sequence of them.

        Counts as use for eviction. Takes no lock. Raises InvalidArgumentError for what is no hash.
        """
        self._check()
        if keymath.is_hash(hashes):
            low, high = keymath.as_key(hashes)  # type: ignore[arg-type]
            found = self._engine.lookup.find_one(low, high) >= 0
            self._count("queried", 1, "hits", int(found))
            return found
        found_all = self._engine.find(keymath.as_keys(blocks.parse_hashes(hashes)))  # type: ignore[arg-type]
        self._count("queried", len(found_all), "hits", int(found_all.sum()))
        return found_all.tolist()

    def match_prefix(self, hashes: Sequence[HashValue]) -> int:
        """How many leading hashes are stored. These count as used; those after the gap do not."""
        self._check()
        keys = keymath.as_keys(blocks.parse_hashes(hashes))
        found = self._engine.find(keys, touch=False)
        length = len(found) if found.all() else int(found.argmin())
        if length:
            self._engine.find(keys[:length])
        self._count("queried", len(keys), "hits", length)
        return length

    def _count(self, name: str, n: int, other: str, m: int) -> None:
        # Statistics: two threads at once may lose one of their additions.
        counters = self._session.counters
        counters[name] += n
        counters[other] += m
        self._engine.count(n, m)

    # --- tasks -----------------------------------------------------------------------------------

    def create(
        self,
        mode: str,
        hash_values: Sequence[HashValue],
        page_indices: Sequence[int] | npt.NDArray[Any] | torch.Tensor,
    ) -> CacheTask:
        """Write pages to the store, or read them from it; returns at once.

        The order of the arguments is that of the public README's example (contract, section 2).

        mode          "write"/"w" or "read"/"r"
        hash_values   H hashes: one a page (H == P), or one a run of `pages_per_block` pages
        page_indices  P pages of the KV tensor: list, numpy array or torch integer tensor

        A write of what is stored is Finished without a copy; a read of what is not stored is
        Aborted and touches no page. Raises InvalidArgumentError or PageIndexError (ValueError,
        IndexError) before anything is queued, TaskTableFullError when the table stays full.
        """
        self._check()
        kind = blocks.parse_mode(mode)
        hashes = blocks.parse_hashes(hash_values)
        keys = keymath.as_keys(hashes)
        pages = blocks.parse_pages(page_indices, self.num_pages, kind)
        per_hash = blocks.pages_per_hash(len(hashes), len(pages), self.pages_per_block)
        found = self._engine.find(keys)
        done = found if kind == WRITE else ~found
        already = _pages_of(pages, found, per_hash) if kind == WRITE else []
        counters = self._session.counters
        counters["write_tasks" if kind == WRITE else "read_tasks"] += 1
        counters["present" if kind == WRITE else "missing"] += int(done.sum())
        fields: dict[str, Any] = {
            "mode": kind,
            "hashes": hashes,
            "pages": pages,
            "pages_per_hash": per_hash,
            "already": already,
        }
        if done.all():
            final = bytes([2 if kind == WRITE else 3]) * len(hashes)
            return CacheTask(**fields, final=final)
        session = self._session
        place = session.place(keys, kind, pages, per_hash, self._create_timeout)
        task = CacheTask(**fields, table=session.table, place=place, session=session)
        order = np.flatnonzero(~done)
        if kind == WRITE and len(order) > 1:
            # Blocks of one shard in a row: a worker's batch then takes one lock, not several.
            mixed = keymath.mix(keys[order])
            shards = keymath.shards_of(mixed, self._engine.geometry.shards)
            order = order[np.argsort(shards, kind="stable")]
        session.submit(task, place, done, order, kind)
        return task

    def abort(self, task: CacheTask) -> None:
        """Stop a task. When this returns, its blocks are Finished or Aborted and no worker
        touches its pages any more.

        Blocks nobody has begun are Aborted at once; a worker that copies one stops at the next
        piece (some 100 us), and this waits for it. Blocks that are Finished stay so. Raises
        LockTimeoutError when a worker is stopped (SIGSTOP): its pages are not safe then.
        """
        self._check()
        if task.ready():
            return
        task.abort(self._session.queue, _ABORT_SECONDS)

    def active_create_count(self, mode: str) -> int:
        """Tasks of this mode, of all processes of the service, that are not ready."""
        self._check_open()
        return self._session.table.active_tasks(blocks.parse_mode(mode))

    # --- taking blocks out -----------------------------------------------------------------------

    def delete(self, hashes: HashValue | Sequence[HashValue]) -> int:
        """Take blocks out of the store; returns how many of them were stored."""
        self._check()
        one = keymath.is_hash(hashes)
        return self._engine.delete(
            keymath.as_keys([hashes] if one else blocks.parse_hashes(hashes))  # type: ignore[list-item, arg-type]
        )

    def clear(self) -> int:
        """Take all blocks out of the store, other services' too; returns how many there were."""
        self._check()
        return self._engine.clear()

    # --- the rest --------------------------------------------------------------------------------

    def stats(self) -> dict[str, int]:
        """Numbers of the store (blocks, slots, evictions, ...) and of this service since it was
        made (hits, misses, bytes each way, lost races, damaged blocks, restarts, ...)."""
        self._check_open()
        table = self._session.table
        numbers = self._engine.stats()
        for name in WORKER_COUNTERS:
            numbers[name] = int(table.workers[name].sum())
        for name in ("queried", "hits", "present", "missing", "read_tasks", "write_tasks"):
            numbers[name] = numbers.get(name, 0) + int(table.lanes[name].sum())
        numbers["misses"] = numbers["queried"] - numbers["hits"]
        numbers["restarts"] = int(table.header["restarts"][0])
        for name, mode in (("read", READ), ("write", WRITE)):
            numbers[f"{name}_queue"] = self._session.queue.depth(mode)
            numbers[f"active_{name}_tasks"] = table.active_tasks(mode)
        numbers["workers"] = int(table.workers["ready"].sum())
        return numbers

    def check(self, repair: bool = False) -> VerifyReport:
        """Check every byte of the store; three outcomes: a clean report, a repaired one
        (`repair=True`), or StoreDamagedError. See `light_mem.maintenance.check`."""
        self._check_open()
        from light_mem import maintenance

        return maintenance.check(self._engine.directory, repair)

    def _check_open(self) -> None:
        refuse_fork(self._fork_token, type(self).__name__)
        if self._closed:
            raise ServiceClosedError("the service is closed")

    def _check(self) -> None:
        self._check_open()
        if self._session.table.shutdown:
            raise ServiceClosedError("the service is closed")

    def close(self) -> None:
        """Let go of the cache; calling it again does nothing."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _pages_of(
    pages: npt.NDArray[np.uint32], found: npt.NDArray[np.bool_], per_hash: int
) -> list[int]:
    listed = np.repeat(found, per_hash)[: len(pages)]
    chosen: list[int] = pages[listed].tolist()
    return chosen


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
    durability      "kernel": the kernel writes when it likes; what a power cut takes is a miss.
                    "flush": Finished means on the device
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
        max_blocks: int = DEFAULT_MAX_BLOCKS,
        create_timeout: float = DEFAULT_CREATE_TIMEOUT,
    ) -> None:
        super().__init__(create_timeout)
        num_workers = blocks.whole_number("num_workers", num_workers, 1, MAX_WORKERS - 1)
        num_of_shard = blocks.whole_number("num_of_shard", num_of_shard, 1, MAX_SHARDS)
        storage_size = blocks.whole_number("storage_size", storage_size, 1, 2**63 - 1)
        max_blocks = blocks.whole_number("max_blocks", max_blocks, 1, MAX_BLOCKS)
        if durability not in ("kernel", "flush"):
            raise InvalidArgumentError(
                f'durability is "kernel" or "flush", not {durability!r}', durability=durability
            )
        directory = Path(file).absolute()
        if len(os.fsencode(directory)) > MAX_PATH_BYTES:
            raise InvalidArgumentError(f"the path of a store has at most {MAX_PATH_BYTES} bytes")
        page_bytes, num_pages = _tensor_sizes(kvcache)
        per_block = blocks.pages_per_block(page_bytes)
        check_sizes(page_bytes, num_of_shard, storage_size, per_block)
        with ExitStack() as undo:
            source = share_tensor(kvcache)
            undo.callback(close_source, source)
            engine = LocalStorageEngine.open_store(
                directory,
                page_bytes=page_bytes,
                num_of_shard=num_of_shard,
                storage_size=storage_size,
                block_pages=per_block,
                verify=verify,
                durability=durability,
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
            self._session = Session.open(table, _lock_path(table))
            undo.callback(self._session.close)
            self._pool = WorkerPool(
                table,
                self._session.queue,
                num_workers,
                source,
                verify=verify,
                durability=durability,
                is_stored=lambda low, high: engine.lookup.find_one(low, high, touch=False) >= 0,
                reclaim=engine.reclaim,
            )
            undo.pop_all()
        self._engine = engine
        self._kvcache = kvcache  # the workers map its memory: it lives as long as the service
        self._started = False
        self._start_guard = threading.Lock()
        self._finalizer = weakref.finalize(
            self, _close, self._pool, self._session, engine, source, fork_token()
        )
        log.info(
            "store %s: %d pages of %d bytes, %d a block, %d shards, %d workers, %s",
            directory,
            num_pages,
            page_bytes,
            per_block,
            num_of_shard,
            num_workers,
            durability,
        )

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

    def _raise_failure(self) -> None:
        raise WorkerStartError(f"the service has no workers any more: {self._pool.failure}")

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers now."""
        return self._pool.pids

    def client(self) -> CacheClient:
        """A client for another process of this server: pickle it over, or use it here."""
        self._check()
        return CacheClient(self._session.table.address(), self._create_timeout)

    def close(self) -> None:
        """Stop the workers after the blocks in their hands, abort what waits, leave the store.

        Nothing stays behind. Task objects keep their states. Also happens when the object goes
        and when the interpreter ends. Calling it again, or in a forked child, does nothing.
        """
        self._closed = True
        self._finalizer()


def _tensor_sizes(kvcache: torch.Tensor) -> tuple[int, int]:
    shape = tuple(getattr(kvcache, "shape", ()))
    if len(shape) != 2 or not all(shape):
        raise InvalidArgumentError(
            f"kvcache is a uint8 tensor [num_pages, page_bytes], not one of shape {shape}",
            shape=shape,
        )
    if shape[0] > 2**32 - 1:
        raise InvalidArgumentError(f"at most 2**32 - 1 pages, not {shape[0]}")
    return int(shape[1]), int(shape[0])


def _lock_path(table: TaskTable) -> str:
    """A path that opens the table's memory object anew, for locks of its own."""
    return table.path or f"/proc/self/fd/{table.fd}"


def _close(
    pool: WorkerPool, session: Session, engine: LocalStorageEngine, source: MemorySource, token: int
) -> None:
    if token != fork_token():
        return  # a forked child: the workers and the locks are its parent's
    with ExitStack() as steps:  # the last comes first, and none is left out when one fails
        steps.callback(engine.close)
        steps.callback(close_source, source)
        steps.callback(session.table.close)
        steps.callback(session.close)
        steps.callback(pool.stop)


class CacheClient(CacheService):
    """The service from another process of the same server; picklable.

    It uses the server's workers and KV tensor: page indices mean the server's pages. It connects
    when it is first used, takes one lane of the task table for its process, and gives it back on
    `close` or when the process ends. When the server is gone, calls raise ServiceClosedError.
    """

    def __init__(self, address: TableAddress, create_timeout: float) -> None:
        super().__init__(create_timeout)
        self._address = address
        self._connect_guard = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        # Reached only while not connected: `_session` and `_engine` come into being here.
        if name not in ("_session", "_engine"):
            raise AttributeError(name)
        self._check_open()
        with self._connect_guard:
            if "_session" not in self.__dict__:
                connection = _connect(self._address)
                self._connection = connection
                self._engine = connection.engine
                self._session = connection.session
        return self.__dict__[name]

    def _check(self) -> None:
        super()._check()
        if self._session.table.orphaned:
            check_server(self._session.table)

    def client(self) -> CacheClient:
        """Another client of the same service."""
        self._check_open()
        return CacheClient(self._address, self._create_timeout)

    def __reduce__(self) -> tuple[Any, ...]:
        return CacheClient, (self._address, self._create_timeout)

    def close(self) -> None:
        """Stop using the service; it and other clients of this process go on."""
        self._closed = True
        for name in ("_session", "_engine", "_connection"):
            self.__dict__.pop(name, None)


class _Connection:
    """A process's one connection to a service, shared by its clients."""

    def __init__(self, table: TaskTable) -> None:
        self.session = Session.open(table, _lock_path(table))
        self.engine = LocalStorageEngine(
            os.fsdecode(bytes(table.header["store"][0])), kind="client"
        )
        self._finalizer = weakref.finalize(
            self, _disconnect, self.session, self.engine, fork_token()
        )


def _disconnect(session: Session, engine: LocalStorageEngine, token: int) -> None:
    if token == fork_token():
        session.close()
        engine.close()


_connections: weakref.WeakValueDictionary[str, _Connection] = weakref.WeakValueDictionary()
_connections_guard = threading.Lock()


def _after_fork_in_child() -> None:
    global _connections_guard
    _connections.clear()  # their locks are the parent's
    _connections_guard = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _connect(address: TableAddress) -> _Connection:
    with _connections_guard:
        connection = _connections.get(address.table_id)
        if connection is None:
            connection = _Connection(TaskTable.attach(address))
            _connections[address.table_id] = connection
        return connection
