"""The operating system's side of `kvmemory`: what lies behind an address, and mapping it elsewhere.

On Linux `/proc/self/maps` says what lies where (proc_pid_maps(5)). Two of its columns need care:
`path` has newlines as `\\012` (a backslash stays as it is, so both readings are tried) and gains
" (deleted)" once the name is gone, a suffix that a real name may have too; `dev` is the file
system's number, which on btrfs and overlayfs is not `st_dev`. So a name is only a candidate: what
it opens must have the mapping's inode, and its device or at least its path and its size.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from light_mem.errors import KVCacheMemoryError

if TYPE_CHECKING:
    import numpy.typing as npt

MAPS = "/proc/self/maps"
HUGE_PAGE_BYTES = 2 << 20  # the smallest kind of x86-64 and of arm64 with pages of 4 KiB


class Region(NamedTuple):
    """An address range that lies in one object, or in private memory.

    `offset` is the object's byte at the range's start and `end` the one after its last;
    `span` names the first mapping as `/proc/self/map_files` does. For private memory only
    `shared`, `writable` and `path` (of its first mapping, often "" or "[heap]") mean anything.
    """

    shared: bool
    writable: bool
    offset: int
    end: int
    device: int
    inode: int
    path: str
    span: str


class _Mapping(NamedTuple):
    start: int
    stop: int
    shared: bool
    writable: bool
    offset: int
    device: int
    inode: int
    path: bytes


def _read_maps() -> Iterator[_Mapping]:
    with open(MAPS, "rb") as file:
        text = file.read()
    for line in text.split(b"\n"):  # never splitlines(): a name may contain "\r"
        if not line:
            continue
        # Five columns, then the name up to the end of the line, spaces and all.
        span, perms, offset, device, inode, *path = line.split(None, 5)
        start, stop = (int(part, 16) for part in span.split(b"-"))
        major, minor = (int(part, 16) for part in device.split(b":"))
        yield _Mapping(
            start=start,
            stop=stop,
            shared=perms[3:4] == b"s",
            writable=perms[:2] == b"rw",
            offset=int(offset, 16),
            device=os.makedev(major, minor),
            inode=int(inode),
            path=path[0] if path else b"",
        )


def have_maps() -> bool:
    """Whether this system says what lies where."""
    return os.path.exists(MAPS)


def find_region(address: int, nbytes: int) -> Region:
    """The object behind `nbytes` bytes at `address`, which may span several mappings.

    mprotect() and madvise() split a mapping in the middle of a tensor; the parts count as one when
    they are neighbours in memory and in the same object. Raises KVCacheMemoryError when they are
    not, FileNotFoundError on systems without /proc.
    """
    stop = address + nbytes
    parts = [part for part in _read_maps() if part.start < stop and part.stop > address]
    reached = address
    for part in parts:
        if part.start > reached:
            break
        reached = part.stop
    if reached < stop:
        raise KVCacheMemoryError(
            f"no memory is mapped at {reached:#x}, inside the KV tensor", address=reached
        )
    first = parts[0]
    for part in parts[1:]:
        one_object = (part.device, part.inode, part.path, part.offset - part.start) == (
            first.device,
            first.inode,
            first.path,
            first.offset - first.start,
        )
        if part.shared != first.shared or (first.shared and not one_object):
            raise KVCacheMemoryError(
                f"the KV tensor spans different mappings: {first.path!r} and {part.path!r}; "
                "workers can map one object only",
                paths=[first.path, part.path],
            )
    offset = first.offset + address - first.start
    return Region(
        shared=first.shared,
        writable=all(part.writable for part in parts),
        offset=offset,
        end=offset + nbytes,
        device=first.device,
        inode=first.inode,
        path=os.fsdecode(first.path),
        span=f"{first.start:x}-{first.stop:x}",
    )


def open_region(region: Region) -> int | None:
    """A new read-write descriptor of a shared region's object, or None when there is no way to one.

    Tried in turn: its path, a descriptor that this process has open (the only way to a memfd or a
    deleted file), and `/proc/self/map_files`, which needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE.
    Not one of the standard streams' numbers and not inheritable; the caller closes it.
    """
    if region.path.startswith("/"):
        for path in _readings(region.path):
            if (fd := _open(path, region, same_path=True)) is not None:
                return fd
    if (fd := _open_from_own_descriptors(region)) is not None:
        return fd
    return _open(f"/proc/self/map_files/{region.span}", region, same_path=True)


def duplicate(fd: int) -> int:
    """A duplicate, not inheritable and never a standard stream's number (replaced in children)."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)


def map_file(fd: int, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """`nbytes` bytes at any `offset` of a file, mapped as long as a view of them lives.

    The caller has checked that the file is long enough. OSError if the kernel refuses.
    """
    status = os.fstat(fd)
    # Whole blocks of the file system: a block of hugetlbfs is a huge page, and it maps (and
    # unmaps) nothing smaller. ZFS has blocks of odd sizes.
    unit = mmap.ALLOCATIONGRANULARITY
    if status.st_blksize > unit and status.st_blksize % unit == 0:
        unit = status.st_blksize
    start = offset - offset % unit
    stop = offset + nbytes
    stop = min(stop + -stop % unit, status.st_size)
    memory = mmap.mmap(fd, stop - start, offset=start)
    return np.frombuffer(memory, np.uint8, nbytes, offset - start)


def prefer_huge_pages(address: int, nbytes: int) -> None:
    """Have the kernel back a mapping by huge pages, where it has them and gives them to who asks
    (`advise` or `madvise` in /sys/kernel/mm/transparent_hugepage: `shmem_enabled` for shared
    memory, `enabled` for private). Nothing happens where it has not."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), mmap.MADV_HUGEPAGE)


def private_memory(nbytes: int) -> npt.NDArray[np.uint8]:
    """Zeroed private memory of this process, uint8 [nbytes], all of it in huge pages if possible.

    For O_DIRECT: a device takes a request as a list of what lies together in memory, and a list of
    256 pages of the kernel's costs it, or the host of a virtual machine, several times the transfer
    (measured, reads of 1 MiB: 0.6 GB/s instead of 3.8, and three times the processor).
    """
    whole = nbytes + -nbytes % HUGE_PAGE_BYTES  # else the last part would not be huge
    memory = mmap.mmap(-1, whole + HUGE_PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(memory, np.uint8)
    prefer_huge_pages(array.ctypes.data, array.nbytes)
    start = -array.ctypes.data % HUGE_PAGE_BYTES
    return array[start : start + nbytes]


def private_buffers(count: int, nbytes: int) -> list[npt.NDArray[np.uint8]]:
    """Buffers in one `private_memory`, each of a multiple of pages of the kernel's that holds
    `nbytes` at least, and beginning with one."""
    stride = nbytes + -nbytes % mmap.PAGESIZE
    memory = private_memory(count * stride)
    return [memory[at : at + stride] for at in range(0, count * stride, stride)]


def map_sysv(shmid: int, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """The same of a System V segment, whose size the caller checks before touching the array."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.shmat.restype = ctypes.c_void_p
    libc.shmat.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
    libc.shmdt.argtypes = (ctypes.c_void_p,)
    address = libc.shmat(shmid, None, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    memory = (ctypes.c_uint8 * nbytes).from_address(address + offset)
    # atexit off: views may be in use until the very end.
    weakref.finalize(memory, libc.shmdt, address).atexit = False
    return np.frombuffer(memoryview(memory), np.uint8)


def sysv_size(shmid: int) -> int:
    """The size in bytes of a System V segment; OSError if there is none, or no such table."""
    # The table has one form everywhere, shmctl's struct one for each architecture.
    with open("/proc/sysvipc/shm", encoding="ascii") as file:
        columns = file.readline().split()
        for line in file:
            row = dict(zip(columns, line.split(), strict=True))
            if int(row["shmid"]) == shmid:
                return int(row["size"])
    raise OSError(errno.EINVAL, f"no segment {shmid} in this IPC namespace")


def _readings(path: str) -> set[str]:
    return {path, path.replace("\\012", "\n")}


def _open_from_own_descriptors(region: Region) -> int | None:
    weaker: list[tuple[str, bool]] = []
    for name in os.listdir("/proc/self/fd"):
        link = f"/proc/self/fd/{name}"
        try:
            same_path = os.readlink(link) in _readings(region.path)
            if not _is_object(os.stat(link), region, same_path):
                continue
            if fcntl.fcntl(int(name), fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
                weaker.append((link, same_path))
                continue
            if (fd := _duplicate_if(int(name), region, same_path)) is not None:
                return fd
        except OSError as err:
            _raise_if_out_of_descriptors(err)  # else: closed by another thread meanwhile
    for link, same_path in weaker:  # opened read-only or O_PATH; the link opens the object anew
        if (fd := _open(link, region, same_path)) is not None:
            return fd
    return None


def _open(path: str, region: Region, same_path: bool) -> int | None:
    try:
        # First stat: opening whatever took the name since may block or have effects.
        if not _is_object(os.stat(path), region, same_path):
            return None
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except (OSError, ValueError) as err:
        _raise_if_out_of_descriptors(err)
        return None
    try:
        return _duplicate_if(fd, region, same_path)
    finally:
        os.close(fd)


def _duplicate_if(fd: int, region: Region, same_path: bool) -> int | None:
    own = duplicate(fd)
    if _is_object(os.fstat(own), region, same_path):  # the number may have been reused
        return own
    os.close(own)
    return None


def _is_object(status: os.stat_result, region: Region, same_path: bool) -> bool:
    if not stat.S_ISREG(status.st_mode) or status.st_ino != region.inode:
        return False
    return status.st_dev == region.device or (same_path and status.st_size >= region.end)


def _raise_if_out_of_descriptors(err: Exception) -> None:
    if isinstance(err, OSError) and err.errno in (errno.EMFILE, errno.ENFILE):
        raise err
