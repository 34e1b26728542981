"""Whether the names of a store's files are taken by somebody else's.

A store is proved by its description or by the header of one shard file. Where neither is to be
read, the directory may be anything, git's own say, which has a file `index`; then whatever no
process of ours can have left there stays as it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from light_mem.engine import shard_header
from light_mem.errors import StoreFormatError
from light_mem.index import description, owners, store_files
from light_mem.index import file as index_file
from light_mem.index import format as fmt

# Names of a store's files; what is renamed to one of them is made anew in any case.
_STORES = re.compile(r"index|store\.json|owners|open\.lock|shard-\d{3}\.(data|slots|lock)")
_DESCRIPTION_BYTES = 4096  # more than a description has


def refuse_foreign(directory: Path) -> None:
    """Raise StoreFormatError for a store of another format version or with a symlink in it, and for
    files of others where nothing proves a store. Changes nothing: to be asked before any file is
    made, or is opened to be used (another version's `owners` may have another size)."""
    if not directory.is_dir():
        return
    if _proves_a_store(directory):
        refuse_links(directory)
        return
    found = [name for name, is_ours in _OURS.items() if _is_foreign(directory / name, is_ours)]
    found += sorted(p.name for p in directory.glob("shard-*") if _is_foreign(p, _is_shard_file))
    if found:
        raise StoreFormatError(
            f"{directory} is no store, and has files of others under names that a store's have: "
            f"{found}; nothing was changed. Give the store a directory of its own",
            path=str(directory),
            field="files",
            found=found,
            expected="a store, or none of these",
        )


def refuse_links(directory: Path) -> None:
    """Raise StoreFormatError where a file of a store is a symlink: it would be written through to
    what may be anybody's. Changes nothing."""
    with os.scandir(directory) as entries:
        links = sorted(e.name for e in entries if e.is_symlink() and _STORES.fullmatch(e.name))
    if links:
        raise store_files.refused_link(directory / links[0])


def _proves_a_store(directory: Path) -> bool:
    if (directory / description.NAME).is_file() and description.load(directory) is not None:
        return True
    # All of them are read: one of another version is an error.
    headers = [
        shard_header.read_header(path)
        for kind in ("data", "slots")
        for path in directory.glob(f"shard-*.{kind}")
        if path.is_file()
    ]
    return any(header is not None for header in headers)


def _is_foreign(path: Path, is_ours: Callable[[Path], bool]) -> bool:
    if path.is_symlink():
        return True  # we make none, whatever it leads to
    if not path.exists():
        return False
    return not path.is_file() or (shard_header.holds_data(path) and not is_ours(path))


# Each is asked of a file with content. Without, or with zeros alone, it may be one that was killed
# before anything was written to it, or whose content a power cut took; and nothing is lost with it.


def _is_shard_file(path: Path) -> bool:
    # Asked for again, although it proves a store: another process may have made it just now. Its
    # header is the first that is written.
    return shard_header.read_header(path) is not None


def _is_index(path: Path) -> bool:
    """True for an index of any version. It is renamed into place complete, before the description
    is written, so it is what a process leaves that died or failed in between."""
    return _begins(path, len(fmt.INDEX_MAGIC)) == fmt.INDEX_MAGIC


def _is_description(path: Path) -> bool:
    """True for a damaged description as well: the directory is still ours."""
    return b'"format": "lightmem"' in _begins(path, _DESCRIPTION_BYTES)


def _is_owners(path: Path) -> bool:
    """Records that processes have left when all else was removed. Parts of them are always zeros,
    whenever their writers died."""
    if path.stat().st_size != owners.FILE_BYTES:
        return False
    records = np.fromfile(path, fmt.OWNER)
    return not (records[:1].tobytes().strip(b"\0") or records["spare"].any())


def _begins(path: Path, size: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        return file.read(size)


_OURS = {
    index_file.NAME: _is_index,
    description.NAME: _is_description,
    owners.NAME: _is_owners,
}
