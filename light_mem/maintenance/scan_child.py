"""The process that reads small blocks for a check: one unit of them after the other.

A unit comes as a HEADER on the standard input, the data file's path behind it, and its `Batch` in
a memory file. On the standard output go ANSWERs: bytes done from time to time, each block that
does not fit, and the end. It imports neither numpy nor torch, and so starts in some 30 ms.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

from light_mem.engine.program import die_with
from light_mem.maintenance.data_file import DataFile
from light_mem.maintenance.scanning import Batch, Scanner

HEADER = struct.Struct("<IIQ")  # bytes of the path, blocks, bytes of the stretches
ANSWER = struct.Struct("<BQ")  # kind, number
DONE_BYTES, FAILED_BLOCK, END = range(3)
TELL_BYTES = 4 << 20


def main(config: dict[str, Any]) -> None:
    """Scan until the parent closes the input."""
    try:
        die_with(config["parent"])
    except ProcessLookupError:
        return
    scanner = Scanner()
    while True:
        header = _take(HEADER.size)
        if not header:
            return
        path_bytes, blocks, stretch_bytes = HEADER.unpack(header)
        path = Path(os.fsdecode(_take(path_bytes)))
        memory = config["memory"]
        column = 8 * blocks
        batch = Batch(
            os.pread(memory, column, 0),
            os.pread(memory, column, column),
            os.pread(memory, column, 2 * column),
            os.pread(memory, stretch_bytes, 3 * column),
        )
        file = DataFile(path)
        try:
            _answer(scanner, file, batch)
        finally:
            file.close()


def _answer(scanner: Scanner, file: DataFile, batch: Batch) -> None:
    done = 0

    def told(count: int) -> None:
        nonlocal done
        done += count
        if done >= TELL_BYTES:
            os.write(1, ANSWER.pack(DONE_BYTES, done))
            done = 0

    failed = scanner.scan(file, batch, told, lambda: False)
    answers = [ANSWER.pack(FAILED_BLOCK, n) for n in failed]
    answers += [ANSWER.pack(DONE_BYTES, done), ANSWER.pack(END, 0)]
    view = memoryview(b"".join(answers))
    while view:
        view = view[os.write(1, view) :]


def _take(size: int) -> bytes:
    """So many bytes of the input; fewer at its end."""
    data = b""
    while len(data) < size:
        part = os.read(0, size - len(data))
        if not part:
            break
        data += part
    return data
