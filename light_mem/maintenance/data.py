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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event
from typing import NamedTuple

import numpy as np
import xxhash

from light_mem.engine import shard_file
from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.index.recovery import Table
from light_mem.maintenance.report import DamagedBlock
from light_mem.maintenance.store import Store, as_words, blocks_in

PIECE_BYTES = 1 << 20
GAP_BYTES = 64 << 10  # reading over a smaller gap is cheaper than another call
UNIT_BYTES = 256 << 20  # what one thread takes at a time, and how many blocks of it
UNIT_BLOCKS = 1 << 15
MAX_JOBS = 8
_POLL_SECONDS = 0.1
_CHECKSUM, _NBYTES = (fmt.ENTRY.fields[f][1] // 8 for f in ("checksum", "nbytes"))  # type: ignore[index]

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
    """Blocks of one shard that one thread reads: those in one run, by place, then the others."""

    shard: int
    table: Table
    heads: list[int]
    several: list[tuple[int, list[tuple[int, int]]]]


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
        """Plan to read the blocks that these entries list."""
        heads, several = blocks_in(table, self._page)
        self.blocks += len(heads)
        self.nbytes += int(table["nbytes"][heads].sum())
        single = heads[~np.isin(heads, list(several))] if several else heads
        per_unit = UNIT_BLOCKS
        if len(single):
            mean = max(1, int(table["nbytes"][single].mean()))
            per_unit = max(1, min(UNIT_BLOCKS, UNIT_BYTES // mean))
        for first in range(0, len(single), per_unit):
            part = single[first : first + per_unit].tolist()
            self._units.append(_Unit(shard, table, part, []))
        if several:
            self._units.append(_Unit(shard, table, [], list(several.items())))

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
            slots = unit.heads + [slot for slot, _ in unit.several]
            return [_damaged(unit, slot, "its file is missing") for slot in slots], 0
        try:
            suspects = [*self._read_neighbours(number, file), *self._read_runs(number, file)]
            return self._confirm(unit, suspects, file)
        finally:
            file.close()

    def _read_neighbours(self, number: int, file: DataFile) -> Iterator[Extents]:
        """The blocks of one run that do not fit."""
        unit, page = self._units[number], self._page
        heads = np.array(unit.heads, np.int64)
        rows = as_words(unit.table)[heads]  # gathering words is ten times faster than entries
        sizes: list[int] = rows[:, _NBYTES].tolist()
        sums: list[int] = rows[:, _CHECKSUM].tolist()
        raw = rows[:, :2].tobytes()  # low and high: the keys' bytes
        first = fmt.SHARD_HEADER_BYTES + heads * page
        end = first + rows[:, _NBYTES].astype(np.int64)
        breaks = [*(np.flatnonzero(first[1:] - end[:-1] > GAP_BYTES) + 1).tolist(), len(heads)]
        offsets, ends = first.tolist(), end.tolist()
        digest = xxhash.xxh3_64
        at = 0
        while at < len(sizes) and not self._stop.is_set():
            start = offsets[at]
            until = breaks[bisect_right(breaks, at)]
            until = max(at + 1, bisect_right(ends, start + PIECE_BYTES, at, until))
            size = ends[until - 1] - start
            try:
                piece = file.read(start, size) if size <= PIECE_BYTES else file.read(start, 0)
            except OSError:
                piece = file.read(start, 0)  # one by one: only some of them may be unreadable
            suspects = []
            for n in range(at, until):
                here = offsets[n] - start
                checksum = digest(raw[16 * n : 16 * n + 16])
                checksum.update(piece[here : here + sizes[n]])
                if checksum.intdigest() != sums[n]:
                    suspects.append(n)
            for n in suspects:
                slot = unit.heads[n]
                block = block_at(unit.table[slot], slot, [(slot, -(-sizes[n] // page))], page)
                if file.problem(block):
                    yield block
            self._done[number] += sum(sizes[at:until])
            at = until

    def _read_runs(self, number: int, file: DataFile) -> Iterator[Extents]:
        """The blocks of several runs that do not fit."""
        unit = self._units[number]
        for slot, runs in unit.several:
            if self._stop.is_set():
                return
            block = block_at(unit.table[slot], slot, runs, self._page)
            if file.problem(block):
                yield block
            self._done[number] += sum(size for _, size in block.pieces)

    def _confirm(
        self, unit: _Unit, suspects: list[Extents], file: DataFile
    ) -> tuple[list[DamagedBlock], int]:
        damaged: list[DamagedBlock] = []
        changed = 0
        for block in suspects:
            problem = file.problem(block)
            if not self._store.still_lists(unit.shard, block.slot, unit.table[block.slot]):
                changed += 1
            elif problem:
                damaged.append(_damaged(unit, block.slot, problem))
        return damaged, changed


def _damaged(unit: _Unit, slot: int, problem: str) -> DamagedBlock:
    entry = unit.table[slot]
    key = keymath.key_text(int(entry["low"]), int(entry["high"]))
    return DamagedBlock(key, unit.shard, slot, int(entry["nbytes"]), problem)
