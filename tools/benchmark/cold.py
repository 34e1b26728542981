"""Plain sequential reads of a store's data files that are not in the page cache: of every slot that
was ever written."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmark import extents
from benchmark.machine import forget
from light_mem.engine.maps import private_memory

__all__ = ["forget", "size", "ways"]

_PIECE = 8 << 20
_POPULATE_READ = 22  # MADV_POPULATE_READ; Python has no name for it yet


def _files(directory: Path) -> list[Path]:
    return sorted((directory / "store").glob("shard-*.data"))


def size(directory: Path) -> int:
    """Bytes of all data files that were ever written."""
    return sum(length for path in _files(directory) for _, length in extents.pieces(path, _PIECE))


def ways(directory: Path) -> dict[str, Callable[[], float]]:
    """Each way reads what was written of the data files once, and answers with its seconds."""
    files = _files(directory)
    return {
        "preadv of 8 MiB": lambda: _threads(files, 1, 0),
        "mmap, populated": lambda: _mapped(files),
        "O_DIRECT, 1 thread": lambda: _threads(files, 1, os.O_DIRECT),
        "O_DIRECT, 2 threads": lambda: _threads(files, 2, os.O_DIRECT),
        "O_DIRECT, 4 threads": lambda: _threads(files, 4, os.O_DIRECT),
    }


def _threads(files: list[Path], count: int, flags: int) -> float:
    parts = [(path, *piece) for path in files for piece in extents.pieces(path, _PIECE)]
    failed: list[BaseException] = []

    def read(number: int) -> None:
        buffer = private_memory(_PIECE)
        try:
            for path, at, length in parts[
                number * len(parts) // count : (number + 1) * len(parts) // count
            ]:
                descriptor = os.open(path, os.O_RDONLY | flags)
                try:
                    os.preadv(descriptor, [buffer[: length + -length % mmap.PAGESIZE]], at)
                finally:
                    os.close(descriptor)
        except BaseException as err:
            failed.append(err)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(count)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return time.perf_counter() - started


def _mapped(files: list[Path]) -> float:
    started = time.perf_counter()
    buffer = np.empty(_PIECE, np.uint8)
    for path in files:
        with path.open("rb") as file:
            length = path.stat().st_size
            with mmap.mmap(file.fileno(), length, prot=mmap.PROT_READ) as mapping:
                for at, count in extents.pieces(path, _PIECE):
                    try:
                        mapping.madvise(_POPULATE_READ, at, count)
                    except OSError:
                        pass  # an old kernel: the copy faults the pages in
                    piece = np.frombuffer(mapping, np.uint8, count, at)
                    buffer[:count] = piece
                    del piece
    return time.perf_counter() - started
