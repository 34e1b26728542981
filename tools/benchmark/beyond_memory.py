"""Who moves a store's worth in tools/bench_beyond_memory.py: the device itself, and a service."""

from __future__ import annotations

import argparse
import mmap
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from benchmark import extents
from benchmark.resident import write_out
from light_mem.engine.maps import private_memory

MIB = 1 << 20
PIECE = 8 * MIB
SHARDS = 4


class Plain:
    """The device by itself."""

    def __init__(self, directory: Path, nbytes: int, flags: int) -> None:
        self._path = directory / "plain"
        self._nbytes = nbytes - nbytes % PIECE
        self._files = sorted((directory / "store").glob("shard-*.data"))
        self._flags = flags
        self._buffer = private_memory(PIECE)
        self._buffer[:] = np.frombuffer(os.urandom(PIECE), np.uint8)
        if not self._path.exists():
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT)
            os.posix_fallocate(descriptor, 0, self._nbytes)
            os.close(descriptor)
            self.write()  # the first write of preallocated room is another work

    def write(self) -> tuple[float, int]:
        descriptor = os.open(self._path, os.O_WRONLY | self._flags)
        started = time.perf_counter()
        for at in range(0, self._nbytes, PIECE):
            if os.pwrite(descriptor, self._buffer, at) != PIECE:
                raise RuntimeError("a write was cut short")
        os.fdatasync(descriptor)
        taken = time.perf_counter() - started
        os.close(descriptor)
        return taken, self._nbytes

    def read(self) -> tuple[float, int]:
        total = 0
        started = time.perf_counter()
        for path in self._files:
            descriptor = os.open(path, os.O_RDONLY | self._flags)
            for at, length in extents.pieces(path, PIECE):
                whole = length + -length % mmap.PAGESIZE
                total += os.preadv(descriptor, [self._buffer[:whole]], at)
            os.close(descriptor)
        return time.perf_counter() - started, total


class Store:
    """A service on the store, and a KV tensor through whose halves all blocks go in turn."""

    def __init__(self, options: argparse.Namespace, policy: str, generation: int) -> None:
        import torch

        import light_mem

        self._wanted = light_mem.State.Finished
        pages = options.pages
        self._block = pages * options.page_bytes
        self._half = max(1, options.kv * MIB // self._block // 2)
        self._blocks = options.store // self._block
        kv = light_mem.allocate_kvcache(2 * self._half * pages, options.page_bytes)
        random = np.random.default_rng(0)
        for row in kv.numpy():
            row[:] = random.integers(0, 256, len(row), np.uint8)
        self._kv: torch.Tensor = kv
        self._rows = random.permutation(len(kv)).reshape(2 * self._half, pages)
        self._order = np.random.default_rng(generation)
        self._files = options.directory / "store"
        self.service = light_mem.LocalCacheService(
            self._files,
            # Hashes do not fall on the shards evenly, and a shard must hold a whole block.
            int(1.1 * options.store) + SHARDS * self._block,
            SHARDS,
            kv,
            options.workers,
            page_cache=policy,
        )
        self.service.run()

    def _hashes(self, generation: int) -> list[int]:
        return [(generation << 32) + n for n in range(self._blocks)]

    def _move(self, mode: str, parts: list[list[tuple[int, int]]]) -> int:
        """Move parts of (hash, place in the tensor), the even ones in one half of the tensor, the
        odd ones in the other: two tasks are in work at any time. Returns the bytes moved."""
        tasks: list[Any] = []
        moved = 0
        for part in parts:
            hashes = [key for key, _ in part]
            rows = self._rows[[at for _, at in part]].ravel()
            if len(tasks) == 2:
                moved += self._finished(tasks.pop(0))
            tasks.append(self.service.create(mode, hashes, rows))
        return moved + sum(map(self._finished, tasks))

    def _finished(self, task: Any) -> int:
        if not task.wait(600):
            raise RuntimeError("a task was not ready within ten minutes")
        blocks = len(task.state())
        if task.count(self._wanted) != blocks:
            raise RuntimeError(f"{blocks - task.count(self._wanted)} of {blocks} blocks aborted")
        return blocks * self._block

    def _parts(self, hashes: list[int]) -> list[list[tuple[int, int]]]:
        placed = [(key, n % (2 * self._half)) for n, key in enumerate(hashes)]
        return [placed[at : at + self._half] for at in range(0, len(placed), self._half)]

    def write(self, generation: int) -> tuple[float, int]:
        started = time.perf_counter()
        moved = self._move("write", self._parts(self._hashes(generation)))
        for path in sorted(self._files.glob("shard-*.data")):
            write_out(path, forget=False)
        return time.perf_counter() - started, moved

    def read(self, generation: int) -> tuple[float, int]:
        parts = self._parts(self._hashes(generation))
        stored = [self.service.query([key for key, _ in part]) for part in parts]
        kept = [
            [block for block, there in zip(part, found, strict=True) if there]
            for part, found in zip(parts, stored, strict=True)
        ]
        # Any order, as long as the halves of the tensor alternate.
        even, odd = kept[::2], kept[1::2]
        shuffled = []
        for n, m in zip(
            self._order.permutation(len(even)).tolist(),
            [*self._order.permutation(len(odd)).tolist(), *[-1] * (len(even) - len(odd))],
            strict=True,
        ):
            shuffled += [even[n], odd[m]] if m >= 0 else [even[n]]
        shuffled = [[part[n] for n in self._order.permutation(len(part))] for part in shuffled]
        before = self._digests()
        self._kv.zero_()
        started = time.perf_counter()
        moved = self._move("read", [part for part in shuffled if part])
        taken = time.perf_counter() - started
        touched = {at for part in kept for _, at in part}
        after = self._digests()
        if any(before[row] != after[row] for row in self._rows[sorted(touched)].ravel().tolist()):
            raise RuntimeError("other bytes came back than were written")
        return taken, moved

    def _digests(self) -> list[int]:
        return [xxhash.xxh3_64_intdigest(row.data) for row in self._kv.numpy()]

    def close(self) -> None:
        self.service.close()
