"""The memory of the KV tensor: how worker processes map what the server's tensor points at.

The tensor is never sent or copied to the workers. The server describes its memory in a
`MemorySource` (`share_tensor`), workers map that (`attach`). What lies behind the tensor's address
is read from `/proc/self/maps`, never guessed from what the tensor says of itself: `is_shared()` is
true for a private `torch.from_file(shared=False)` and false for a tensor over somebody's memfd.

Workers import this module, so it imports torch and psutil only where they are needed.
"""

from __future__ import annotations

import os
import re
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from light_mem.descriptors import keep_standard_numbers
from light_mem.engine.kvallocation import (
    HOW_TO_ALLOCATE,
    allocated,
    require_memory,
    require_shm,
)
from light_mem.engine.maps import (
    Region,
    duplicate,
    find_region,
    map_file,
    map_sysv,
    open_region,
    sysv_size,
)
from light_mem.errors import InvalidArgumentError, KVCacheMemoryError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

_SYSV_PATH = re.compile(r"/SYSV[0-9a-f]{8} \(deleted\)")

_share_lock = threading.Lock()  # torch's sharing strategy is global, a tensor moves once


class MemorySource(NamedTuple):
    """How another process on this machine maps the KV tensor; JSON through `_asdict()`.

    `kind` says which fields count; the others are -1 or 0:
    - "fd": `fd` is a descriptor in the server, handed down with `pass_fds=(source.fd,)` and so of
      the same number in the worker; `device` and `inode` (st_dev, st_ino) identify the object.
    - "sysv": `shmid` is a System V segment's id; the worker must be in the same IPC namespace.

    `offset` is the tensor's first byte in the object, `nbytes` the tensor's size in bytes.
    """

    kind: str
    fd: int
    device: int
    inode: int
    shmid: int
    offset: int
    nbytes: int


def share_tensor(tensor: torch.Tensor) -> MemorySource:
    """Says how another process maps `tensor` (contiguous CPU uint8 [num_pages, page_bytes]).

    Memory in a shared mapping is used as it is, whoever made it. Private memory that torch owns is
    moved into shared memory in place: the tensor, its views and all of its storage go on working,
    raw pointers taken before (`data_ptr()`, DLPack) do not. Any other private memory is refused:
    numpy's, pinned, and torch's own once `.numpy()` has been called on it.

    The caller keeps the tensor alive while workers use it, and ends the source's descriptor (a
    duplicate, so the source stays valid when the allocator closes its own) with `close_source`.
    Thread-safe; no other thread may write to a tensor while it is moved. While it is, torch's
    sharing strategy is `file_descriptor` for the whole process: `file_system` would leave
    `/dev/shm/torch_*` behind after a kill -9.

    Without a readable /proc (macOS; not tested there) only tensors of `allocate_kvcache` and
    private torch memory are accepted.

    Raises InvalidArgumentError for a tensor of another form, KVCacheMemoryError for memory that
    workers cannot map, SharedMemoryFullError (`needed`, `available`) if a move has no room. Nothing
    was moved then.
    """
    _validate(tensor)
    keep_standard_numbers()
    with _share_lock:
        try:
            region = find_region(tensor.data_ptr(), tensor.nbytes)
        except (FileNotFoundError, PermissionError):
            return _share_without_proc(tensor)
        if not region.shared:
            _move(tensor, region.path)
            region = find_region(tensor.data_ptr(), tensor.nbytes)
        return _share_region(region)


def tensor_was_moved(address: int) -> KVCacheMemoryError:
    """The error for a tensor that is not any more where it was shared."""
    return KVCacheMemoryError(
        "the KV tensor was moved to other memory, which the workers do not have: it, or a view of "
        "it, was sent to another process, share_memory_() called, or its .data replaced. Allocate "
        "it with "
        "light_mem.allocate_kvcache(), with torch's sharing strategy file_descriptor, or call "
        "share_memory_() before the service is made",
        address=address,
    )


def close_source(source: MemorySource) -> None:
    """Closes the descriptor of a source, once; in a worker, the inherited one of the same number.

    Arrays from `attach` and the tensor stay valid. A descriptor that is closed already, or that is
    another object's by now, is left alone.
    """
    if source.kind != "fd":
        return
    try:
        if _identity(source.fd) == (source.device, source.inode):
            os.close(source.fd)
    except OSError:
        pass  # closed already


def attach(source: MemorySource) -> npt.NDArray[np.uint8]:
    """Maps the source's memory: a writable 1-D uint8 array of `source.nbytes` bytes.

    The memory stays mapped while the array or any view of it lives, whatever becomes of the
    descriptor and the server. Thread-safe; writes reach all processes, but nothing here
    orders them.

    Raises KVCacheMemoryError if the object is gone, another one, or too small (touching a mapping
    past an object's end is SIGBUS), InvalidArgumentError for a source of no known kind.
    """
    if source.nbytes <= 0 or source.offset < 0:
        raise InvalidArgumentError(f"no memory to attach: {source}", source=source)
    try:
        if source.kind == "fd":
            return _attach_file(source.fd, source)
        if source.kind == "sysv":
            # Attached first: from then on the id cannot become another segment's.
            view = map_sysv(source.shmid, source.offset, source.nbytes)
            _require_size(sysv_size(source.shmid), source)
            return view
    except OSError as err:
        raise KVCacheMemoryError(
            f"cannot map the KV tensor's memory, {source}: {err}", source=source, reason=str(err)
        ) from err
    raise InvalidArgumentError(f"unknown kind of memory source: {source.kind!r}", source=source)


def _validate(tensor: Any) -> None:
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise InvalidArgumentError(
            f"the KV tensor must be a torch.Tensor, not {type(tensor)}", found=str(type(tensor))
        )
    found, remedy = None, ""
    if tensor.device.type != "cpu":
        found = f"lies on device {tensor.device}"
    elif tensor.dtype != torch.uint8:
        found, remedy = f"has dtype {tensor.dtype}", " (.view(torch.uint8) gives its bytes)"
    elif tensor.dim() != 2:
        found = f"has {tensor.dim()} dimensions, shape {tuple(tensor.shape)}"
    elif tensor.layout != torch.strided or not tensor.is_contiguous():
        found = f"has shape {tuple(tensor.shape)} and layout {tensor.layout}, not contiguous"
    elif tensor.numel() == 0:
        found = f"is empty, shape {tuple(tensor.shape)}"
    if found is not None:
        raise InvalidArgumentError(
            "the KV tensor must be contiguous CPU uint8 [num_pages, page_bytes]; this one "
            f"{found}{remedy}",
            found=found,
        )


def _share_region(region: Region) -> MemorySource:
    name = repr(region.path) if region.path else "nameless shared memory"
    if not region.writable:
        raise KVCacheMemoryError(
            f"the KV tensor's memory, {name}, is mapped read-only: map it readable and writable",
            path=region.path,
        )
    nbytes = region.end - region.offset
    if _SYSV_PATH.fullmatch(region.path):  # the kernel shows the shmid as the inode
        return MemorySource("sysv", -1, 0, 0, region.inode, region.offset, nbytes)
    fd = open_region(region)
    if fd is not None:
        return _fd_source(fd, region.offset, nbytes)
    raise KVCacheMemoryError(
        f"the KV tensor lies in {name}, to which workers have no way: it is no file this process "
        "may open, none of its descriptors, and /proc/self/map_files needs CAP_CHECKPOINT_RESTORE. "
        f"Keep the descriptor open, or {HOW_TO_ALLOCATE}",
        path=region.path,
    )


def _share_without_proc(tensor: Any) -> MemorySource:
    address = tensor.data_ptr()
    for fd, (start, nbytes) in list(allocated.items()):
        if start <= address and address + tensor.nbytes <= start + nbytes:
            return _fd_source(duplicate(fd), address - start, tensor.nbytes)
    if tensor.is_shared():  # by the file_system strategy: its object is not to be found
        raise KVCacheMemoryError(
            "without /proc the object behind a shared tensor is not known; allocate it with "
            "light_mem.allocate_kvcache(num_pages, page_bytes)"
        )
    _require_movable(tensor, "")
    storage = tensor.untyped_storage()
    require_memory(storage.nbytes())
    try:
        fd, _ = storage._share_fd_cpu_()
    except RuntimeError as err:
        raise _not_moved(err) from err
    return _fd_source(duplicate(fd), tensor.data_ptr() - storage.data_ptr(), tensor.nbytes)


def _fd_source(fd: int, offset: int, nbytes: int) -> MemorySource:
    device, inode = _identity(fd)
    if os.fstat(fd).st_size < offset + nbytes:
        os.close(fd)
        raise KVCacheMemoryError("the KV tensor reaches past the end of the file behind it")
    return MemorySource("fd", fd, device, inode, -1, offset, nbytes)


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _require_movable(tensor: Any, path: str) -> None:
    # A storage is resizable while torch alone owns its memory: from_numpy, frombuffer, from_file
    # and DLPack storages are not, and .numpy() ends it (its array would point at freed memory).
    # is_shared(): share_memory_() would do nothing. Pinned: the move would end the pinning.
    if tensor.untyped_storage().resizable() and not tensor.is_shared() and not tensor.is_pinned():
        return
    raise KVCacheMemoryError(
        f"the KV tensor lies in private memory{f' ({path})' if path else ''} that torch cannot "
        "move (numpy's, pinned, another library's, or exported with .numpy()), and workers cannot "
        f"map it; {HOW_TO_ALLOCATE}",
        path=path,
    )


def _move(tensor: Any, path: str) -> None:
    import torch.multiprocessing

    torch_mp: Any = torch.multiprocessing  # untyped, like the tensor methods used here
    _require_movable(tensor, path)
    needed = tensor.untyped_storage().nbytes()  # a view takes its whole storage along
    require_shm(needed)
    strategy = torch_mp.get_sharing_strategy()
    torch_mp.set_sharing_strategy("file_descriptor")
    try:
        tensor.share_memory_()
    except RuntimeError as err:
        require_shm(needed)  # somebody else took the room meanwhile
        raise _not_moved(err) from err
    finally:
        torch_mp.set_sharing_strategy(strategy)


def _not_moved(error: RuntimeError) -> KVCacheMemoryError:
    return KVCacheMemoryError(f"torch could not move the KV tensor: {error}", reason=str(error))


def _attach_file(fd: int, source: MemorySource) -> npt.NDArray[np.uint8]:
    if _identity(fd) != (source.device, source.inode):
        raise KVCacheMemoryError(f"another file than the KV tensor's: {source}", source=source)
    _require_size(os.fstat(fd).st_size, source)
    return map_file(fd, source.offset, source.nbytes)


def _require_size(size: int, source: MemorySource) -> None:
    if source.offset + source.nbytes > size:
        raise KVCacheMemoryError(
            f"the object has {size} bytes, too few for {source}",
            source=source,
            size=size,
            needed=source.offset + source.nbytes,
        )
