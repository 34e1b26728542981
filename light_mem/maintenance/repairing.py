"""Puts a store right: damaged blocks are dropped, indexes and records made to agree.

Every step is one that the engine could also have made (take a block out, write a record, put a
shard in order) under the same lock, so servers may go on meanwhile, and a kill at any moment
leaves what a kill of a server leaves. What cannot be told right from wrong is left as it is.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from light_mem.closing import Closing
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.reindex import plan_shard, same_block
from light_mem.engine.removing import take_out
from light_mem.engine.shard_file import ShardFile
from light_mem.engine.shard_header import data_path
from light_mem.errors import LightMemError
from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.index.recovery import occupied_runs
from light_mem.index.shard import ShardIndex
from light_mem.index.written import Written
from light_mem.maintenance.data import block_at
from light_mem.maintenance.data_file import DataFile
from light_mem.maintenance.in_place import list_block
from light_mem.maintenance.opening import open_tool
from light_mem.maintenance.owners import named_by_owners
from light_mem.maintenance.rebuilding import rebuild
from light_mem.maintenance.report import DamagedBlock, Finding
from light_mem.maintenance.store import Snapshot, Store, blocks_in, runs_of
from light_mem.maintenance.structure import StructureCheck

log = logging.getLogger("light_mem")


def prepare_files(store: Store, findings: list[Finding]) -> None:
    """Make an index that can be used, and files that have their size, where nobody has the store
    open; where someone has, or a file is another store's, the findings stay."""
    try:
        if any(finding.kind == "index" for finding in findings):
            rebuild(store.directory)
        open_tool(store.directory).close()  # what any server does when it opens
    except LightMemError as error:
        log.warning("store %s: %s", store.directory, str(error))


class Repair(Closing):
    """A repair of a store; joins it as a tool, as servers do."""

    def __init__(self, directory: Path) -> None:
        """Raises what opening raises: StoreBusyError, StoreFormatError, StoreFullError."""
        self._engine: LocalStorageEngine = open_tool(directory)
        self._directory = directory

    def close(self) -> None:
        """Leave the store."""
        self._engine.close()

    def run(self, damaged: list[DamagedBlock], findings: list[Finding]) -> int:
        """Repair the shards that these tell of; returns how many of the damaged blocks are damaged
        no more: all of them, for what this need not drop a server has dropped, or written anew."""
        shards = {block.shard for block in damaged} | {f.shard for f in findings if f.shard >= 0}
        for shard in sorted(shards):
            self._repair_shard(shard, [block for block in damaged if block.shard == shard])
        return len(damaged)

    def _repair_shard(self, shard: int, damaged: list[DamagedBlock]) -> None:
        with self._engine.change(shard) as (index, file):
            for block in damaged:
                self._drop_damaged(index, file, block)
            self._settle(index, file)
            self._list_again(index)
            # Now that each slot has one owner, the records can be made to say so.
            check = self._check(index, file)
            for finding in check.findings():
                if finding.kind == "stale":
                    file.clear_records([finding.slot])
            for slot in check.without_record():
                self._write_record(index, file, slot)

    def _check(self, index: ShardIndex, file: ShardFile) -> StructureCheck:
        # Under the lock: the shard cannot change, so its arrays need no copy. Its heads are read
        # from the file; only chains need them.
        store = Store(self._directory)
        snapshot = store.snapshot(index.shard)
        snapshot = Snapshot(index.shard, index.entries, snapshot.heads, index.control, file.records)
        return StructureCheck(snapshot, store.geometry, named_by_owners(self._directory))

    def _drop_damaged(self, index: ShardIndex, file: ShardFile, block: DamagedBlock) -> None:
        """Drop a block if it is still the one that was found damaged, and still is."""
        entry = index.entries[block.slot]
        key = keymath.key_text(int(entry["low"]), int(entry["high"]))
        if fmt.state_of(entry["tag"]) != fmt.LIVE or key != block.key:
            return
        runs = self._engine.lookup.runs(index.shard, block.slot, int(entry["nbytes"]))
        if runs is not None:
            data = DataFile(data_path(self._directory, index.shard))
            try:
                page_bytes = self._engine.geometry.page_bytes
                if not data.problem(block_at(entry, block.slot, runs, page_bytes)):
                    return
            finally:
                data.close()
        self._remove(index, file, block.slot)
        index.control["damaged"] += 1
        log.warning(
            "store %s: damaged block %s dropped from slot %d of shard %d",
            self._directory,
            block.key,
            block.slot,
            index.shard,
        )

    def _remove(self, index: ShardIndex, file: ShardFile, slot: int) -> None:
        # A record of another block may be right, where the entry is not.
        if same_block(index.entries[[slot]], file.records[[slot]])[0]:
            take_out(index, file, slot)
        else:
            index.remove(slot)
        index.control["removals"] += 1

    def _list_again(self, index: ShardIndex) -> None:
        """List blocks that the index has lost: their records and bytes are sound, and nobody has
        their slots or their key."""
        page_bytes = self._engine.geometry.page_bytes
        plan = plan_shard(self._directory, self._engine.geometry, index.shard, None).entries
        heads, several = blocks_in(plan, page_bytes)
        lost = heads[~same_block(plan[heads], index.entries[heads])].tolist()
        if not lost:
            return
        taken = np.zeros(len(plan), bool)
        for start, length in zip(*occupied_runs(index.entries), strict=True):
            taken[start : start + length] = True
        listed: set[tuple[int, int]] = set()
        data = DataFile(data_path(self._directory, index.shard))
        try:
            for slot in lost:
                key = int(plan["low"][slot]), int(plan["high"][slot])
                runs = runs_of(several, slot, plan["run"][slot])
                if key in listed or index.find(*key) is not None:
                    continue
                if any(taken[start : start + length].any() for start, length in runs):
                    continue
                if not data.problem(block_at(plan[slot], slot, runs, page_bytes)):
                    list_block(index, plan, runs)
                    listed.add(key)
        finally:
            data.close()
        if listed:
            index.put_in_order()
            log.warning(
                "store %s: %d blocks that the index of shard %d had lost are listed again",
                self._directory,
                len(listed),
                index.shard,
            )

    def _settle(self, index: ShardIndex, file: ShardFile) -> None:
        """Entries, chains, counters and free space; each slot has one owner afterwards."""
        wrong = [
            f for f in self._check(index, file).findings() if f.kind not in ("record", "stale")
        ]
        for finding in wrong:
            state = fmt.state_of(index.entries["tag"][finding.slot])
            if finding.kind == "leak" and state in (fmt.WRITING, fmt.HELD):
                index.give_back(finding.slot)
            elif finding.kind in ("twin", "place") and state == fmt.LIVE:
                self._remove(index, file, finding.slot)
        if wrong:
            index.put_in_order()

    def _write_record(self, index: ShardIndex, file: ShardFile, slot: int) -> None:
        entry = index.entries[slot]
        runs = self._engine.lookup.runs(index.shard, slot, int(entry["nbytes"]))
        if runs is not None:
            file.write_records([Written.of(entry, runs)])
