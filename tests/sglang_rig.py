"""One rank's life for the tests of the SGLang backend: a host pool, the backend on it, pages whose
bytes follow from their keys. The fixtures are imported by the modules that use them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import sglang_fakes as fakes
from tests.payload import page_bytes_of
from tests.sglang_fake_pools import MHATokenToKVPoolHost

PAGES, PAGE = 32, 4  # pages of a pool, indices of a page
UNTOUCHED = 0xA5


def key(n: int) -> str:
    """A key as SGLang makes it."""
    return hashlib.sha256(str(n).encode()).hexdigest()


KEYS = [key(n) for n in range(8)]


def indices_of(pages: Sequence[int], page_size: int = PAGE) -> torch.Tensor:
    """SGLang's host indices of these pages."""
    return torch.cat([torch.arange(n * page_size, (n + 1) * page_size) for n in pages])


class Life:
    """One rank's life: a host pool and the backend on it, made as SGLang's factory does."""

    def __init__(
        self, module: Any, store: Path, pool: Any, side_pools: dict[str, Any], **changes: Any
    ) -> None:
        self.pool = pool
        self.side_pools = side_pools
        options = {
            "backend_name": "light_mem",
            "module_path": fakes.BACKEND,
            "class_name": "LightMemStorage",
            "interface_v1": 1,
            "allocator": "shm",
            "file": str(store),
            "storage_size": 1 << 21,
            "num_of_shard": 1,
            "num_workers": 1,
            "weights": "w",
            **changes.pop("options", {}),
        }
        self.backend: Any = None
        try:
            self.backend = module.LightMemStorage(fakes.config(options, **changes), {})
            self.backend.register_mem_pool_host(pool)
            for name, side_pool in {"kv": pool, **side_pools}.items():
                self.backend.register_mem_host_pool_v2(side_pool, fakes.PoolName(name))
            self.backend.on_host_pools_registered()
        except BaseException:
            self.end()
            raise

    def pieces(self, page: int, pool: Any = None) -> list[np.ndarray[Any, Any]]:
        """The memory of a page, in the order of its bytes."""
        pool = self.pool if pool is None else pool
        addresses, lengths = pool.get_page_buffer_meta(indices_of([page], pool.page_size))
        memories = pool.buffers if pool.kv_buffer is None else [pool.kv_buffer]
        flat = [m.view(-1).view(torch.uint8) for m in memories]
        found = []
        for address, length in zip(addresses, lengths, strict=True):
            home = next(m for m in flat if m.data_ptr() <= address < m.data_ptr() + m.nbytes)
            start = address - home.data_ptr()
            found.append(home[start : start + length].numpy())
        return found

    def fill(self, k: str, page: int, pool: Any = None) -> None:
        pieces = self.pieces(page, pool)
        data = page_bytes_of(k, 0, sum(map(len, pieces)))
        for piece in pieces:
            piece[:], data = data[: len(piece)], data[len(piece) :]

    def blank(self, pages: Sequence[int], pool: Any = None) -> None:
        for page in pages:
            for piece in self.pieces(page, pool):
                piece[:] = UNTOUCHED

    def is_blank(self, page: int) -> bool:
        return all((piece == UNTOUCHED).all() for piece in self.pieces(page))

    def holds(self, k: str, page: int, pool: Any = None) -> bool:
        found = np.concatenate(self.pieces(page, pool))
        return bool(np.array_equal(found, page_bytes_of(k, 0, len(found))))

    def store(self, keys: Sequence[str], pages: Sequence[int]) -> list[bool]:
        for k, page in zip(keys, pages, strict=True):
            self.fill(k, page)
        return self.backend.batch_set_v1(list(keys), indices_of(pages))

    def load(self, keys: Sequence[str], pages: Sequence[int]) -> list[bool]:
        self.blank(pages)
        return self.backend.batch_get_v1(list(keys), indices_of(pages))

    def hits(self, keys: Sequence[str]) -> int:
        return self.backend.batch_exists(list(keys))

    def end(self) -> None:
        if self.backend is not None:
            self.backend.close()
        for pool in [self.pool, *self.side_pools.values()]:
            pool.close()


Live = Callable[..., Life]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with fakes.installed(monkeypatch) as module:
        yield module


@pytest.fixture
def live(module: Any, tmp_path: Path) -> Iterator[Live]:
    """Makes lives on one store; all end."""
    lives: list[Life] = []

    def make(pool: Any = None, side_pools: dict[str, Any] | None = None, **changes: Any) -> Life:
        pool = pool or MHATokenToKVPoolHost()
        lives.append(Life(module, tmp_path / "store", pool, side_pools or {}, **changes))
        return lives[-1]

    yield make
    for life in lives:
        life.end()
