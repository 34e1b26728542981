"""The file system where a store lies or shall lie, and the store itself."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import shutil
import tempfile
from pathlib import Path

from light_mem.doctor.report import FAIL, OK, WARN, Check
from light_mem.engine.opening import descriptors_for
from light_mem.errors import LightMemError
from light_mem.filesystem import NETWORK_TYPES, file_system
from light_mem.index.locks import RangeLock
from light_mem.maintenance.store import Store
from light_mem.maintenance.verifying import unfinished_of
from light_mem.sizes import bytes_text

_LEAST_FREE = 1 << 30
_KINDS = {
    "tmpfs": "what lies there is memory, and is gone after a restart of the machine: use a disk",
    "ramfs": "what lies there is memory, and is gone after a restart of the machine: use a disk",
    "overlay": "a container's own layer: it goes with the container; mount a volume there",
    "btrfs": "it writes to new places, so allocated room can run out: chattr +C the directory",
    "zfs": "it writes to new places, so allocated room can run out: keep a reservation",
    "bcachefs": "it writes to new places, so allocated room can run out: set nocow there",
}


def checks(path: Path) -> list[Check]:
    """All of them; raises NotADirectoryError."""
    # A link that leads nowhere is in the way of whoever makes the directory.
    above = (path.absolute(), *path.absolute().parents)
    there = next(p for p in above if _is_seen(p) or os.path.islink(p))
    if not os.path.isdir(there):
        link = "A symlink that leads to no directory" if os.path.islink(there) else ""
        raise NotADirectoryError(errno.ENOTDIR, link or os.strerror(errno.ENOTDIR), str(there))
    mount, kind = file_system(there)
    total, _, free = shutil.disk_usage(there)
    found = [judge_file_system(kind, mount), judge_room(total, free), *_probes(there)]
    if any(_is_seen(path / name) for name in ("store.json", "index")) or (
        _is_seen(path) and any(path.glob("shard-*"))
    ):
        found += store(path)
    return found


def _is_seen(path: Path) -> bool:
    """Whether something lies there, as far as this process may look: where a directory above may
    not be searched, that one fails the check whether it is writable."""
    try:
        path.stat()
    except OSError:  # `exists` raises PermissionError before Python 3.14
        return False
    return True


def judge_file_system(kind: str, mount: str) -> Check:
    """What is known of a file system by its type."""
    found = f"{kind or 'unknown'} at {mount or '?'}"
    if kind in NETWORK_TYPES:
        advice = "locks and mappings are not coherent there: use a local disk"
        return Check("file system", FAIL, found, advice)
    if kind in _KINDS:
        return Check("file system", WARN, found, _KINDS[kind])
    if kind.startswith("fuse"):
        return Check(
            "file system", WARN, found, "mappings may be slow or missing: use a local disk"
        )
    return Check("file system", OK, found)


def judge_room(total: int, free: int) -> Check:
    """Sizes in bytes; `total` 0: the file system has no size (a tmpfs without a limit, ramfs)."""
    if not total:
        return Check("free space", OK, "the file system does not say")
    found = f"{bytes_text(free)} of {bytes_text(total)} free"
    if free < min(_LEAST_FREE, total // 20):
        advice = "a store allocates its room when it is made or grows: free some first"
        return Check("free space", WARN, found, advice)
    return Check("free space", OK, found)


def _probes(directory: Path) -> list[Check]:
    """What a store does to its files, tried on one without a name."""
    try:
        with tempfile.TemporaryFile(dir=directory, prefix=".lightmem-doctor-") as file:
            descriptor = file.fileno()
            return [
                Check("writable", OK, str(directory)),
                _fallocate(descriptor),
                _mapping(descriptor),
                _locks(descriptor),
            ]
    except OSError as error:
        advice = "the server's user needs to write there"
        return [Check("writable", FAIL, str(error), advice)]


def _fallocate(descriptor: int) -> Check:
    # Not os.posix_fallocate: where the file system cannot do it, glibc writes zeros instead.
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "fallocate"):
        return Check("fallocate", WARN, "missing", "making a store writes all of its bytes once")
    size = ctypes.c_longlong(2 * mmap.PAGESIZE)
    if libc.fallocate(descriptor, 0, ctypes.c_longlong(0), size) == 0:
        return Check("fallocate", OK, "there")
    error = os.strerror(ctypes.get_errno())
    return Check("fallocate", WARN, error, "making a store writes all of its bytes once, slowly")


def _mapping(descriptor: int) -> Check:
    try:
        os.ftruncate(descriptor, 2 * mmap.PAGESIZE)
        with mmap.mmap(descriptor, mmap.PAGESIZE) as mapped:
            mapped[:4] = b"seen"
            if os.pread(descriptor, 4, 0) == b"seen":
                return Check("shared mappings", OK, "there")
        found = "what is written to a mapping is not read from the file"
    except (OSError, ValueError) as error:
        found = str(error)
    return Check("shared mappings", FAIL, found, "a store cannot work there: use a local disk")


def _locks(descriptor: int) -> Check:
    advice = "two servers would damage each other's blocks: use a local disk"
    try:
        one, two = (RangeLock(f"/proc/self/fd/{descriptor}") for _ in range(2))
    except OSError as error:
        return Check("locks", WARN, f"cannot be tried: {error}", "use a local disk")
    try:
        if one.try_lock(0) and not two.try_lock(0):
            return Check("locks", OK, "exclude each other")
        return Check("locks", FAIL, "do not exclude each other", advice)
    except OSError as error:
        return Check("locks", FAIL, str(error), advice)
    finally:
        one.close()
        two.close()


def store(path: Path) -> list[Check]:
    """The store that lies there."""
    try:
        found = Store(path)
        findings = found.file_findings()
        unfinished = unfinished_of(found) if found.usable else []
    except (LightMemError, OSError) as error:
        return [Check("store", FAIL, str(error), "see the message; nothing was changed")]
    g = found.geometry
    text = f"{g.shards} shards of {g.slots:,} slots of {g.page_bytes:,} bytes, id {g.store_id}"
    answers = [Check("store", OK, text)]
    if findings:
        text = findings[0].problem + (f" and {len(findings) - 1} more" if findings[1:] else "")
        answers = [Check("store", FAIL, text, f"light-mem verify {path}")]
    elif unfinished:
        advice = "nothing: the next open puts it in order"
        answers.append(Check("left by a kill", OK, unfinished[0], advice))
    return [*answers, _descriptors(g.shards)]


def _descriptors(shards: int) -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return judge_descriptors(descriptors_for(shards), soft, hard)


def judge_descriptors(needed: int, soft: int, hard: int) -> Check:
    """Whether so many files may be open."""
    found = f"{needed:,} needed"
    unlimited = resource.RLIM_INFINITY
    if hard not in (unlimited,) and needed > hard:
        return Check("files of the store", FAIL, found, f"the limit is {hard:,}: ulimit -n")
    if soft not in (unlimited,) and needed > soft:
        return Check("files of the store", WARN, found, f"the soft limit is {soft:,}: ulimit -n")
    return Check("files of the store", OK, found)
