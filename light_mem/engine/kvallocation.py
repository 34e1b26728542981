"""Memory for the KV tensor: allocated so that workers can map it, and whether there is room."""

from __future__ import annotations

import errno
import mmap
import operator
import os
import resource
import weakref
from typing import TYPE_CHECKING

from light_mem.descriptors import keep_standard_numbers, memory_object, temporary_file
from light_mem.engine.maps import duplicate, have_maps, prefer_huge_pages
from light_mem.errors import InvalidArgumentError, KVCacheMemoryError, SharedMemoryFullError
from light_mem.index.keys import is_bool

if TYPE_CHECKING:
    import torch

SHM_DIR = "/dev/shm"  # where torch moves tensors to (shm_open)
HOW_TO_ALLOCATE = (
    "allocate it with light_mem.allocate_kvcache(num_pages, page_bytes), or put it into shared "
    "memory first (tensor.share_memory_() before .numpy(), POSIX or SysV shared memory, a memfd, a "
    "mapped file)"
)

# Tensors of allocate_kvcache that are alive, where there is no /proc: descriptor -> address, bytes.
allocated: dict[int, tuple[int, int]] = {}


def allocate_kvcache(num_pages: int, page_bytes: int) -> torch.Tensor:
    """A zeroed KV tensor, uint8 [num_pages, page_bytes], in memory that workers can map.

    It lies in a memfd: no entry and no use of the `/dev/shm` mount (64 MB in many containers),
    gone with the last process that maps it, and one descriptor while the tensor lives. Pages are
    taken from the system at first touch, as huge pages where the machine allows it to who asks
    (`advise` in transparent_hugepage/shmem_enabled); a cgroup's limit is not looked at. Where there
    is no memfd (a sandbox forbids it, macOS) an unlinked temporary file takes its place, on Linux
    with all its room from the start.

    Raises InvalidArgumentError for sizes that are not positive integers, SharedMemoryFullError
    (`needed`, `available` in bytes) if the system has less memory available, or if files of this
    process may not be as long. Thread-safe.
    """
    import torch

    num_pages, page_bytes = _positive("num_pages", num_pages), _positive("page_bytes", page_bytes)
    nbytes = num_pages * page_bytes
    require_memory(nbytes)
    keep_standard_numbers()
    fd = _create_memory(nbytes)
    try:
        if have_maps():
            return _known_to_torch(fd, nbytes).view(num_pages, page_bytes)
        memory = mmap.mmap(fd, nbytes)
        tensor = torch.frombuffer(memory, dtype=torch.uint8).view(num_pages, page_bytes)
        own = duplicate(fd)
        allocated[own] = (tensor.data_ptr(), nbytes)
        # The storage holds `memory`. Not at exit: the tensor may be used until the very end.
        weakref.finalize(memory, _forget, own).atexit = False
    finally:
        os.close(fd)  # the memory has its own duplicate, which share_tensor finds
    return tensor


def _positive(name: str, value: object) -> int:
    """`value` as an int, of numpy's too."""
    try:
        number = 0 if is_bool(value) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = 0
    if number <= 0:
        raise InvalidArgumentError(
            f"{name} must be a positive integer, not {value!r}", **{name: value}
        )
    return number


def _known_to_torch(fd: int, nbytes: int) -> torch.Tensor:
    """A tensor over a descriptor's memory, uint8 [nbytes].

    Its storage is one that torch itself knows as shared: of any other, the bytes are copied to
    /dev/shm, and that put in its place, as soon as the tensor or a view of it is sent to another
    process; the workers would go on with the memory where it was.
    """
    import torch

    # As torch makes those that come from another process (torch/multiprocessing/reductions.py).
    storage = torch.UntypedStorage._new_shared_fd_cpu(fd, nbytes)  # type: ignore[attr-defined]
    # Its duplicate of the descriptor: a program that the server starts would inherit it, and keep
    # the memory when the server is gone.
    os.set_inheritable(storage._share_fd_cpu_()[0], False)
    tensor = torch.empty(0, dtype=torch.uint8).set_(storage)
    # Blocks of small pages are copied a fourth faster then: each page of the tensor begins another
    # page of the kernel's, for address translation too (64 of 3,840 bytes: 37 instead of 50 us).
    prefer_huge_pages(tensor.data_ptr(), nbytes)
    return tensor


def require_shm(needed: int) -> None:
    """Raise SharedMemoryFullError, or KVCacheMemoryError, unless torch can move so much there."""
    try:
        status = os.statvfs(SHM_DIR)
    except OSError as err:
        raise KVCacheMemoryError(
            f"the KV tensor must be moved to {SHM_DIR}, which is not there; {HOW_TO_ALLOCATE}",
            path=SHM_DIR,
        ) from err
    if status.f_blocks:  # 0: a tmpfs without a limit
        hint = f"{SHM_DIR}; light_mem.allocate_kvcache() does not use that mount"
        _require_room(needed, status.f_bavail * status.f_frsize, hint)
    require_memory(needed)


def require_memory(needed: int) -> None:
    """Raise SharedMemoryFullError if less memory is available; no check where the system does not
    tell. It only makes the error come early."""
    import psutil

    try:
        available = int(psutil.virtual_memory().available)
    except OSError:  # a /proc of processes only (subset=pid), or none
        return
    _require_room(needed, available, "this machine's memory")


def _require_room(needed: int, available: int, where: str) -> None:
    if needed > available:
        raise _no_room(needed, available, where)


def _no_room(
    needed: int, available: int, where: str, number: int = errno.ENOSPC
) -> SharedMemoryFullError:
    return SharedMemoryFullError(
        f"the KV tensor needs {needed} bytes, {available} bytes are available in {where}",
        needed=needed,
        available=available,
        errno=number,
    )


def _create_memory(nbytes: int) -> int:
    fd = memory_object("light_mem_kvcache")
    directory = ""
    if fd < 0:
        import tempfile

        directory = tempfile.gettempdir()
        _require_room(nbytes, _free(directory), directory)
        fd = temporary_file()
    try:
        if directory and hasattr(os, "posix_fallocate"):
            # Others may take the room of a hole before it is stored to, which is SIGBUS then.
            os.posix_fallocate(fd, 0, nbytes)
        else:
            os.ftruncate(fd, nbytes)
    except BaseException as error:
        os.close(fd)
        number = error.errno if isinstance(error, OSError) else None
        if number == errno.EFBIG:
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
            where = "a file of this process (RLIMIT_FSIZE, ulimit -f: raise it)"
            raise _no_room(nbytes, limit, where, number) from error
        if directory and number in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(nbytes, _free(directory), directory, number) from error
        raise
    return fd


def _free(directory: str) -> int:
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def _forget(fd: int) -> None:
    del allocated[fd]
    os.close(fd)
