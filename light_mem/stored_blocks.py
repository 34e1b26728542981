"""StoredBlocks: what every process of a server can do with stored blocks, without moving them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from light_mem import blocks
from light_mem.blocks import whole_number
from light_mem.closing import Closing
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.process import fork_token, refuse_fork
from light_mem.engine.table_stats import copy_rate, read_numbers, summary
from light_mem.errors import ServiceClosedError
from light_mem.index import keys as keymath
from light_mem.index.keys import HashValue
from light_mem.session import Session
from light_mem.views import BlockView, open_view

if TYPE_CHECKING:
    from light_mem.maintenance import VerifyReport


class StoredBlocks(Closing):
    """What every process of a server can do with the blocks that are stored: look them up, keep
    them, take them out, look at them in place, count and check them.

    Methods may be called from any thread. In a forked child they raise ForkedProcessError.
    """

    _session: Session
    _engine: LocalStorageEngine

    def __init__(self) -> None:
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

        `pages`: how many pages each block is wanted with, one number a hash; one that was stored
        with another number (by a service with another block size) does not count.
        Counts as use for eviction. Takes no lock. Raises InvalidArgumentError for what is no hash.
        """
        self._check()
        if keymath.is_hash(hashes):
            if pages is not None:
                return self.query([hashes], pages)[0]  # type: ignore[list-item]
            low, high = keymath.as_key(hashes)  # type: ignore[arg-type]
            found = self._engine.lookup.find_one(low, high) >= 0
            self._count_lookups(1, int(found))
            return found
        keys = keymath.as_keys(blocks.parse_hashes(hashes))  # type: ignore[arg-type]
        found_all = self._engine.find(keys, nbytes=self._lengths(pages, len(keys)))
        self._count_lookups(len(found_all), int(found_all.sum()))
        return found_all.tolist()

    def match_prefix(
        self,
        hashes: Sequence[HashValue],
        pages: Sequence[int] | npt.NDArray[np.int64] | None = None,
    ) -> int:
        """How many leading hashes are stored. These count as used; those after the gap do not.

        `pages`: how many pages each block is wanted with, as of `query`.
        """
        self._check()
        keys = keymath.as_keys(blocks.parse_hashes(hashes))
        found = self._engine.find(keys, touch=False, nbytes=self._lengths(pages, len(keys)))
        length = len(found) if found.all() else int(found.argmin())
        if length:
            self._engine.find(keys[:length])
        self._count_lookups(len(keys), length)
        return length

    def touch(self, hashes: HashValue | Sequence[HashValue]) -> None:
        """Count hashes as used for eviction, those that are stored; no look-up in `stats()`."""
        self._check()
        self._engine.find(_keys(hashes))

    def _lengths(self, pages: object, hashes: int) -> npt.NDArray[np.int64] | None:
        """Bytes of each block that has so many pages; None: of any length."""
        return None if pages is None else blocks.parse_lengths(pages, hashes) * self.page_size()

    def _count_lookups(self, lookups: int, hits: int) -> None:
        self._session.count("queried", lookups)
        self._session.count("hits", hits)
        self._engine.count(lookups, hits)

    # --- keeping blocks, and looking at them in place --------------------------------------------

    def pin(self, hashes: HashValue | Sequence[HashValue]) -> int:
        """Keep blocks from eviction and expiry until `unpin`; returns how many are pinned now.

        What is not stored, or has expired, is not pinned and not counted. A pin belongs to the
        store: it outlives services, and is the same for all of them. `delete` and `clear` take
        pinned blocks out all the same. Raises PinLimitError when more than half of a shard's slots
        would be pinned, LockTimeoutError when a shard's lock is not free in time, OSError,
        StoreFormatError: then none of these hashes is pinned that was not before.
        """
        self._check()
        return self._engine.pin(_keys(hashes))

    def unpin(self, hashes: HashValue | Sequence[HashValue]) -> int:
        """Take pins away; returns how many of the hashes were pinned. Counts as use for eviction; a
        block whose time to live has passed meanwhile is gone.

        Raises LockTimeoutError when a shard's lock is not free in time, OSError or StoreFormatError
        when its files cannot be opened: shards before that one have been changed.
        """
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
        """Take blocks out of the store; returns how many of them were stored. Raises as `unpin`."""
        self._check_delete()
        return self._engine.delete(_keys(hashes))

    def clear(self) -> int:
        """Take all blocks out of the store, other services' too; returns how many there were.
        Raises as `unpin`."""
        self._check_delete()
        return self._engine.clear()

    # --- the rest --------------------------------------------------------------------------------

    def stats(self, ages: bool = True) -> dict[str, Any]:
        """Numbers of the store and of this service since it was made, by name; plain values that
        JSON knows. docs/operations.md lists them.

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
        was full. They show as `dropped_stores`. Raises InvalidArgumentError."""
        self._check_open()
        self._session.count("dropped", whole_number("blocks", blocks, 0, 2**32))

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


def _keys(hashes: HashValue | Sequence[HashValue]) -> keymath.KeyArray:
    one = keymath.is_hash(hashes)
    return keymath.as_keys([hashes] if one else blocks.parse_hashes(hashes))  # type: ignore[list-item, arg-type]
