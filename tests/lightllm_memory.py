"""LightLLM's side of the CPU cache, in miniature: pages in System V shared memory, their counts.

`Segment` allocates the way LightLLM does (shmget with a key, shmat, numpy over ctypes, torch over
numpy); `CpuCache` has the methods and attributes that its disk cache worker touches.
"""

from __future__ import annotations

import ctypes
import os
import random
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

from tests.payload import page_bytes_of

IPC_CREAT, IPC_EXCL, IPC_RMID = 0o1000, 0o2000, 0
_libc = ctypes.CDLL(None, use_errno=True)
_libc.shmget.argtypes = (ctypes.c_long, ctypes.c_size_t, ctypes.c_int)
_libc.shmat.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_libc.shmat.restype = ctypes.c_void_p
_libc.shmdt.argtypes = (ctypes.c_void_p,)


class Segment:
    """A new System V segment, attached here; detached when nothing uses its memory any more."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.shmid = -1
        while self.shmid < 0:
            key = random.SystemRandom().randrange(1, 1 << 31)
            self.shmid = _libc.shmget(key, nbytes, 0o600 | IPC_CREAT | IPC_EXCL)
            if self.shmid < 0 and ctypes.get_errno() != 17:  # EEXIST: another key
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        address = _libc.shmat(self.shmid, None, 0)
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._memory = (ctypes.c_uint8 * nbytes).from_address(address)
        weakref.finalize(self._memory, _libc.shmdt, address).atexit = False

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The memory as LightLLM sees it."""
        flat = np.frombuffer(memoryview(self._memory), dtype=np.uint8)
        return torch.from_numpy(flat).view(dtype).view(*shape)

    def remove(self) -> None:
        """Let the segment go with the last process that has it attached."""
        remove_segment(self.shmid)


def remove_segment(shmid: int) -> None:
    _libc.shmctl(shmid, IPC_RMID, None)


@dataclass
class PageItem:
    """What is known of one page: whose bytes it holds and how many users keep it."""

    hash_key: int = 0
    ref_count: int = 0


class SleepLock:
    """A lock with the method names of LightLLM's; waiting polls every millisecond."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def acquire_sleep1ms(self) -> None:
        while not self._lock.acquire(blocking=False):
            time.sleep(0.001)

    def release(self) -> None:
        self._lock.release()

    def held(self) -> bool:
        return self._lock.locked()


class CpuCache:
    """Stands in for `CpuKvCacheClient`: pages with reference counts and a list of what to offload.

    The tensor is [pages, layers, tokens a page, heads, head dim], bfloat16, as LightLLM's.
    """

    def __init__(self, pages: int, page_bytes: int) -> None:
        layers, heads, dim = 2, 2, 32
        tokens = page_bytes // (2 * layers * heads * dim)
        self.segment = Segment(pages * page_bytes)
        self.cpu_kv_cache_tensor = self.segment.tensor(
            (pages, layers, tokens, heads, dim), torch.bfloat16
        )
        self.bytes = self.cpu_kv_cache_tensor.flatten(1).view(dtype=torch.uint8)
        self.lock = SleepLock()
        self.page_items = SimpleNamespace(linked_items=[PageItem() for _ in range(pages)])
        self._groups: list[list[int]] = []

    # --- what the worker calls ---------------------------------------------------------------

    def get_pages_to_offloading(self) -> list[list[int]]:
        assert self.lock.held()
        groups, self._groups = self._groups, []
        return groups

    def deref_pages(self, page_list: Sequence[int]) -> None:
        assert self.lock.held()
        for page in page_list:
            item = self.page_items.linked_items[page]
            assert item.ref_count > 0, f"page {page} was let go twice"
            item.ref_count -= 1

    # --- what tests call ---------------------------------------------------------------------

    def offload(self, hashs: Sequence[int], pages: Sequence[int]) -> None:
        """Queue a prompt's pages for the disk, each with one more user."""
        self.lock.acquire_sleep1ms()
        self.hold(hashs, pages)
        self._groups.append(list(pages))
        self.lock.release()

    def hold(self, hashs: Sequence[int], pages: Sequence[int]) -> None:
        for key, page in zip(hashs, pages, strict=True):
            self.page_items.linked_items[page].hash_key = key
            self.page_items.linked_items[page].ref_count += 1

    def users(self) -> int:
        """References that somebody still has to let go."""
        return sum(item.ref_count for item in self.page_items.linked_items)

    def fill(self, hashs: Sequence[int], pages: Sequence[int]) -> None:
        """Give each page the bytes that its hash determines."""
        for key, page in zip(hashs, pages, strict=True):
            self.bytes[page] = self._expected(key)

    def wipe(self) -> None:
        self.bytes.fill_(0xEE)

    def wiped(self, pages: Sequence[int]) -> bool:
        return all(bool((self.bytes[page] == 0xEE).all()) for page in pages)

    def holds(self, hashs: Sequence[int], pages: Sequence[int]) -> bool:
        return all(
            torch.equal(self.bytes[page], self._expected(key))
            for key, page in zip(hashs, pages, strict=True)
        )

    def _expected(self, key: int) -> torch.Tensor:
        return torch.from_numpy(page_bytes_of(key, 0, self.bytes.shape[1]))
