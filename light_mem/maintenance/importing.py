"""Puts the blocks of an export file into a store: verified first, published as any write is.

The store may be in use, and may have another number of shards; its pages must be of the same size.
Nothing is evicted: a block for which there is no free room is left out and reported. What is
stored already is passed over, so an import that was interrupted is simply run again. The order of
use goes over: blocks take their place among the store's own by the time of their last use. So do
times to live (what has expired meanwhile is left out), and pins, as far as the store's limit for
them goes; a stored block that is pinned in the file is pinned as well.
"""

from __future__ import annotations

import logging
import os
import time
from collections import defaultdict
from collections.abc import Sequence, Set
from pathlib import Path

import numpy as np

from light_mem.blocks import whole_number
from light_mem.engine.base import BlockIO, Outcome
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.opening import MAX_SHARDS, describe
from light_mem.engine.places import Regions
from light_mem.errors import BlockNotStoredError, PinLimitError, StoreFormatError
from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.index import retention
from light_mem.index.description import Geometry, no_store, slots_for
from light_mem.maintenance.changing import evict
from light_mem.maintenance.data import Progress
from light_mem.maintenance.export_file import ExportedBlock, ExportFile
from light_mem.maintenance.inspecting import listed
from light_mem.maintenance.opening import check_new, open_tool
from light_mem.maintenance.report import TransferReport
from light_mem.maintenance.store import Store

log = logging.getLogger("light_mem")

_EVER = 1e10  # seconds: no block is that old
BATCH_BYTES = 8 << 20
BATCH_BLOCKS = 64


def import_store(
    directory: str | os.PathLike[str],
    file: str | os.PathLike[str],
    *,
    storage_size: int | None = None,
    shards: int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> TransferReport:
    """Store the blocks of an export that are whole and not stored yet.

    storage_size, shards   make the store with these (None: 1 shard) when there is none. One that is
                           keeps its own: another size is a warning, other shards are an error
    dry_run                only read and check the file

    Raises FileNotFoundError, StoreFormatError (no export; no store; another page size or number
    of shards), InvalidArgumentError (`file` is a pipe or a device; too small for a server, see
    `check_size`), StoreBusyError, StoreFullError, BlockNotStoredError.
    """
    started = time.monotonic()
    if storage_size is not None:
        storage_size = whole_number("storage_size", storage_size, 1, 2**63 - 1)
    if shards is not None:
        shards = whole_number("shards", shards, 1, MAX_SHARDS)
    source = ExportFile(file)
    try:
        importing = _Import(source, progress)
        geometry = _geometry(directory)
        if geometry is not None:
            _require_same(directory, geometry, source, storage_size, shards)
        elif storage_size is not None:
            check_new(directory, source.page_bytes, shards or 1, storage_size)
        elif not dry_run:
            raise no_store(Path(directory), "files of one", "; --storage-size makes one")
        if dry_run:
            importing.check(directory)
        else:
            if geometry is not None:
                _take_out_expired(directory)
            engine = _open(directory, source, storage_size, shards or 1)
            try:
                importing.run(engine)
            finally:
                engine.close()
    finally:
        source.close()
    return TransferReport(
        os.fspath(directory),
        str(source.path),
        dry_run,
        importing.blocks,
        importing.nbytes,
        importing.present,
        (),
        importing.expired,
        importing.no_room,
        tuple(source.damaged),
        tuple(source.problems),
        time.monotonic() - started,
    )


def _geometry(directory: str | os.PathLike[str]) -> Geometry | None:
    """That of the store; None: there is none."""
    return describe(Path(directory)) if Path(directory).is_dir() else None


def _require_same(
    directory: str | os.PathLike[str],
    geometry: Geometry,
    source: ExportFile,
    storage_size: int | None,
    shards: int | None,
) -> None:
    if geometry.page_bytes != source.page_bytes:
        raise StoreFormatError(
            f"{source.path} holds pages of {source.page_bytes} bytes, the store {directory} pages "
            f"of {geometry.page_bytes}; nothing was changed",
            path=str(source.path),
            field="page_bytes",
            found=source.page_bytes,
            expected=geometry.page_bytes,
        )
    if shards is not None and shards != geometry.shards:
        raise StoreFormatError(
            f"the store {directory} has {geometry.shards} shards and keeps them: it cannot have "
            f"{shards}; nothing was changed",
            path=os.fspath(directory),
            field="num_of_shard",
            found=geometry.shards,
            expected=shards,
        )
    if storage_size is None:
        return
    if slots_for(storage_size, geometry.shards, geometry.page_bytes) != geometry.slots:
        kept = "the store %s keeps its size of %d bytes, not %d: light-mem resize gives it another"
        log.warning(kept, directory, geometry.storage_size, storage_size)


def _take_out_expired(directory: str | os.PathLike[str]) -> None:
    """An import evicts nothing, but what has expired is not to be in its way."""
    if any(retention.expired(part.rows["keep"]).any() for part in listed(Store(directory))):
        evict(directory, _EVER)


def _open(
    directory: str | os.PathLike[str], source: ExportFile, storage_size: int | None, shards: int
) -> LocalStorageEngine:
    if storage_size is None or _geometry(directory) is not None:
        return open_tool(directory)
    return LocalStorageEngine.open_store(
        directory,
        page_bytes=source.page_bytes,
        num_of_shard=shards,
        storage_size=storage_size,
        block_pages=1,
        kind="tool",
    )


class _Import:
    """One import."""

    def __init__(self, source: ExportFile, progress: Progress | None) -> None:
        self._source = source
        self._progress = progress
        self._batch_slots: defaultdict[int, int] = defaultdict(int)  # a shard, of this batch
        self._pins: list[ExportedBlock] = []
        self.blocks = self.nbytes = self.present = self.no_room = self.expired = 0

    def check(self, directory: str | os.PathLike[str]) -> None:
        """Read the file; count what an import would store, room not considered."""
        try:
            store = Store(directory)
        except StoreFormatError:
            stored = set()
        else:
            stored = {
                block
                for part in listed(store)
                for block in zip(
                    *(
                        part.rows[name][~retention.expired(part.rows["keep"])].tolist()
                        for name in ("low", "high", "nbytes")
                    ),
                    strict=True,
                )
            }
        for block in self._source.blocks():
            if retention.has_expired(block.keep):
                self.expired += 1
            elif (block.low, block.high, len(block.data)) in stored:
                self.present += 1
            else:
                self.blocks += 1
                self.nbytes += len(block.data)
            self._tell(block)

    def run(self, engine: LocalStorageEngine) -> None:
        """Store the blocks."""
        engine.evicts = False
        batch: list[ExportedBlock] = []
        size = 0
        for block in self._source.blocks():
            if self._fits(engine, block):
                batch.append(block)
                size += len(block.data)
            if size >= BATCH_BYTES or len(batch) >= BATCH_BLOCKS:
                self._store(engine, batch)
                batch, size = [], 0
            self._tell(block)
        self._store(engine, batch)

    def _fits(self, engine: LocalStorageEngine, block: ExportedBlock) -> bool:
        """Whether a block is to be stored: it is not there, and there may be room. Asked before
        it is tried, because a write would wait some time for room."""
        if retention.has_expired(block.keep):
            self.expired += 1
            return False
        is_pinned = block.keep & fmt.KEEP_PINNED
        if engine.is_stored(block.low, block.high, len(block.data)):
            self._pins += [block] if is_pinned else []
            self.present += 1
            return False
        geometry = engine.geometry
        shard = keymath.shard_of(keymath.mix_one(block.low, block.high), geometry.shards)
        needed = self._batch_slots[shard] + geometry.slots_of(len(block.data))
        if engine.free_slots(shard) < needed:
            self.no_room += 1
            return False
        self._batch_slots[shard] = needed
        self._pins += [block] if is_pinned else []
        return True

    def _store(self, engine: LocalStorageEngine, blocks: list[ExportedBlock]) -> None:
        batch = []
        for block in blocks:
            place = Regions(np.frombuffer(block.data, np.uint8), [(0, len(block.data))])
            batch.append(BlockIO(block.low, block.high, place))
        failed: list[tuple[ExportedBlock, Outcome]] = []
        fresh: set[tuple[int, int]] = set()

        def report(positions: Sequence[int], outcome: Outcome) -> None:
            these = [blocks[at] for at in positions]
            if outcome is Outcome.STORED:
                fresh.update((block.low, block.high) for block in these)
                self.blocks += len(these)
                self.nbytes += sum(len(block.data) for block in these)
                for block in these:
                    engine.set_used(block.low, block.high, block.used)
            elif outcome is Outcome.PRESENT:
                self.present += len(these)
            elif outcome is Outcome.NO_ROOM:
                self.no_room += len(these)
            elif outcome is not Outcome.COPIED:
                failed.extend((block, outcome) for block in these)

        # Not pinned from the start: that there may be no more pins is known under the lock only.
        engine.keeps = {(b.low, b.high): b.keep & fmt.KEEP_TIME_MASK for b in blocks}
        engine.write(batch, report)
        if failed:  # not in the report: there it would be taken for the shard's
            block, outcome = failed[0]
            key = keymath.key_text(block.low, block.high)
            raise BlockNotStoredError(
                f"block {key} could not be stored: {outcome.name}", key=key, outcome=outcome.name
            )
        self._batch_slots.clear()
        self._pin(engine, fresh)

    def _pin(self, engine: LocalStorageEngine, fresh: Set[tuple[int, int]]) -> None:
        """`fresh`: what was just stored."""
        pins, self._pins = self._pins, []
        refused = 0
        for block in pins:
            key = block.low, block.high
            try:
                pinned = engine.pin(np.array([key], np.uint64), expired=key in fresh)
            except PinLimitError:
                pinned, refused = 0, refused + 1
            is_over = retention.has_expired(block.keep & fmt.KEEP_TIME_MASK)
            if not pinned and is_over and key in fresh:
                self.expired += 1  # only the pin kept it
                self.blocks -= 1
                self.nbytes -= len(block.data)
        if refused:
            log.warning(
                "%d pinned blocks of %s are not pinned here: as many are as may be",
                refused,
                self._source.path,
            )

    def _tell(self, block: ExportedBlock) -> None:
        if self._progress is not None:
            self._progress(block.end, self._source.size)
