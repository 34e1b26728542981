"""The smallest LMCache that the adapter can be imported with: types as in LMCache 0.5.6, no logic.

`installed(monkeypatch)` puts it into `sys.modules` and imports the adapter against it. The rest
makes what LMCache hands to an adapter: an L1 pool in `/dev/shm`, keys, objects.
`tools/integration/lmcache_restart.py` compares the types with the real ones.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import mmap
import os
import sys
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    import pytest

ADAPTER = "light_mem.integrations.lmcache.adapter"


@dataclass(frozen=True)
class ObjectKey:
    chunk_hash: bytes
    model_name: str
    kv_rank: int
    object_group_id: int = 0
    cache_salt: str = ""


@dataclass(frozen=True)
class MemoryLayoutDesc:
    shapes: list[Any]
    dtypes: list[Any]


@dataclass(frozen=True)
class L1MemoryDesc:
    ptr: int
    size: int
    align_bytes: int
    stable_registration_size: int | None = None


class L2StoreResult(int):
    def __new__(cls, success: bool, bytes_transferred: int) -> L2StoreResult:
        return super().__new__(cls, bytes_transferred if success else -1)

    def is_successful(self) -> bool:
        return int(self) >= 0

    def bytes_transferred(self) -> int:
        return max(0, int(self))


@dataclass(frozen=True)
class AdapterUsage:
    total_bytes_used: int
    total_capacity_bytes: int
    bytes_by_cache_salt: Mapping[str, int] = field(default_factory=dict)


class Bitmap:
    def __init__(self, size: int) -> None:
        self._bits = [False] * size

    def batched_set(self, indices: Sequence[int]) -> None:
        for at in indices:
            self._bits[at] = True

    def test(self, index: int) -> bool:
        return self._bits[index]

    def size(self) -> int:
        return len(self._bits)


class EventNotifier:
    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._fd

    def notify(self) -> None:
        os.eventfd_write(self._fd, 1)

    def consume(self) -> None:
        os.eventfd_read(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class L2AdapterInterface(ABC):
    def __init__(self, max_capacity_bytes: int = 0) -> None:
        self._listeners: list[Any] = []
        self._max_capacity_bytes = max_capacity_bytes
        self._usage_lock = threading.Lock()
        self._by_salt: dict[str, int] = {}

    @abstractmethod
    def get_store_event_fd(self) -> int: ...

    @abstractmethod
    def get_lookup_and_lock_event_fd(self) -> int: ...

    @abstractmethod
    def get_load_event_fd(self) -> int: ...

    @abstractmethod
    def submit_store_task(self, keys: list[Any], objects: list[Any]) -> int: ...

    @abstractmethod
    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]: ...

    @abstractmethod
    def submit_lookup_and_lock_task(
        self, keys: list[Any], group_layout_descs: dict[int, MemoryLayoutDesc]
    ) -> int: ...

    @abstractmethod
    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None: ...

    @abstractmethod
    def submit_unlock(self, keys: list[Any]) -> None: ...

    @abstractmethod
    def submit_load_task(self, keys: list[Any], objects: list[Any]) -> int: ...

    @abstractmethod
    def query_load_result(self, task_id: int) -> Bitmap | None: ...

    @abstractmethod
    def close(self) -> None: ...

    def register_listener(self, listener: Any) -> None:
        self._listeners.append(listener)

    @property
    def supports_global_eviction(self) -> bool:
        return self._max_capacity_bytes > 0

    def delete(self, keys: list[Any]) -> None:
        return None

    def get_usage(self) -> AdapterUsage:
        with self._usage_lock:
            return AdapterUsage(sum(self._by_salt.values()), 0, dict(self._by_salt))

    def report_status(self) -> dict[str, Any]:
        return {"is_healthy": True}

    def _notify_keys_stored(self, keys: list[Any], sizes: list[int]) -> None:
        self._account(keys, sizes, 1)
        for listener in self._listeners:
            listener.on_l2_keys_stored(keys, sizes)

    def _notify_keys_accessed(self, keys: list[Any]) -> None:
        for listener in self._listeners:
            listener.on_l2_keys_accessed(keys)

    def _notify_keys_deleted(self, keys: list[Any], sizes: list[int]) -> None:
        self._account(keys, sizes, -1)
        for listener in self._listeners:
            listener.on_l2_keys_deleted(keys)

    def _account(self, keys: list[Any], sizes: list[int], sign: int) -> None:
        with self._usage_lock:
            for key, size in zip(keys, sizes, strict=True):
                salt = key.cache_salt
                self._by_salt[salt] = self._by_salt.get(salt, 0) + sign * size
                assert self._by_salt[salt] >= 0


class Listener:
    """Keys by what an adapter said of them."""

    def __init__(self) -> None:
        self.stored: list[Any] = []
        self.accessed: list[Any] = []
        self.deleted: list[Any] = []

    def on_l2_keys_stored(self, keys: list[Any], sizes: list[int]) -> None:
        self.stored += keys

    def on_l2_keys_accessed(self, keys: list[Any]) -> None:
        self.accessed += keys

    def on_l2_keys_deleted(self, keys: list[Any]) -> None:
        self.deleted += keys


# --- in the place of LMCache ----------------------------------------------------------------------


class FakeModule(ModuleType):
    """A module that is a package too."""

    __path__: list[str] = []  # noqa: RUF012


def _modules() -> dict[str, dict[str, Any]]:
    distributed = "lmcache.v1.distributed"
    return {
        "lmcache": {"__version__": "0.5.6"},
        "lmcache.lmcache_native": {"Bitmap": Bitmap},
        "lmcache.logging": {"init_logger": logging.getLogger},
        f"{distributed}.api": {"ObjectKey": ObjectKey, "MemoryLayoutDesc": MemoryLayoutDesc},
        f"{distributed}.internal_api": {
            "L1MemoryDesc": L1MemoryDesc,
            "L2StoreResult": L2StoreResult,
        },
        f"{distributed}.l2_adapters.base": {
            "AdapterUsage": AdapterUsage,
            "L2AdapterInterface": L2AdapterInterface,
        },
        "lmcache.v1.platform": {"create_event_notifier": EventNotifier},
    }


@contextmanager
def installed(patch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of the adapter, imported against the fakes; both are gone afterwards."""
    for name, content in _modules().items():
        parts = name.split(".")
        for n in range(1, len(parts)):
            parent = ".".join(parts[:n])
            if not isinstance(sys.modules.get(parent), FakeModule):
                patch.setitem(sys.modules, parent, FakeModule(parent))
        module = FakeModule(name)
        module.__dict__.update(content)
        patch.setitem(sys.modules, name, module)
    sys.modules.pop(ADAPTER, None)
    try:
        yield importlib.import_module(ADAPTER)
    finally:
        sys.modules.pop(ADAPTER, None)


class MemoryObject:
    """An object of the L1 pool: `nbytes` at an address, as float16 [nbytes / 2] if it is even."""

    def __init__(self, address: int, nbytes: int, dtype: Any = None) -> None:
        if dtype is None:
            dtype = torch.uint8 if nbytes % 2 else torch.float16
        self.data_ptr = address
        self.valid = True
        self._nbytes = nbytes
        self._dtype = dtype

    def is_valid(self) -> bool:
        return self.valid

    def get_size(self) -> int:
        return self._nbytes

    def get_shapes(self) -> list[Any]:
        return [torch.Size([self._nbytes // self._dtype.itemsize])]

    def get_dtypes(self) -> list[Any]:
        return [self._dtype]

    def layout(self) -> MemoryLayoutDesc:
        return MemoryLayoutDesc(self.get_shapes(), self.get_dtypes())


class L1Pool:
    """The L1 pool as LMCache makes it: shared memory, objects at multiples of 4096."""

    def __init__(self, nbytes: int) -> None:
        self.path = Path(f"/dev/shm/lmcache_l1_pool_{uuid.uuid4().hex}")
        self._fd = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        os.ftruncate(self._fd, nbytes)
        self._map = mmap.mmap(self._fd, nbytes)
        self.array: Any = np.frombuffer(self._map, np.uint8)
        self.description = L1MemoryDesc(int(self.array.ctypes.data), nbytes, 4096)
        self._end = 0

    def allocate(self, nbytes: int, dtype: Any = None) -> MemoryObject:
        address = self.description.ptr + self._end
        self._end += -(-nbytes // 4096) * 4096
        assert self._end <= self.description.size
        return MemoryObject(address, nbytes, dtype)

    def forget_all(self) -> None:
        """Give all room out again."""
        self._end = 0

    def bytes_of(self, obj: MemoryObject) -> Any:
        start = obj.data_ptr - self.description.ptr
        return self.array[start : start + obj.get_size()]

    def close(self) -> None:
        """As LMCache does it: BufferError when somebody holds the memory as a buffer."""
        self.array = None
        self._map.close()
        os.close(self._fd)
        self.path.unlink()


class PrivatePool:
    """A pool that other processes cannot map, as LMCache's lazy allocator makes it."""

    def __init__(self, nbytes: int) -> None:
        self._memory = (ctypes.c_uint8 * nbytes)()
        self.description = L1MemoryDesc(ctypes.addressof(self._memory), nbytes, 4096)
