"""The drop-in interface of the C++ LightMem: `PyLocalCacheService`, `PyTask`, `PyState`.

Two generations of it are in use, and both are served:

tokens=      one token a page. A block's hash is the xxh3-128 hex digest of its own chunk of `_n`
             tokens as uint64 bytes; chunks do not depend on each other. Older LightLLM passes
             64-bit page hashes here, so values up to 2**64 - 1 are tokens.
hash_128s=   one cumulative 128-bit int a page. A block's hash is the last one in it.

The first argument may come without a name, and then the values decide: a list that holds anything
of 2**64 or more cannot be tokens and is hash_128s; any other list is tokens. A wrong guess does no
harm. A real 128-bit hash below 2**64 comes once in 2**64, and hash_128s that are taken for
tokens are stored under the digest of *all* hashes of a block, which two prompts share no sooner
than the hashes themselves. (A lower bound would: tokens taken for hash_128s put every block that
ends in the same token under one key.) A list of both kinds is no sound list of either, so `create`
refuses it unless its generation is named. `query` binds no bytes to a key and need not choose: a
block of an unnamed list without a value of 2**64 counts as stored under either reading, so that
servers which name `hash_128s` in `create` but not in `query`, as LightLLM does, may have hashes of
64 bits as well.

One store should serve one generation: the digest of a chunk of tokens is also the cumulative hash
of a prompt that begins with that chunk.

What differs from the original, apart from what the package is for: bad arguments are ValueErrors
(the original's are ValueErrors or RuntimeErrors); as many pages as tokens or hashes are asked for,
where the original compares numbers of blocks; a read may not name one page twice; another page
size than the store's is an error, where the original empties its files.
"""

from __future__ import annotations

import logging
import operator
import os
import reprlib
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from light_mem.blocks import lengths, store_path, whole_number
from light_mem.closing import Closing
from light_mem.compat_arguments import (
    HASH_128S,
    LIMITS,
    TOKENS,
    argument,
    integers,
    page_row,
    reading_of,
    shards_that_fit,
)
from light_mem.errors import InvalidArgumentError
from light_mem.local_service import LocalCacheService
from light_mem.states import State
from light_mem.task import CacheTask

if TYPE_CHECKING:
    import torch

    from light_mem.compat_arguments import Integers

log = logging.getLogger("light_mem")

# The same class, not a copy: states of both interfaces compare. Values 0 to 3 as in the original.
PyState = State


class PyTask:
    """One `PyLocalCacheService.create` call. Any thread; it pickles as a CacheTask does."""

    __slots__ = ("_task",)

    def __init__(self, task: CacheTask) -> None:
        self._task = task

    def ready(self) -> bool:
        """Whether every block is Finished or Aborted."""
        return self._task.ready()

    def data_safe(self) -> bool:
        """Write: whether the pages may be reused (never later than `ready`). Read: `ready()`."""
        return self._task.data_safe()

    def state(self) -> list[PyState]:
        """The state of each block; only a Finished block's bytes may be used."""
        return self._task.state()

    @property
    def page_already_list(self) -> list[int]:
        """Pages of a write whose blocks were stored when it was created; fixed from then on."""
        return self._task.get_page_already_list()

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until the task is ready, at most `timeout` seconds; returns `ready()`."""
        return self._task.wait(timeout)

    def __await__(self) -> Generator[Any, None, PyTask]:
        """Wait without blocking the event loop; the result is the task itself."""
        yield from self._task.__await__()
        return self

    def __repr__(self) -> str:
        return f"<PyTask of {self._task!r}>"


class PyLocalCacheService(Closing):
    """A LocalCacheService with the constructor and methods of the C++ LightMem.

    kvcache_tensor  uint8 CPU tensor [num_pages, page_bytes], contiguous, as for LocalCacheService
    file            the store: a directory of this name, made when missing. What it holds outlives
                    the service. The original's files `<file>_0`, ... are neither used nor removed
    storage_size    bytes of pages that the store holds at most; allocated at once
    num_shard       shards of a new store; when `storage_size` has no room for a full block in each,
                    so many fewer that little is wasted. A store of fewer shards keeps its number
    num_worker      worker processes, started before the constructor returns

    Raises what LocalCacheService raises: ValueErrors for arguments and for a store of another page
    size, StoreFullError, WorkerStartError. Any thread may call it, none in a forked child.
    The workers end with `close()`, with the object, and with the interpreter.
    """

    def __init__(
        self,
        kvcache_tensor: torch.Tensor,
        file: str | os.PathLike[str],
        storage_size: int = 32 * 1024**3,
        num_shard: int = 32,
        num_worker: int = 16,
    ) -> None:
        directory = store_path(file)
        storage_size = whole_number("storage_size", storage_size, 1, 2**63 - 1)
        num_shard = whole_number("num_shard", num_shard, 1, 2**63 - 1)
        if os.path.isfile(f"{os.fspath(file)}_0"):
            log.warning(
                "%s_0 and its like are files of the C++ LightMem: not used, safe to delete", file
            )
        shape = tuple(getattr(kvcache_tensor, "shape", ()))
        if len(shape) == 2 and all(shape):  # else the service says what is wrong
            num_shard = shards_that_fit(directory, storage_size, num_shard, int(shape[1]))
        self._service = LocalCacheService(
            file=file,
            storage_size=storage_size,
            num_of_shard=num_shard,
            kvcache=kvcache_tensor,
            num_workers=num_worker,
        )
        self._block_size = self._service.block_size()  # bytes of a full block
        self._page_size = self._service.page_size()  # bytes of a page
        self._n = self._service.pages_per_block
        try:
            self._service.run()
        except BaseException:
            self._service.close()
            raise

    def _check_open(self) -> None:
        self._service.__enter__()

    @property
    def service(self) -> LocalCacheService:
        """The service behind this interface: `stats()`, `client()`, `delete()` and the rest."""
        return self._service

    # --- hashes ----------------------------------------------------------------------------------

    def hash(self, tokens: Integers) -> list[str]:
        """The hash of each block, 32 hex digits: xxh3-128 of its own chunk of `_n` tokens.

        The last chunk may be shorter. Raises InvalidArgumentError for what is no unsigned 64-bit
        number.
        """
        return self._keys(TOKENS, integers(TOKENS, tokens, LIMITS[TOKENS]))

    def _hash(self, hash_128s: Integers) -> list[str]:
        # The newer generation's name; its callers count blocks with it.
        return self._keys(HASH_128S, integers(HASH_128S, hash_128s, LIMITS[HASH_128S]))

    def _keys(self, name: str, values: list[int]) -> list[str]:
        n = self._n
        if name == HASH_128S:
            last = [*range(n - 1, len(values), n)]
            if len(values) % n:
                last.append(len(values) - 1)
            return [format(values[at], "032x") for at in last]
        row = np.array(values, np.uint64)
        return [xxhash.xxh3_128_hexdigest(row[at : at + n].data) for at in range(0, len(row), n)]

    # --- look-ups --------------------------------------------------------------------------------

    def query(
        self,
        values: Integers | None = None,
        /,
        *,
        tokens: Integers | None = None,
        hash_128s: Integers | None = None,
    ) -> list[bool]:
        """Whether each block is stored; the last may be shorter. Counts as use for eviction.

        A block that was stored with another number of pages (another
        LIGHTMEM_MAX_BLOCK_SIZE_MB) does not count: it could not be read, and a write replaces it.

        Give tokens or hash_128s, by name or as the first argument; see the module for what an
        unnamed list is. Raises InvalidArgumentError for values that neither can have.
        """
        name, row = argument("query", values, tokens, hash_128s)
        runs = -(-len(row) // self._n)
        pages = lengths(runs, len(row), self._n)
        found: list[bool] = self._service.query(self._keys(name or reading_of(row), row), pages)
        if name or all(found) or reading_of(row) == HASH_128S:
            return found
        other: list[bool] = self._service.query(self._keys(HASH_128S, row), pages)
        return [a or b for a, b in zip(found, other, strict=True)]

    # --- tasks -----------------------------------------------------------------------------------

    def create(
        self,
        values: Integers | None = None,
        /,
        kv_page_indexer: Integers | None = None,
        mode: str | None = None,
        start_pos: int = 0,
        *,
        tokens: Integers | None = None,
        hash_128s: Integers | None = None,
    ) -> PyTask:
        """Write pages to the store, or read them from it; returns at once.

        tokens, hash_128s  one of the two, by name or as the first argument: one value a page
        kv_page_indexer    as many pages of the KV tensor: int32 tensor, or other integers
        mode               "w" or "r" ("write" and "read" too)
        start_pos          skip the blocks before the one that holds this position, 0 to len

        The lists are whole ones: what comes before `start_pos` is not touched, but counted. An
        empty list gives a task that is ready. Raises InvalidArgumentError or PageIndexError (both
        ValueErrors) before anything is queued, TaskTableFullError when the table stays full.
        """
        name, row = argument("create", values, tokens, hash_128s)
        if kv_page_indexer is None or mode is None:
            raise TypeError("create() needs kv_page_indexer and mode")
        if not name:
            name = reading_of(row)
            if name == HASH_128S and min(row) < LIMITS[TOKENS]:
                raise InvalidArgumentError(
                    "an unnamed list with values on both sides of 2**64 is neither tokens nor "
                    "hash_128s for sure: name it, tokens=... or hash_128s=..."
                )
        pages = page_row(kv_page_indexer)
        if len(pages) != len(row):
            raise InvalidArgumentError(
                f"kv_page_indexer has {len(pages)} pages for {len(row)} {name}: give one page each",
                pages=len(pages),
                length=len(row),
            )
        start = operator.index(start_pos)
        if not 0 <= start <= len(row):
            raise InvalidArgumentError(
                f"start_pos {start} is outside 0 to {len(row)}", start_pos=start, length=len(row)
            )
        first = start // self._n
        task = self._service.create(
            mode=mode,
            hash_values=self._keys(name, row)[first:],
            page_indices=pages[first * self._n :],
        )
        return PyTask(task)

    def active_threads(self, mode: str) -> int:
        """Tasks of this mode ("r", "w") that are not ready. No lock, no system call."""
        return self._service.active_create_count(mode)

    def abort(self, t: PyTask) -> None:
        """Stop a task: when this returns it is ready and no worker touches its pages any more.

        Raises LockTimeoutError when a worker is stopped (SIGSTOP) in the middle of a copy,
        InvalidArgumentError for what is no PyTask.
        """
        if not isinstance(t, PyTask):
            raise InvalidArgumentError(f"abort takes a PyTask, not {reprlib.repr(t)}", task=t)
        self._service.abort(t._task)

    # --- the end ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop the workers, abort what waits, leave the store. Calling it again does nothing."""
        self._service.close()
