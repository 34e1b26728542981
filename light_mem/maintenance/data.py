"""Whether the bytes of blocks fit their checksums: every block read, by several threads.

Threads serve because `pread` and xxh3 let go of the interpreter while they work; processes would
run a server's `__main__` again. Blocks are read in the order of their place, neighbours together,
in pieces that stay in a core's cache between the read and the checksum.

No lock is held. A block that does not fit is looked up again: only when its entry has not changed
and a second reading does not fit either is it damaged; else it was taken out meanwhile.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event
from typing import NamedTuple

import numpy as np
import xxhash

from light_mem.engine import shard_file
from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.index.recovery import Ints, Table
from light_mem.maintenance.report import DamagedBlock
from light_mem.maintenance.store import Store, as_words, blocks_in

PIECE_BYTES = 1 << 20
GAP_BYTES = 64 << 10  # reading over a smaller gap is cheaper than another call
UNIT_BYTES = 256 << 20  # what one thread takes at a time, and how many blocks of it
UNIT_BLOCKS = 1 << 15
MAX_JOBS = 8
_POLL_SECONDS = 0.1

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


class DataReport(NamedTuple):
    """What a reading of blocks found; sizes in bytes."""

    blocks: int
    nbytes: int
    changed: int
    damaged: list[DamagedBlock]


class Extents(NamedTuple):
    """One block and where its bytes lie: (offset, length) in the data file, in their order."""

    slot: int
    key: bytes
    checksum: int
    pieces: list[tuple[int, int]]


def block_at(
    entry: np.void, slot: int, runs: Sequence[tuple[int, int]], page_bytes: int
) -> Extents:
    """The block of an entry in these runs."""
    left = int(entry["nbytes"])
    pieces = []
    for start, length in runs:
        size = min(left, length * page_bytes)
        pieces.append((fmt.SHARD_HEADER_BYTES + start * page_bytes, size))
        left -= size
    key = keymath.key_bytes(int(entry["low"]), int(entry["high"]))
    return Extents(slot, key, int(entry["checksum"]), pieces)


class DataFile:
    """A shard's data file, read only; one reader a thread."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._buffer = memoryview(bytearray(PIECE_BYTES))

    def read(self, at: int, size: int) -> memoryview:
        """At most PIECE_BYTES from `at` on, fewer at the end of the file; good until the next
        read. Raises OSError."""
        done = 0
        while done < size:
            count = os.preadv(self._descriptor, [self._buffer[done:size]], at + done)
            if not count:
                break
            done += count
        return self._buffer[:done]

    def problem(self, block: Extents) -> str:
        """Why the block's bytes are not those that were written; "" when they are."""
        return self._digest(block, lambda chunk: None)

    def load(self, block: Extents) -> tuple[bytes, str]:
        """The block's bytes, and why they are not those that were written; "" when they are."""
        data = bytearray()
        problem = self._digest(block, data.extend)
        return bytes(data), problem

    def _digest(self, block: Extents, take: Callable[[memoryview], None]) -> str:
        checksum = xxhash.xxh3_64(block.key)
        length = 0
        try:
            for at, size in block.pieces:
                for part in range(0, size, PIECE_BYTES):
                    chunk = self.read(at + part, min(PIECE_BYTES, size - part))
                    checksum.update(chunk)
                    take(chunk)
                    length += len(chunk)
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        wanted = sum(size for _, size in block.pieces)
        if length < wanted:
            return f"the file ends {wanted - length} bytes before its end"
        return "" if checksum.intdigest() == block.checksum else "its bytes do not fit its checksum"

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._descriptor)


class _Unit(NamedTuple):
    """Blocks of one shard that one thread reads, by place."""

    shard: int
    heads: Ints  # first slots
    rows: Table  # their entries, ENTRY [n]
    runs: list[list[tuple[int, int]]] | None  # of each; None: each lies in one run

    def block(self, n: int, page_bytes: int) -> Extents:
        """The n-th block and where it lies."""
        slot, entry = int(self.heads[n]), self.rows[n]
        runs = [(slot, int(entry["run"]))] if self.runs is None else self.runs[n]
        return block_at(entry, slot, runs, page_bytes)


class DataCheck:
    """A check of blocks of a store; `run` once."""

    def __init__(self, store: Store, jobs: int | None = None) -> None:
        """`jobs` threads read, by default one a core, at most 8."""
        self._store = store
        self._page = store.geometry.page_bytes
        self._jobs = jobs or min(MAX_JOBS, os.cpu_count() or 1)
        self._units: list[_Unit] = []
        self._done: list[int] = []  # bytes, one a unit, each stored by one thread
        self._stop = Event()
        self.blocks = 0
        self.nbytes = 0

    def add(self, shard: int, table: Table) -> None:
        """Plan to read the blocks that these entries list; keeps nothing of the others."""
        heads, several = blocks_in(table, self._page)
        rows = as_words(table)[heads].view(fmt.ENTRY).reshape(-1)  # ten times faster than entries
        self.blocks += len(heads)
        self.nbytes += int(rows["nbytes"].sum())
        if several:
            far = np.isin(heads, list(several))
            runs = [several[slot] for slot in heads[far].tolist()]
            self._units.append(_Unit(shard, heads[far], rows[far], runs))
            heads, rows = heads[~far], rows[~far]
        if not len(heads):
            return
        per_unit = max(1, min(UNIT_BLOCKS, UNIT_BYTES // max(1, int(rows["nbytes"].mean()))))
        for first in range(0, len(heads), per_unit):
            part = slice(first, first + per_unit)
            self._units.append(_Unit(shard, heads[part], rows[part], None))

    def run(self, progress: Progress | None = None) -> DataReport:
        """Read it all. `progress` is called in this thread, some ten times a second."""
        self._done = [0] * len(self._units)
        damaged: list[DamagedBlock] = []
        changed = 0
        with ThreadPoolExecutor(self._jobs, "light-mem-verify") as pool:
            try:
                pending = {pool.submit(self._read, n) for n in range(len(self._units))}
                while pending:
                    done, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
                    for future in done:
                        found, moved = future.result()
                        damaged += found
                        changed += moved
                    if progress is not None:
                        progress(sum(self._done), self.nbytes)
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        self._store.require_unchanged()
        damaged.sort(key=lambda block: (block.shard, block.slot))
        return DataReport(self.blocks - changed, self.nbytes, changed, damaged)

    def _read(self, number: int) -> tuple[list[DamagedBlock], int]:
        unit = self._units[number]
        try:
            file = DataFile(shard_file.data_path(self._store.directory, unit.shard))
        except FileNotFoundError:
            numbers = range(len(unit.heads))
            return [self._damaged(unit, n, "its file is missing") for n in numbers], 0
        try:
            read = self._read_neighbours if unit.runs is None else self._read_one_by_one
            return self._confirm(unit, read(number, unit, file), file)
        finally:
            file.close()

    def _read_neighbours(self, number: int, unit: _Unit, file: DataFile) -> list[int]:
        """The blocks that do not fit, by number in the unit; each lies in one run."""
        sizes: list[int] = unit.rows["nbytes"].tolist()
        sums: list[int] = unit.rows["checksum"].tolist()
        raw = as_words(unit.rows)[:, :2].tobytes()  # low and high: the keys' bytes
        first = fmt.SHARD_HEADER_BYTES + unit.heads * self._page
        end = first + unit.rows["nbytes"].astype(np.int64)
        breaks = np.flatnonzero(first[1:] - end[:-1] > GAP_BYTES) + 1
        stops = [*breaks.tolist(), len(sizes)]
        offsets, ends = first.tolist(), end.tolist()
        digest = xxhash.xxh3_64
        suspects: list[int] = []
        at = 0
        while at < len(sizes) and not self._stop.is_set():
            start = offsets[at]
            until = stops[bisect_right(stops, at)]
            until = max(at + 1, bisect_right(ends, start + PIECE_BYTES, at, until))
            size = ends[until - 1] - start
            try:
                piece = file.read(start, size if size <= PIECE_BYTES else 0)
            except OSError:
                piece = file.read(start, 0)  # one by one: only some of them may be unreadable
            failed = []
            for n in range(at, until):
                here = offsets[n] - start
                checksum = digest(raw[16 * n : 16 * n + 16])
                checksum.update(piece[here : here + sizes[n]])
                if checksum.intdigest() != sums[n]:
                    failed.append(n)
            suspects += [n for n in failed if file.problem(unit.block(n, self._page))]
            self._done[number] += sum(sizes[at:until])
            at = until
        return suspects

    def _read_one_by_one(self, number: int, unit: _Unit, file: DataFile) -> list[int]:
        """The blocks that do not fit; they lie in several runs each."""
        suspects: list[int] = []
        for n in range(len(unit.heads)):
            if self._stop.is_set():
                break
            if file.problem(unit.block(n, self._page)):
                suspects.append(n)
            self._done[number] += int(unit.rows["nbytes"][n])
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
