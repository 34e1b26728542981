"""Stores for the tests of the tools, ways to spoil them, and kills at any line of a call."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from light_mem import cli, maintenance
from light_mem.engine.base import Outcome
from light_mem.engine.local import LocalStorageEngine
from light_mem.index import file as index_file
from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.index.description import Geometry, load
from light_mem.index.file import IndexFile
from tests.engine_helpers import Block, Rig, open_local
from tests.opcodes import LIBRARY

PAGE = 512
SLOTS, SHARDS = 64, 2  # slots a shard
BLOCKS = [Block(1000 + n, n % 4 + 1) for n in range(20)]
FIRST_USE = 1_700_000_000 * 10**9


def opened(directory: Path, slots: int = SLOTS, shards: int = SHARDS) -> Rig:
    engine = open_local(directory, slots, page_bytes=PAGE, shards=shards, block_pages=4)
    return Rig(engine, PAGE)


def make_store(directory: Path, blocks: Sequence[Block] = BLOCKS, **sizes: int) -> Path:
    """A closed store of these blocks; the later in the list, the longer ago it was used."""
    rig = opened(directory, **sizes)
    assert all(outcomes[-1] is Outcome.STORED for outcomes in rig.write(*blocks))
    assert isinstance(rig.engine, LocalStorageEngine)
    for n, block in enumerate(reversed(blocks)):
        rig.engine.set_used(*keymath.as_key(block.key), FIRST_USE + n * 10**9)
    # The order of writing says nothing about that of use, and came before it.
    rig.engine.close()
    for shard in range(sizes.get("shards", SHARDS)):
        records = records_of(directory, shard)
        for slot in np.flatnonzero(records["tag"]).tolist():
            records["used"][slot] = FIRST_USE - 10**15 + int(records["low"][slot])
            reseal(records, slot)
    return directory


def geometry_of(directory: Path) -> Geometry:
    geometry = load(directory)
    assert geometry is not None
    return geometry


def index_of(directory: Path) -> IndexFile:
    """The index, mapped for writing."""
    return IndexFile(directory / index_file.NAME, geometry_of(directory))


def entries_of(directory: Path, shard: int) -> np.ndarray:
    file = index_of(directory)
    return file.of_shard(shard).entries


def records_of(directory: Path, shard: int) -> np.ndarray:
    """The records of a shard, mapped for writing."""
    path = directory / f"shard-{shard:03}.slots"
    slots = geometry_of(directory).slots
    return np.memmap(path, fmt.RECORD, "r+", fmt.SHARD_HEADER_BYTES, (slots,))


def reseal(records: np.ndarray, slot: int) -> None:
    from light_mem.index.recovery import record_crcs

    [records["crc"][slot]] = record_crcs(records[slot : slot + 1])


def place_of(directory: Path, block: Block) -> tuple[int, int]:
    """Shard and first slot of a stored block."""
    found = next(maintenance.blocks(directory, [block.key]))
    return found.shard, found.slot


def key_of(block: Block) -> str:
    return keymath.key_text(*keymath.as_key(block.key))


def flip(directory: Path, block: Block, at: int = 0) -> None:
    """Damage one byte of a block."""
    shard, slot = place_of(directory, block)
    with (directory / f"shard-{shard:03}.data").open("r+b") as file:
        file.seek(fmt.SHARD_HEADER_BYTES + slot * PAGE + at)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x40]))


def stored(directory: Path) -> set[str]:
    """Keys of the stored blocks."""
    return {block.key for block in maintenance.blocks(directory)}


def order_of_use(directory: Path) -> list[str]:
    """Keys of the stored blocks, the last used first."""
    found = sorted(maintenance.blocks(directory), key=lambda block: -block.used)
    return [block.key for block in found]


def assert_holds(directory: Path, *blocks: Block, **sizes: int) -> None:
    """A server that opens the store reads exactly these blocks, right to the last byte, in the
    order of use that `make_store` gave them."""
    assert order_of_use(directory) == [key_of(b) for b in blocks]
    assert_reads(directory, *blocks, **sizes)


def assert_reads(directory: Path, *blocks: Block, **sizes: int) -> None:
    """`assert_holds`, in whatever order of use."""
    assert stored(directory) == {key_of(b) for b in blocks}
    rig = opened(directory, **sizes)
    assert rig.read(*blocks) == [Outcome.LOADED] * len(blocks)
    rig.engine.close()


def files(directory: Path) -> dict[str, str]:
    """A digest of every file: whether anything was made, removed or changed."""
    return {
        str(path.relative_to(directory)): blake2b(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


class Command:
    """Runs `light-mem` and reads what it says."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: object) -> int:
        code = cli.main([str(a) for a in arguments])
        self.out, self.err = self._capsys.readouterr()
        return code

    def json(self, *arguments: object) -> tuple[int, Any]:
        code = self(*arguments, "--json")
        return code, json.loads(self.out)


# --- kills ----------------------------------------------------------------------------------------


def in_child(call: Callable[[], object], kill_at: int = 0) -> tuple[bool, int]:
    """Run a call in a child, which dies by SIGKILL at that line of the library; 0: never.

    Returns whether it was killed, and how many lines it ran otherwise. A fork, for it is 50 times
    faster than a new process; the tools need nothing that a fork takes away.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads of pytest
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = _count_lines(call, kill_at, writing)
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True, 0
    assert os.WEXITSTATUS(status) == 0, "the call failed in the child"
    return False, int(said)


def _count_lines(call: Callable[[], object], kill_at: int, writing: int) -> int:
    lines = 0

    def look(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if event == "line":
            lines += 1
            if lines == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return look

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        return look if frame.f_code.co_filename.startswith(LIBRARY) else None

    sys.settrace(enter)
    call()
    sys.settrace(None)
    os.write(writing, str(lines).encode())
    return 0


def kill_points(lines: int, count: int, seed: int = 0) -> list[int]:
    """Lines at which to kill, spread over a call of so many."""
    return sorted(random.Random(seed).sample(range(1, lines + 1), min(count, lines)))
