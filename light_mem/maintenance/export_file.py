"""Reads an export file that may be damaged anywhere: every whole block in it is found.

A block whose bytes do not fit is told and passed over. Where a header is damaged the reader looks,
64 bytes by 64, for the next part whose crc fits. The trailer says whether anything was lost
without a trace.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from light_mem.errors import InvalidArgumentError, StoreFormatError
from light_mem.index import keys as keymath
from light_mem.maintenance import transfer_format as fmt
from light_mem.maintenance.report import DamagedBlock

_SCAN_BYTES = 1 << 20


class ExportedBlock(NamedTuple):
    """A whole block of an export."""

    low: int
    high: int
    used: int
    keep: int
    data: bytes
    end: int  # offset in the file behind it


class ExportFile:
    """One export file, read once from front to back. One thread."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises FileNotFoundError, StoreFormatError (not an export of this version),
        InvalidArgumentError (a pipe, a device)."""
        self.path = Path(path)
        self.damaged: list[DamagedBlock] = []
        self.problems: list[str] = []
        self._file = self.path.open("rb")
        try:
            status = os.fstat(self._file.fileno())
            if not stat.S_ISREG(status.st_mode):  # what it holds would seem to be cut short
                raise InvalidArgumentError(
                    f"{self.path} is no file, but a pipe or a device: an import reads a file",
                    file=str(self.path),
                )
            self.size = status.st_size
            self.header = self._read_header()
        except BaseException:
            self._file.close()
            raise
        self.page_bytes = int(self.header["page_bytes"])

    def _read_header(self) -> np.void:
        raw = self._file.read(fmt.ALIGN)
        sound = fmt.is_sealed(raw, fmt.EXPORT_HEADER)
        header = np.frombuffer(raw.ljust(fmt.ALIGN, b"\0"), fmt.EXPORT_HEADER)[0]
        version = int(header["version"])
        if not sound or bytes(header["magic"]) != fmt.EXPORT_MAGIC:
            found, expected = "other bytes", "the header of an export"
            what = "is no export, or its header is damaged"
        elif version not in fmt.READABLE_VERSIONS:
            found, expected = str(version), " or ".join(map(str, fmt.READABLE_VERSIONS))
            what = f"has format version {version}, this library reads {expected}"
        elif not header["page_bytes"]:
            found, expected = "0", "1 or more"
            what = "says that a page has 0 bytes"
        else:
            whole: np.void = header
            return whole
        raise StoreFormatError(
            f"{self.path} {what}",
            path=str(self.path),
            field="header",
            found=found,
            expected=expected,
        )

    def blocks(self) -> Iterator[ExportedBlock]:
        """The whole blocks, in their order; `damaged` and `problems` fill up meanwhile."""
        digest = xxhash.xxh3_128()
        count = nbytes = 0
        at = fmt.ALIGN
        trailer: np.void | None = None
        while trailer is None and at < self.size:
            raw = self._at(at, fmt.ALIGN)
            if fmt.is_sealed(raw, fmt.BLOCK_HEADER) and _magic(raw) == fmt.BLOCK_MAGIC:
                header = np.frombuffer(raw, fmt.BLOCK_HEADER)[0]
                size = int(header["nbytes"])
                digest.update(raw)
                data = self._at(at + fmt.ALIGN, min(size, self.size - at))
                problem = self._problem(header, data)
                end = at + fmt.ALIGN + size + fmt.padding(size)
                count += 1
                nbytes += size
                low, high = int(header["low"]), int(header["high"])
                if problem:
                    key = keymath.key_text(low, high)
                    self.damaged.append(DamagedBlock(key, -1, -1, size, problem))
                else:
                    used, keep = int(header["used"]), int(header["keep"])
                    yield ExportedBlock(low, high, used, keep, data, end)
                at = end
            elif fmt.is_sealed(raw, fmt.TRAILER) and _magic(raw) == fmt.TRAILER_MAGIC:
                trailer = np.frombuffer(raw, fmt.TRAILER)[0]
            else:
                next_at = self._next_part(at + fmt.ALIGN)
                self.problems.append(f"bytes {at} to {next_at - 1} make no sense")
                at = next_at
        self._compare(trailer, count, nbytes, digest.digest())

    def _compare(self, trailer: np.void | None, count: int, nbytes: int, digest: bytes) -> None:
        if trailer is None:
            meant = int(self.header["blocks"])
            self.problems.append(f"the file is cut short: {count} of {meant} blocks, no trailer")
        elif (int(trailer["blocks"]), int(trailer["nbytes"])) != (count, nbytes):
            self.problems.append(f"{count} of {int(trailer['blocks'])} blocks were found")
        elif bytes(trailer["digest"]) != digest:
            self.problems.append("its digest tells of other blocks, or of another order")

    def _next_part(self, at: int) -> int:
        """The offset of the next part that is whole; the file's size when there is none."""
        magics = (np.uint32(fmt.BLOCK_MAGIC), np.uint32(fmt.TRAILER_MAGIC))
        while at < self.size:
            raw = self._at(at, _SCAN_BYTES)
            words = np.frombuffer(raw[: len(raw) // fmt.ALIGN * fmt.ALIGN], "<u4")[
                :: fmt.ALIGN // 4
            ]
            for n in np.flatnonzero((words == magics[0]) | (words == magics[1])).tolist():
                part = raw[n * fmt.ALIGN : (n + 1) * fmt.ALIGN]
                kind = fmt.BLOCK_HEADER if words[n] == magics[0] else fmt.TRAILER
                if fmt.is_sealed(part, kind):
                    return at + int(n) * fmt.ALIGN
            at += _SCAN_BYTES
        return self.size

    def _problem(self, header: np.void, data: bytes) -> str:
        size = int(header["nbytes"])
        if not size:
            return "it has no bytes"
        if len(data) < size:
            return f"the file ends {size - len(data)} bytes before its end"
        digest = xxhash.xxh3_64(keymath.key_bytes(int(header["low"]), int(header["high"])))
        digest.update(data)
        if digest.intdigest() != int(header["checksum"]):
            return "its bytes do not fit its checksum"
        return ""

    def _at(self, at: int, size: int) -> bytes:
        self._file.seek(at)
        return self._file.read(size)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _magic(raw: bytes) -> int:
    return int.from_bytes(raw[:4], "little")
