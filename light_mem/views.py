"""BlockView: a stored block as a read-only tensor, in place.

The tensor lies on the shard's own mapping: nothing is copied, and the pages are those of the
kernel's page cache. A lease keeps the block's slots from being given to another block. It ends with
`close`, with the last tensor over the view's memory when nobody closes it, and with the process.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from light_mem.closing import Closing
from light_mem.engine.process import fork_token
from light_mem.engine.slot_calls import problem_of
from light_mem.errors import InvalidArgumentError, ServiceClosedError
from light_mem.index.runs import cut_at_runs

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from light_mem.engine.keeping import Leased
    from light_mem.engine.member import Member
    from light_mem.engine.shard_file import ShardFile


class BlockView(Closing):
    """A stored block's bytes, where they lie; made by `CacheService.view`.

    Close it, or use it in a `with` block: until then eviction passes the block over, and a block
    that is deleted or replaced keeps its slots, so the bytes stay what they were. After `close` the
    same memory may show another block's bytes: keep no tensor over it.

    The memory is mapped read-only. torch has no read-only tensors, so a write into `tensor` is not
    an exception but a segmentation fault, which ends the process. (Of a block that lies in several
    runs of slots, `copied`, it is a private copy, which may be written to.) So does SIGBUS a read
    of bytes that were lost after the view was made: a data file that somebody cuts short, a page
    that the kernel has dropped and the device does not give again.

    Any thread. A forked child shares the memory but not the lease: the parent's protects it.
    """

    def __init__(self, engine: Member, leased: Leased) -> None:
        """Takes the lease over."""
        try:
            file = engine.file(leased.shard)
            self.copied = len(leased.runs) > 1
            data = _copy(file, leased) if self.copied else file.read_only(*leased.runs[0])
            memory = _Memory(data[: leased.nbytes])
            # Of the memory, not of this object: a tensor over it may outlive the view.
            self._end = weakref.finalize(memory, _drop, engine, leased, fork_token())
        except BaseException:  # no descriptors or memory left: nobody else knows of the lease
            engine.end_lease(leased)
            raise
        self._memory: _Memory | None = memory
        self.nbytes = leased.nbytes
        self._page_bytes = file.page_bytes
        self._engine = engine
        self._leased = leased
        if self.copied:
            self._end_lease()

    @property
    def tensor(self) -> torch.Tensor:
        """The block, uint8 [pages, page_bytes]; [nbytes] when it does not fill its last page.

        Raises ServiceClosedError when the view is closed.
        """
        import torch

        flat = torch.frombuffer(self._opened().buffer(), dtype=torch.uint8)
        return flat if self.nbytes % self._page_bytes else flat.view(-1, self._page_bytes)

    def _opened(self) -> _Memory:
        memory = self._memory
        if memory is None:
            raise ServiceClosedError("the view is closed")
        return memory

    def _check_open(self) -> None:
        self._opened()

    def __reduce__(self) -> tuple[Any, ...]:
        raise InvalidArgumentError(
            "a BlockView stays in its process, as its lease does: view the block there, through "
            "service.client()"
        )

    def close(self) -> None:
        """End the lease; calling it again, or in a forked child, does nothing."""
        self._end_lease()
        self._memory = None

    def _end_lease(self) -> None:
        detached = self._end.detach()  # one thread gets it
        if detached is not None and detached[2][2] == fork_token():
            self._engine.end_lease(self._leased)


class _Memory:
    """Bytes that tensors may lie over: each buffer keeps this object, and with it the lease."""

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        self._data = data

    def buffer(self) -> ctypes.Array[ctypes.c_uint8]:
        """The bytes as a buffer that torch takes without a warning about read-only memory."""
        kind = ctypes.c_uint8 * len(self._data)
        buffer = kind.from_address(self._data.ctypes.data)
        buffer.memory = self  # type: ignore[attr-defined]
        return buffer


def _copy(file: ShardFile, leased: Leased) -> npt.NDArray[np.uint8]:
    """The bytes of a block that lies in several runs of slots."""
    data = np.empty(leased.nbytes, np.uint8)
    at = 0
    for run, start, end in cut_at_runs(leased.runs, leased.nbytes, file.page_bytes):
        for piece in file.pieces(run, end - start):
            data[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
            at += len(piece)
    return data


def _drop(engine: Member, leased: Leased, token: int) -> None:
    if token == fork_token():
        engine.drop_lease(leased)


def open_view(engine: Member, low: int, high: int) -> BlockView | None:
    """The view of a stored block; None: a miss. Raises LeaseLimitError, LockTimeoutError, OSError
    where its shard cannot be opened or mapped."""
    leased = engine.lease(low, high)
    try:
        return None if leased is None else BlockView(engine, leased)
    except OSError as error:  # lost since it was verified; the lease has ended
        if problem_of(error) is None:
            raise
        return None
