"""What every contestant is to the suite."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from benchmark.plan import Plan

Bytes = npt.NDArray[np.uint8]
Pages = npt.NDArray[np.int64]


class NotInstalledError(Exception):
    """A contestant's package is not there."""


@dataclass
class Setup:
    """What a process of a contestant is given.

    memory     the KV tensor, [pages, page bytes], shared with all other processes
    directory  where it may store
    workers    threads or processes that a contestant has in all
    share      this is process number `share` of `shares`, each with its own blocks
    """

    memory: Bytes
    directory: Path
    plan: Plan
    workers: int
    share: int
    shares: int
    options: dict[str, Any]


class Rival(ABC):
    """Moves blocks between the pages of the tensor and its store.

    The copy between pages and whatever buffer it needs is part of the work. One pass has every
    block once; `write` returns when all may be read, `read` when all bytes are in the pages.
    """

    name: ClassVar[str]
    package: ClassVar[str] = ""  # its distribution, for the version
    how: ClassVar[str]  # processes or threads; overwritten in place, or new files
    lacks: ClassVar[str]
    one_process_each: ClassVar[bool] = True  # False: one process with threads of its own
    evicts: ClassVar[bool] = False  # False: the suite deletes what is replaced, untimed
    persistent: ClassVar[bool] = True  # can be closed and opened again
    spins: ClassVar[bool] = False  # uses the CPU while idle
    # Its slots are written over. So it has as many passes before the first sample as LightMem, and
    # the work "write, clean slots".
    in_place: ClassVar[bool] = False

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.memory = setup.memory
        self.directory = setup.directory
        self.open()

    @classmethod
    def environment(cls, plan: Plan) -> dict[str, str]:
        """Environment variables of its processes."""
        return {}

    @classmethod
    def moved_bytes(cls, plan: Plan) -> int:
        """Bytes that it moves to write or read a block."""
        return plan.shape.block_bytes

    def hashes(self, generations: Pages, blocks: Pages) -> list[Any]:
        """A hash a block that no other generation has."""
        return [
            f"{g:016x}{b:016x}" for g, b in zip(generations.tolist(), blocks.tolist(), strict=True)
        ]

    @abstractmethod
    def open(self) -> None:
        """Make the store, or open it again. Raises NotInstalledError."""

    @abstractmethod
    def write(self, hashes: list[Any], pages: Pages) -> None:
        """Store blocks: pages has shape [hashes, pages of a block]."""

    @abstractmethod
    def read(self, hashes: list[Any], pages: Pages) -> None:
        """Fill pages with the blocks of these hashes."""

    def write_passes(self, passes: Iterable[list[Any]], pages: Pages) -> None:
        """`write`, several times: of each pass the hashes."""
        for hashes in passes:
            self.write(hashes, pages)

    def read_passes(self, hashes: list[Any], pages: Pages, passes: int) -> None:
        """`read`, several times."""
        for _ in range(passes):
            self.read(hashes, pages)

    def delete(self, hashes: list[Any]) -> None:  # noqa: B027 (nothing to do for most)
        """Take blocks out of the store."""

    def keep(self, hashes: list[Any]) -> None:  # noqa: B027 (most cannot)
        """Have blocks that are stored stay, whatever is written, if it can."""

    def mixed(self, old: list[Any], into: Pages, new: list[Any], pages: Pages) -> None:
        """Read `old` and write `new`; here in turns, a tenth of each."""
        for part in range(10):
            mine = slice(len(old) * part // 10, len(old) * (part + 1) // 10)
            self.read(old[mine], into[mine])
            mine = slice(len(new) * part // 10, len(new) * (part + 1) // 10)
            self.write(new[mine], pages[mine])

    def check(self) -> dict[str, Any]:
        """What the store says of itself."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Stop; what is stored stays."""


def gather(memory: Bytes, rows: Pages, out: Bytes) -> None:
    """Copy pages of the tensor to `out`, [pages, page bytes]."""
    np.take(memory, rows, axis=0, out=out, mode="clip")


def page_aligned(nbytes: int) -> Bytes:
    """Private memory on a page boundary.

    numpy's own arrays begin 16 bytes behind one, which slows copies of whole pages down (4 KiB
    aliasing): that would flatter whoever is compared with them.
    """
    import mmap

    memory = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    memory[:] = 1
    return memory
