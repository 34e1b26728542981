"""Whether the bytes of blocks fit their checksums: every block read, by several threads.

Large blocks are read by the threads themselves: `pread` and xxh3 let go of the interpreter while
they work. Small ones keep it busy instead, so where there are many each thread hands its units of
them to a process of its own (`scan_process.py`). Reading begins with the first shard that is
added, while the structure of the next one is looked at.

No lock is held. A block that does not fit is looked up again: only when its entry has not changed
and a second reading does not fit either is it damaged; else it was taken out meanwhile.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np

from light_mem.closing import Closing
from light_mem.engine import shard_header
from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.index.recovery import Ints, Table
from light_mem.index.runs import Run, cut_at_runs
from light_mem.maintenance.data_file import DataFile, Extents
from light_mem.maintenance.report import DamagedBlock
from light_mem.maintenance.scan_process import ScanProcess
from light_mem.maintenance.scanning import Batch, Scanner
from light_mem.maintenance.store import Store, as_words, blocks_in

log = logging.getLogger("light_mem")

UNIT_BYTES = 64 << 20  # what one thread takes at a time, and how many blocks of it
UNIT_BLOCKS = 1 << 16
MAX_JOBS = 8
SMALL_BYTES = 32 << 10
PROCESS_BLOCKS = 1 << 18
_POLL_SECONDS = 0.1

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


class DataReport(NamedTuple):
    """What a reading of blocks found; sizes in bytes."""

    blocks: int
    nbytes: int
    changed: int
    damaged: list[DamagedBlock]


def block_at(entry: np.void, slot: int, runs: Sequence[Run], page_bytes: int) -> Extents:
    """The block of an entry in these runs."""
    pieces = [
        (fmt.SHARD_HEADER_BYTES + first * page_bytes, end - start)
        for (first, _), start, end in cut_at_runs(runs, int(entry["nbytes"]), page_bytes)
    ]
    key = keymath.key_bytes(int(entry["low"]), int(entry["high"]))
    return Extents(slot, key, int(entry["checksum"]), pieces)


def _rows(table: Table, heads: Ints) -> Table:
    """The entries at these slots; keeps no more than twice their number."""
    if len(heads) and heads[-1] - heads[0] == len(heads) - 1 and 2 * len(heads) >= len(table):
        return table[heads[0] : heads[-1] + 1]
    return as_words(table)[heads].view(fmt.ENTRY).reshape(-1)  # ten times faster than entries


class _Unit(NamedTuple):
    """Blocks of one shard that one thread reads, by place."""

    number: int
    shard: int
    heads: Ints  # first slots
    rows: Table  # their entries, ENTRY [n]
    runs: list[list[Run]] | None  # of each; None: each lies in one run
    apart: bool  # to be read by a process

    def block(self, n: int, page_bytes: int) -> Extents:
        """The n-th block and where it lies."""
        slot, entry = int(self.heads[n]), self.rows[n]
        runs = [(slot, int(entry["run"]))] if self.runs is None else self.runs[n]
        return block_at(entry, slot, runs, page_bytes)

    def batch(self, page_bytes: int) -> Batch:
        """The blocks, each in one run, as a `Scanner` takes them."""
        sizes = self.rows["nbytes"].astype(np.int64)
        offsets = fmt.SHARD_HEADER_BYTES + self.heads * page_bytes
        apart = (offsets[1:] != offsets[:-1] + sizes[:-1]) | (sizes[1:] != sizes[:-1])
        first = np.concatenate([[0], np.flatnonzero(apart) + 1])
        count = np.diff(first, append=len(sizes))
        stretches = np.stack([first, count, offsets[first], sizes[first]], axis=1)
        return Batch(
            self.rows["low"].tobytes(),
            self.rows["high"].tobytes(),
            self.rows["checksum"].astype(">u8").tobytes(),
            stretches.astype(np.int64).tobytes(),
        )


class DataCheck(Closing):
    """A check of blocks of a store: `add` what to read, then `run`, once. Its threads and
    processes end with the `with` block, however that is left."""

    def __init__(self, store: Store, jobs: int | None = None) -> None:
        """`jobs` threads or processes read, by default one a core, at most 8."""
        self._store = store
        self._page = store.geometry.page_bytes
        self._jobs = jobs or min(MAX_JOBS, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self._jobs, "light-mem-verify")
        self._pending: set[Future[tuple[list[DamagedBlock], int]]] = set()
        self._done: list[int] = []  # bytes, one a unit, each stored by one thread
        self._own = threading.local()  # each thread's Scanner and ScanProcess
        self._processes: list[ScanProcess] = []
        self._starting = threading.Lock()
        self._stop = threading.Event()
        self.blocks = 0
        self.nbytes = 0

    def close(self) -> None:
        """End the threads and processes, whatever they are at."""
        with self._starting:
            self._stop.set()
            for process in self._processes:
                process.kill()
        self._pool.shutdown(cancel_futures=True)
        for process in self._processes:
            process.close()

    def add(self, shard: int, table: Table) -> None:
        """Begin to read the blocks that these entries list; keeps nothing of the others."""
        heads, several = blocks_in(table, self._page)
        rows = _rows(table, heads)
        self.blocks += len(heads)
        self.nbytes += int(rows["nbytes"].sum())
        if several:
            far = np.isin(heads, list(several))
            runs = [several[slot] for slot in heads[far].tolist()]
            self._submit(shard, heads[far], rows[far], runs, False)
            heads, rows = heads[~far], rows[~far]
        if not len(heads):
            return
        size = max(1, int(rows["nbytes"].mean()))
        apart = self._apart(len(heads), size)
        per_unit = max(1, min(UNIT_BLOCKS, UNIT_BYTES // size))
        for first in range(0, len(heads), per_unit):
            part = slice(first, first + per_unit)
            self._submit(shard, heads[part], rows[part], None, apart)

    def _apart(self, blocks: int, size: int) -> bool:
        # Two processes cost some 60 ms to start. Measured on two cores, threads / processes: 139 /
        # 164 ms for 131,072 blocks of 4 KiB, 282 / 278 for 262,144, 553 / 483 for 524,288; blocks
        # of 64 KiB gain nothing, 280 / 303 ms for 2 GiB.
        in_all = blocks * self._store.geometry.shards  # keys are spread evenly
        return self._jobs > 1 and size < SMALL_BYTES and in_all >= PROCESS_BLOCKS

    def _submit(
        self,
        shard: int,
        heads: Ints,
        rows: Table,
        runs: list[list[Run]] | None,
        apart: bool,
    ) -> None:
        unit = _Unit(len(self._done), shard, heads, rows, runs, apart)
        self._done.append(0)
        self._pending.add(self._pool.submit(self._read, unit))

    def run(self, progress: Progress | None = None) -> DataReport:
        """Read it all. `progress` is called in this thread, some ten times a second."""
        damaged: list[DamagedBlock] = []
        changed = 0
        pending = self._pending
        while pending:
            done, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
            for future in done:
                found, moved = future.result()
                damaged += found
                changed += moved
            if progress is not None:
                progress(sum(self._done), self.nbytes)
        self._store.require_unchanged()
        damaged.sort(key=lambda block: (block.shard, block.slot))
        return DataReport(self.blocks - changed, self.nbytes, changed, damaged)

    # --- in a thread of the pool -----------------------------------------------------------------

    def _read(self, unit: _Unit) -> tuple[list[DamagedBlock], int]:
        try:
            file = DataFile(shard_header.data_path(self._store.directory, unit.shard))
        except FileNotFoundError:
            numbers = range(len(unit.heads))
            return [self._damaged(unit, n, "its file is missing") for n in numbers], 0
        try:
            if unit.runs is not None:
                return self._confirm(unit, self._read_one_by_one(unit, file), file)
            failed = self._scan(unit, file)
            suspects = [n for n in failed if file.problem(unit.block(n, self._page))]
            return self._confirm(unit, suspects, file)
        finally:
            file.close()

    def _scan(self, unit: _Unit, file: DataFile) -> list[int]:
        """The blocks that do not fit, by number in the unit; each lies in one run."""

        def told(nbytes: int) -> None:
            self._done[unit.number] += nbytes

        batch = unit.batch(self._page)
        process = self._process() if unit.apart else None
        if process is not None:
            path = shard_header.data_path(self._store.directory, unit.shard)
            failed = process.scan(path, batch, told)
            if failed is not None:
                return failed
            self._own.process = None
            if not self._stop.is_set():
                log.warning("verify: reading process %d died; a thread goes on", process.pid)
            self._done[unit.number] = 0
        if not hasattr(self._own, "scanner"):
            self._own.scanner = Scanner()
        scanner: Scanner = self._own.scanner
        return scanner.scan(file, batch, told, self._stop.is_set)

    def _process(self) -> ScanProcess | None:
        """This thread's process; None when it died or could not be started."""
        if not hasattr(self._own, "process"):
            self._own.process = None
            with self._starting:
                if self._stop.is_set():
                    return None
                try:
                    self._own.process = ScanProcess()
                except OSError as error:  # no more processes or descriptors
                    log.warning("verify: no process to read with: %s", str(error))
                    return None
                self._processes.append(self._own.process)
        process: ScanProcess | None = self._own.process
        return process

    def _read_one_by_one(self, unit: _Unit, file: DataFile) -> list[int]:
        """The blocks that do not fit; they lie in several runs each."""
        suspects: list[int] = []
        for n in range(len(unit.heads)):
            if self._stop.is_set():
                break
            if file.problem(unit.block(n, self._page)):
                suspects.append(n)
            self._done[unit.number] += int(unit.rows["nbytes"][n])
        return suspects

    def _confirm(
        self, unit: _Unit, suspects: list[int], file: DataFile
    ) -> tuple[list[DamagedBlock], int]:
        damaged: list[DamagedBlock] = []
        changed = 0
        for n in suspects:
            problem = file.problem(unit.block(n, self._page))
            if not self._store.still_lists(unit.shard, int(unit.heads[n]), unit.rows[n]):
                changed += 1
            elif problem:
                damaged.append(self._damaged(unit, n, problem))
        return damaged, changed

    @staticmethod
    def _damaged(unit: _Unit, n: int, problem: str) -> DamagedBlock:
        entry = unit.rows[n]
        key = keymath.key_text(int(entry["low"]), int(entry["high"]))
        return DamagedBlock(key, unit.shard, int(unit.heads[n]), int(entry["nbytes"]), problem)
