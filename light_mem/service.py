"""CacheService: what every process of a server can do with the cache, on one session and engine."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from light_mem import blocks
from light_mem.engine.base import Outcome
from light_mem.engine.process import refuse_fork
from light_mem.engine.table_layout import FINISHED, READ, WRITE
from light_mem.errors import InvalidArgumentError, TaskTableFullError
from light_mem.index.keys import HashValue
from light_mem.layouts import Layout, PageLayout, parse_regions
from light_mem.new_blocks import new_blocks
from light_mem.stored_blocks import StoredBlocks
from light_mem.task import CacheTask

if TYPE_CHECKING:
    import torch

    from light_mem.lane_room import Room
    from light_mem.layouts import RegionsArgument

DEFAULT_CREATE_TIMEOUT = 10.0
# An abort waits for copies in hand: of 4 MiB each, some 700 us, or ms where it comes from a device.
# Longer means a stopped worker.
_ABORT_SECONDS = 10.0


class CacheService(StoredBlocks):
    """What every process of a server can do with the cache: create and abort tasks, and all that
    `StoredBlocks` can.

    Methods may be called from any thread. In a forked child they raise ForkedProcessError.
    """

    def __init__(self, create_timeout: float) -> None:
        super().__init__()
        self._create_timeout = create_timeout

    def create(
        self,
        mode: str,
        hash_values: Sequence[HashValue],
        page_indices: Sequence[int] | npt.NDArray[Any] | torch.Tensor,
    ) -> CacheTask:
        """Write pages to the store, or read them from it; returns at once.

        mode          "write"/"w" or "read"/"r"
        hash_values   H hashes: one a page (H == P), or one a run of `pages_per_block` pages
        page_indices  P pages of the KV tensor: list, numpy array or torch integer tensor

        A write of what is stored is Finished without a copy; a read of what is not stored is
        Aborted and touches no page.

        Nothing is queued when it raises: InvalidArgumentError or PageIndexError (ValueError,
        IndexError); KVCacheMemoryError when the tensor was moved; TaskTableFullError when the table
        stays full; LockTimeoutError when a stopped process holds the queue, and in a signal's
        handler in the middle of another `create`; ServiceClosedError; WorkerStartError when there
        are no workers any more.
        """
        self._check()
        kind = blocks.parse_mode(mode)
        hashes = blocks.parse_hashes(hash_values)
        pages = blocks.parse_pages(page_indices, self.num_pages, kind)
        per_hash = blocks.pages_per_hash(len(hashes), len(pages), self.pages_per_block)
        layout = PageLayout(pages, len(hashes), per_hash, self.page_size())
        return self._create(kind, hashes, layout)

    def create_regions(
        self, mode: str, hash_values: Sequence[HashValue], regions: RegionsArgument
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
        # A block that is stored with another length (other settings) is replaced by a write.
        new = new_blocks(kind, hashes, layout, self._engine)
        session = self._session
        session.count("write_tasks" if kind == WRITE else "read_tasks", 1)
        session.count("present" if kind == WRITE else "missing", new.done)
        fields: dict[str, Any] = {
            "mode": kind,
            "hashes": hashes,
            "layout": layout,
            "already": new.pages_already(),
        }
        if new.done == new.count:
            return CacheTask(**fields, final=new.states_when_done())
        held: list[Room] = []
        try:
            new.deal(session.table.num_workers)
            room = session.place(new, layout.words, self._create_timeout, held)
            task = CacheTask(**fields, table=session.table, room=room, session=session)
            session.submit(task, room, new, kind)
        except BaseException as error:
            # Nobody gets the task. Of one that is queued by now the room stays its own until it is
            # ready; to wait for the task to be dropped would not do, a traceback may keep it.
            for room in held:
                session.release(room)
            if isinstance(error, TaskTableFullError) and kind == WRITE:
                session.count("dropped", new.count - new.done)
            raise
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

        Blocks nobody has begun are Aborted at once; a worker that copies one stops within 4 MiB
        (some 700 us, or what the device takes for them where they are not in the page cache) and
        says so when it is through with its batch: this waits for it, with durability "flush" for a
        sync. Blocks that are Finished stay so. Raises LockTimeoutError when a worker does not
        answer for `timeout` seconds (SIGSTOP, a sync, a device that hangs): its pages are not safe
        before the task is ready. For the queue, which others have for microseconds, it waits 0.1 s
        in any case.
        """
        self._check()
        timeout = blocks.seconds("timeout", timeout)
        if not isinstance(task, CacheTask):
            raise InvalidArgumentError(
                f"abort takes a CacheTask, not {reprlib.repr(task)}", task=task
            )
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
        seconds; may return early for no reason. Any thread; one that waits delays no other. Raises
        InvalidArgumentError."""
        refuse_fork(self._fork_token, type(self).__name__)
        mark = blocks.whole_number("mark", mark, 0, 2**32 - 1)
        table = self._session.table
        table.futex.wait(table.done_word, mark, blocks.seconds("timeout", timeout))

    def active_create_count(self, mode: str) -> int:
        """Tasks of this mode, of all processes of the service, that are not ready."""
        self._check_open()
        return self._session.table.active_tasks(blocks.parse_mode(mode))
