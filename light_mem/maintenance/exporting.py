"""Writes blocks of a store into one file for another machine.

The store may be in use: nothing is locked. A block that does not fit its checksum is left out and
reported. The file has a temporary name until it is whole and on the device.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from light_mem.blocks import parse_hashes
from light_mem.errors import ExportExistsError, InvalidArgumentError
from light_mem.index import keys as keymath
from light_mem.index import retention
from light_mem.index.description import sync_directory
from light_mem.index.keys import HashValue
from light_mem.maintenance import transfer_format as fmt
from light_mem.maintenance.data import Progress
from light_mem.maintenance.inspecting import Listed, listed
from light_mem.maintenance.reading import BlockReader
from light_mem.maintenance.report import DamagedBlock, TransferReport
from light_mem.maintenance.store import Store


def export_store(
    directory: str | os.PathLike[str],
    file: str | os.PathLike[str],
    hashes: Sequence[HashValue] | None = None,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> TransferReport:
    """Write all blocks of a store, or those of `hashes`, to `file`, the last used first. Pins and
    times to live go along; what has expired does not.

    Raises StoreFormatError (no store), ExportExistsError (`file` is there and not `overwrite`),
    InvalidArgumentError (a value that is no hash; `file` is a directory, a device, a pipe, or lies
    in the store), OSError (no room). An export that fails leaves no file.
    """
    started = time.monotonic()
    store = Store(directory)
    target = Path(file)
    if target.exists() and not target.is_file():  # /dev/null would be replaced, for everybody
        what = "a directory" if target.is_dir() else "no file, but a device or a pipe"
        raise InvalidArgumentError(f"{target} is {what}", file=str(target))
    if target.absolute().parent.resolve() == store.directory.resolve():
        raise InvalidArgumentError(f"{target} lies in the store itself", file=str(target))
    _refuse_existing(target, overwrite)
    keys = None if hashes is None else keymath.as_keys(parse_hashes(hashes))
    parts = [_unexpired(part) for part in listed(store, keys)]
    missing: list[str] = []
    if keys is not None:
        found = {key for part in parts for key in _keys(part)}
        missing = [keymath.key_text(*key) for key in keys.tolist() if tuple(key) not in found]
    writer = _Export(store, parts, progress)
    if dry_run:
        writer.read_only()
    else:
        # Always the same name: what a killed export left is written over by the next.
        temporary = target.with_name(f".{target.name}.light-mem-part")
        with _created(temporary) as out:
            try:
                _refuse_existing(target, overwrite)  # again: an export may just have ended
                writer.write(out)
                os.replace(temporary, target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        sync_directory(target.absolute().parent)
    return TransferReport(
        str(store.directory),
        str(target),
        dry_run,
        writer.blocks,
        writer.nbytes,
        0,
        tuple(missing),
        writer.changed,
        0,
        tuple(writer.damaged),
        (),
        time.monotonic() - started,
    )


def _refuse_existing(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise ExportExistsError(f"{target} is there already", path=str(target))


def _unexpired(part: Listed) -> Listed:
    stays = ~retention.expired(part.rows["keep"])
    return part._replace(heads=part.heads[stays], rows=part.rows[stays])


@contextmanager
def _created(path: Path) -> Iterator[BinaryIO]:
    """An empty file that no other export writes to meanwhile."""
    with os.fdopen(_locked(path), "wb", 1 << 20) as out:
        os.ftruncate(out.fileno(), 0)
        yield out


def _locked(path: Path) -> int:
    """A descriptor of the file of that name, locked; raises ExportExistsError when another export
    has it. That export may end between our open and our lock: what we have opened has the finished
    export's name then, or none."""
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _names(path, descriptor):
                return descriptor
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise ExportExistsError(
                    f"another export is writing {path}", path=str(path)
                ) from None
            raise
        os.close(descriptor)


def _names(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _keys(part: Listed) -> list[tuple[int, int]]:
    return list(zip(part.rows["low"].tolist(), part.rows["high"].tolist(), strict=True))


class _Export:
    """One export."""

    def __init__(self, store: Store, parts: list[Listed], progress: Progress | None) -> None:
        self._store = store
        self._parts = parts
        self._progress = progress
        self.blocks = self.nbytes = self.changed = 0
        self.damaged: list[DamagedBlock] = []

    def _order(self) -> list[tuple[int, int]]:
        """(part, number in it) of all blocks, the last used first."""
        used = np.concatenate([part.rows["used"] for part in self._parts])
        order = np.argsort(used, kind="stable")[::-1]
        sizes = [len(part.heads) for part in self._parts]
        parts = np.repeat(np.arange(len(sizes)), sizes)[order]
        numbers = np.concatenate([np.arange(size) for size in sizes])[order]
        return list(zip(parts.tolist(), numbers.tolist(), strict=True))

    def write(self, out: BinaryIO) -> None:
        """Write the file and sync it."""
        geometry = self._store.geometry
        order = self._order()
        header = np.zeros(1, fmt.EXPORT_HEADER)
        header["magic"], header["version"] = fmt.EXPORT_MAGIC, fmt.EXPORT_VERSION
        header["store_id"] = bytes.fromhex(geometry.store_id)
        header["page_bytes"], header["made"] = geometry.page_bytes, time.time_ns()
        header["blocks"] = len(order)
        digest = xxhash.xxh3_128()
        out.write(fmt.sealed(header))
        for raw, data in self._read(order):
            digest.update(raw)
            out.write(raw)
            out.write(data)
            out.write(bytes(fmt.padding(len(data))))
        trailer = np.zeros(1, fmt.TRAILER)
        trailer["magic"] = fmt.TRAILER_MAGIC
        trailer["blocks"], trailer["nbytes"] = self.blocks, self.nbytes
        trailer["digest"] = digest.digest()
        out.write(fmt.sealed(trailer))
        out.flush()
        os.fsync(out.fileno())

    def read_only(self) -> None:
        """Read and check the blocks, for a dry run."""
        for _ in self._read(self._order()):
            pass

    def _read(self, order: list[tuple[int, int]]) -> Iterator[tuple[bytes, bytes]]:
        """Header and bytes of each block that fits its checksum."""
        total = sum(int(part.rows["nbytes"].sum()) for part in self._parts)
        reader = BlockReader(self._store)
        done = 0
        try:
            for number, n in order:
                part = self._parts[number]
                entry = part.rows[n]
                found = reader.read(part, n)
                done += int(entry["nbytes"])
                if found.changed:
                    self.changed += 1
                elif found.problem:
                    key = keymath.key_text(int(entry["low"]), int(entry["high"]))
                    place = part.shard, int(part.heads[n]), int(entry["nbytes"])
                    self.damaged.append(DamagedBlock(key, *place, found.problem))
                else:
                    self.blocks += 1
                    self.nbytes += len(found.data)
                    yield _header(entry), found.data
                if self._progress is not None:
                    self._progress(done, total)
            # What another index lists elsewhere looks as if it had been taken out.
            self._store.require_unchanged()
        finally:
            reader.close()


def _header(entry: np.void) -> bytes:
    header = np.zeros(1, fmt.BLOCK_HEADER)
    header["magic"] = fmt.BLOCK_MAGIC
    for name in ("low", "high", "nbytes", "checksum", "used", "keep"):
        header[name] = entry[name]
    return fmt.sealed(header)
