"""CacheService: what every process of a server can do with the cache, on one session and engine."""

from __future__ import annotations

import reprlib
from abc import ABC
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from light_mem import blocks
from light_mem.closing import Closing
from light_mem.engine.base import Outcome
from light_mem.engine.dealing import deal
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.process import fork_token, refuse_fork
from light_mem.engine.table_layout import ABORTED, FINISHED, READ, WRITE
from light_mem.engine.table_stats import copy_rate, read_numbers, summary
from light_mem.errors import InvalidArgumentError, ServiceClosedError, TaskTableFullError
from light_mem.index import keys as keymath
from light_mem.index.keys import HashValue
from light_mem.layouts import Layout, PageLayout, parse_regions
from light_mem.session import Session
from light_mem.task import CacheTask
from light_mem.views import BlockView, open_view

if TYPE_CHECKING:
    import torch

    from light_mem.layouts import Regions
    from light_mem.maintenance import VerifyReport

DEFAULT_CREATE_TIMEOUT = 10.0
# An abort waits for copies in hand: a piece each, some 100 us, or ms where it comes from a device.
# Longer means a stopped worker.
_ABORT_SECONDS = 10.0


class CacheService(Closing, ABC):
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

    def query(
        self,
        hashes: HashValue | Sequence[HashValue],
        pages: Sequence[int] | npt.NDArray[np.int64] | None = None,
    ) -> Any:
        """Whether a hash is stored: bool for one hash, list[bool] for a sequence of them.

        `pages`, for a sequence: how many pages each block is wanted with; one that was stored with
        another number (by a service with another block size) does not count.
        Counts as use for eviction. Takes no lock. Raises InvalidArgumentError for what is no hash.
        """
        self._check()
        if keymath.is_hash(hashes):
            low, high = keymath.as_key(hashes)  # type: ignore[arg-type]
            found = self._engine.lookup.find_one(low, high) >= 0
            self._count_lookups(1, int(found))
            return found
        keys = keymath.as_keys(blocks.parse_hashes(hashes))  # type: ignore[arg-type]
        lengths = None
        if pages is not None:
            lengths = blocks.parse_lengths(pages, len(keys)) * self.page_size()
        found_all = self._engine.find(keys, nbytes=lengths)
        self._count_lookups(len(found_all), int(found_all.sum()))
        return found_all.tolist()

    def match_prefix(self, hashes: Sequence[HashValue]) -> int:
        """How many leading hashes are stored. These count as used; those after the gap do not."""
        self._check()
        keys = keymath.as_keys(blocks.parse_hashes(hashes))
        found = self._engine.find(keys, touch=False)
        length = len(found) if found.all() else int(found.argmin())
        if length:
            self._engine.find(keys[:length])
        self._count_lookups(len(keys), length)
        return length

    def touch(self, hashes: Sequence[HashValue]) -> None:
        """Count hashes as used for eviction, those that are stored; no look-up in `stats()`."""
        self._check()
        self._engine.find(keymath.as_keys(blocks.parse_hashes(hashes)))

    def _count_lookups(self, lookups: int, hits: int) -> None:
        self._session.count("queried", lookups)
        self._session.count("hits", hits)
        self._engine.count(lookups, hits)

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
        pages = blocks.parse_pages(page_indices, self.num_pages, kind)
        per_hash = blocks.pages_per_hash(len(hashes), len(pages), self.pages_per_block)
        layout = PageLayout(pages, len(hashes), per_hash, self.page_size())
        return self._create(kind, hashes, layout)

    def create_regions(
        self, mode: str, hash_values: Sequence[HashValue], regions: Regions
    ) -> CacheTask:
        """`create` for blocks that are regions of the KV tensor's memory rather than pages.

        regions   one entry a hash: (offset, length) in bytes from the tensor's first byte, or
                  several such pairs, which together are the block; also as an integer array
                  [H, 2] or [H, R, 2]

        A block takes as many slots as its bytes fill; a read wants the very length that was
        written. Errors, states and all else as `create`.
        """
        self._check()
        kind = blocks.parse_mode(mode)
        hashes = blocks.parse_hashes(hash_values)
        layout = parse_regions(regions, len(hashes), self.num_pages * self.page_size(), kind)
        if layout is None:
            return self.create(mode, [], [])
        return self._create(kind, hashes, layout)

    def _create(self, kind: int, hashes: list[HashValue], layout: Layout) -> CacheTask:
        if kind == READ and self._read_at_once(hashes, layout):
            self._session.count("read_tasks", 1)
            final = bytes([FINISHED]) * len(hashes)
            return CacheTask(mode=kind, hashes=hashes, layout=layout, already=[], final=final)
        if kind == WRITE and (outcome := self._write_at_once(hashes, layout)) is not None:
            present = outcome is Outcome.PRESENT
            self._session.count("write_tasks", 1)
            self._session.count("present", int(present))
            return CacheTask(
                mode=kind,
                hashes=hashes,
                layout=layout,
                already=list(layout.pages_of(0)) if present else [],
                final=bytes([FINISHED]),
            )
        keys = keymath.as_keys(hashes)
        # A block that is stored with another length (other settings) is replaced by a write.
        entries = self._engine.find_entries(keys, nbytes=layout.nbytes if kind == WRITE else None)
        found = entries >= 0
        done = found if kind == WRITE else ~found
        already = layout.pages_where(found) if kind == WRITE else []
        session = self._session
        session.count("write_tasks" if kind == WRITE else "read_tasks", 1)
        session.count("present" if kind == WRITE else "missing", int(done.sum()))
        fields: dict[str, Any] = {
            "mode": kind,
            "hashes": hashes,
            "layout": layout,
            "already": already,
        }
        if done.all():
            final = bytes([FINISHED if kind == WRITE else ABORTED]) * len(hashes)
            return CacheTask(**fields, final=final)
        try:
            place = session.place(keys, kind, layout, self._create_timeout, entries)
        except TaskTableFullError:
            session.count("dropped", int((~done).sum()) if kind == WRITE else 0)
            raise
        task = CacheTask(**fields, table=session.table, place=place, session=session)
        order = np.flatnonzero(~done)
        homes = None
        if kind == WRITE and len(order) > 1:
            count = self._engine.geometry.shards
            shards = keymath.shards_of(keymath.mix(keys[order]), count)
            workers = int(session.table.header["workers"][0])
            in_turn, homes = deal(shards, layout.nbytes[order], count, workers)
            order = order[in_turn]
        session.submit(task, place, done, order, homes, kind)
        return task

    def _read_at_once(self, hashes: list[HashValue], layout: Layout) -> bool:
        """Read a small task here, where the caller's process has the KV tensor; False: not done."""
        return False

    def _write_at_once(self, hashes: list[HashValue], layout: Layout) -> Outcome | None:
        """Write a small task of one block here; STORED, PRESENT, or None: not done."""
        return None

    def abort(self, task: CacheTask, timeout: float = _ABORT_SECONDS) -> None:
        """Stop a task. When this returns, its blocks are Finished or Aborted and no worker
        touches its pages any more.

        Blocks nobody has begun are Aborted at once; a worker that copies one stops at the next
        piece (some 100 us, or what the device takes for 4 MiB that are not in the page cache) and
        says so when it is through with its batch: this waits for it, with durability "flush" for a
        sync. Blocks that are Finished stay so. Raises LockTimeoutError when a worker does not
        answer for `timeout` seconds (SIGSTOP, a sync, a device that hangs): its pages are not safe
        before the task is ready.
        """
        self._check()
        timeout = blocks.seconds("timeout", timeout)
        if not isinstance(task, CacheTask):
            raise InvalidArgumentError(f"abort takes a CacheTask, not {reprlib.repr(task)}")
        if task.ready():
            return
        task.abort(self._session.queue, timeout)

    def ready_mark(self) -> int:
        """A number that changes whenever a task of the service, of any of its processes, becomes
        ready, for who follows many tasks in one thread: take the mark, look at the tasks, then
        `wait_ready(mark, timeout)`. A task that is ready when `create` returns changes nothing.
        """
        refuse_fork(self._fork_token, type(self).__name__)
        return int(self._session.table.header["done_seq"][0])

    def wait_ready(self, mark: int, timeout: float) -> None:
        """Sleep until a task becomes ready after `ready_mark` gave `mark`, at most `timeout`
        seconds; may return early for no reason. Any thread; one that waits delays no other."""
        refuse_fork(self._fork_token, type(self).__name__)
        table = self._session.table
        table.futex.wait(table.done_word, mark, blocks.seconds("timeout", timeout))

    def active_create_count(self, mode: str) -> int:
        """Tasks of this mode, of all processes of the service, that are not ready."""
        self._check_open()
        return self._session.table.active_tasks(blocks.parse_mode(mode))

    # --- keeping blocks, and looking at them in place --------------------------------------------

    def pin(self, hashes: HashValue | Sequence[HashValue]) -> int:
        """Keep blocks from eviction and expiry until `unpin`; returns how many are pinned now.

        What is not stored, or has expired, is not pinned and not counted. A pin belongs to the
        store: it outlives services, and is the same for all of them. `delete` and `clear` take
        pinned blocks out all the same. Raises PinLimitError when more than half of a shard's slots
        would be pinned: then none of these hashes is that was not before.
        """
        self._check()
        return self._engine.pin(_keys(hashes))

    def unpin(self, hashes: HashValue | Sequence[HashValue]) -> int:
        """Take pins away; returns how many of the hashes were pinned. Counts as use for eviction; a
        block whose time to live has passed meanwhile is gone."""
        self._check()
        return self._engine.unpin(_keys(hashes))

    def view(self, hash_value: HashValue) -> BlockView | None:
        """A stored block as a read-only tensor on the store's own memory, without a copy; None when
        it is not stored, or found damaged.

        The checksum is verified once, here. Eviction passes the block over until the view is
        closed. See `BlockView` for what it holds and what a write does. Counts as use, when it is
        taken and when it is closed. Takes the shard's lock. Raises LeaseLimitError when more than
        half of a shard's slots would be viewed, or 384 blocks by this process; LockTimeoutError.
        """
        self._check()
        low, high = keymath.as_key(blocks.parse_hashes([hash_value])[0])
        return open_view(self._engine, low, high)

    # --- taking blocks out -----------------------------------------------------------------------

    def delete(self, hashes: HashValue | Sequence[HashValue]) -> int:
        """Take blocks out of the store; returns how many of them were stored."""
        self._check_delete()
        return self._engine.delete(_keys(hashes))

    def clear(self) -> int:
        """Take all blocks out of the store, other services' too; returns how many there were."""
        self._check()
        return self._engine.clear()

    # --- the rest --------------------------------------------------------------------------------

    def stats(self, ages: bool = True) -> dict[str, Any]:
        """Numbers of the store and of this service since it was made, by name; plain values that
        JSON knows. The README lists them.

        ages    also `ages`, the stored blocks by the time since their last use: a walk over the
                index, some 25 ms a million slots

        Latencies are seconds; sizes bytes; `*_rate` bytes a second while workers were at it.
        """
        self._check_open()
        self._session.queue.tell_ready()  # whoever has seen a task ready sees its latency
        found = read_numbers(self._session.table)
        numbers: dict[str, Any] = {**self._engine.stats(), **found.counters, **found.gauges}
        for name, done in (("read", "bytes_read"), ("write", "bytes_written")):
            numbers[f"{name}_latency"] = summary(found.latencies[name])
            numbers[f"{name}_rate"] = copy_rate(numbers[done], numbers[f"{name}_ns"])
        if ages:
            numbers["ages"] = [bucket._asdict() for bucket in self._engine.ages()]
        return numbers

    def count_dropped(self, blocks: int) -> None:
        """Count blocks that a server wanted to store and gave up before `create`: its own queue
        was full. They show as `dropped_stores`."""
        self._check_open()
        self._session.count("dropped", blocks)

    def check(self, repair: bool = False) -> VerifyReport:
        """Check every byte of the store; three outcomes: a clean report, a repaired one
        (`repair=True`), or StoreDamagedError. See `light_mem.maintenance.check`."""
        self._check_open()
        blocks.yes_or_no("repair", repair)
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

    def _check_delete(self) -> None:
        self._check()

    def close(self) -> None:
        """Let go of the cache; calling it again does nothing."""
        raise NotImplementedError


def _keys(hashes: HashValue | Sequence[HashValue]) -> keymath.KeyArray:
    one = keymath.is_hash(hashes)
    return keymath.as_keys([hashes] if one else blocks.parse_hashes(hashes))  # type: ignore[list-item, arg-type]
