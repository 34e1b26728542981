"""One rank of `sglang_backend.py`: real pools and backends in a process, told what to do by lines.

A line of standard input is a command, JSON `[name, arguments...]`; the answer is a line of standard
output, JSON behind a mark. A process holds several backends, each with a pool of its own, by name.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import sglang_cpu
import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, HiCacheStorageExtraInfo
from sglang.srt.mem_cache.storage import StorageBackendFactory

MARK = "@@ "
UNTOUCHED = 0xA5


def key_of(n: int) -> str:
    """A key as SGLang makes it: the SHA-256 of something, in hexadecimal."""
    return hashlib.sha256(f"page {n}".encode()).hexdigest()


class Backend:
    """A host pool and the backend that SGLang's factory makes for it."""

    def __init__(
        self,
        kind: str,
        layout: str,
        tokens: int,
        extra_config: dict[str, Any],
        config: dict[str, Any],
    ) -> None:
        with sglang_cpu.Settings(extra_config, layout):
            self.group = sglang_cpu.host_pools(kind, sglang_cpu.device_pool(kind, tokens))
            self.pool = self.group.anchor_entry.host_pool
            fields = {
                "tp_rank": 0,
                "tp_size": 1,
                "pp_rank": 0,
                "pp_size": 1,
                "attn_cp_rank": 0,
                "attn_cp_size": 1,
                "is_mla_model": kind == "mla",
                "enable_storage_metrics": False,
                "is_page_first_layout": layout == "page_first",
                "model_name": "model",
                "extra_config": extra_config,
            }
            self.backend = StorageBackendFactory.create_backend(
                "dynamic", HiCacheStorageConfig(**{**fields, **config}), self.pool
            )
            self.backend.register_mem_pool_host(self.pool)
            for entry in self.group.entries:
                self.backend.register_mem_host_pool_v2(entry.host_pool, entry.name)
            self.backend.on_host_pools_registered()

    def start_of(self, page: int) -> int:
        return page * sglang_cpu.PAGE_SIZE

    def indices(self, pages: list[int]) -> torch.Tensor:
        size = sglang_cpu.PAGE_SIZE
        return torch.cat([torch.arange(n * size, (n + 1) * size) for n in pages])

    def payload(self, n: int, salt: str) -> torch.Tensor:
        """The bytes of page key `n`, as the pool's flat page."""
        like = self.pool.get_dummy_flat_data_page()
        digest = hashlib.sha256(f"{salt}:{n}".encode()).digest()
        seed = int.from_bytes(digest[:8], "little")
        raw = np.random.default_rng(seed).integers(0, 256, like.nbytes, np.uint8)
        return torch.from_numpy(raw).view(like.dtype)

    def page_bytes(self, page: int) -> torch.Tensor:
        return self.pool.get_data_page(self.start_of(page), flat=True).view(torch.uint8)

    def store(self, numbers: list[int], pages: list[int], salt: str) -> list[bool]:
        for n, page in zip(numbers, pages, strict=True):
            self.pool.set_from_flat_data_page(self.start_of(page), self.payload(n, salt))
        done = self.backend.batch_set_v1(
            [key_of(n) for n in numbers], self.indices(pages), HiCacheStorageExtraInfo()
        )
        self.pool.kv_buffer.view(torch.uint8)[:] = 0  # nothing that is loaded was here
        return done

    def load(self, numbers: list[int], pages: list[int], salt: str) -> dict[str, Any]:
        """`done` of each page, `right`: whether it has its bytes, `strays`: other pages that
        changed, `seconds`."""
        everything = self.pool.kv_buffer.view(torch.uint8)
        everything[:] = UNTOUCHED
        began = time.monotonic()
        done = self.backend.batch_get_v1(
            [key_of(n) for n in numbers], self.indices(pages), HiCacheStorageExtraInfo()
        )
        seconds = time.monotonic() - began
        wanted = [self.payload(n, salt).view(torch.uint8) for n in numbers]
        found = [self.page_bytes(page) for page in pages]
        right = [bool(torch.equal(a, b)) for a, b in zip(found, wanted, strict=True)]
        for page in pages:
            blank = torch.full((found[0].nbytes,), UNTOUCHED, dtype=torch.uint8)
            self.pool.set_from_flat_data_page(self.start_of(page), blank.view(self.pool.dtype))
        strays = int((everything != UNTOUCHED).sum())
        return {"done": done, "right": right, "strays": strays, "seconds": seconds}

    def sample(self, n: int, salt: str) -> str:
        """Bytes from the middle of a page, in hexadecimal: to be found in the store's files."""
        raw = self.payload(n, salt).view(torch.uint8)
        middle = len(raw) // 2
        return bytes(raw[middle - 64 : middle].tolist()).hex()


class Rank:
    """The commands."""

    def __init__(self) -> None:
        self._backends: dict[str, Backend] = {}

    def open(self, name: str, arguments: dict[str, Any]) -> Any:
        """None, or the error of a backend that refuses to start."""
        try:
            self._backends[name] = Backend(**arguments)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    def exists(self, name: str, numbers: list[int]) -> int:
        found: int = self._backends[name].backend.batch_exists([key_of(n) for n in numbers])
        return found

    def store(self, name: str, numbers: list[int], pages: list[int], salt: str) -> list[bool]:
        return self._backends[name].store(numbers, pages, salt)

    def load(self, name: str, numbers: list[int], pages: list[int], salt: str) -> Any:
        return self._backends[name].load(numbers, pages, salt)

    def sample(self, name: str, n: int, salt: str) -> str:
        return self._backends[name].sample(n, salt)

    def about(self, name: str) -> dict[str, str]:
        found = self._backends[name]
        return {
            "pool": type(found.pool).__name__,
            "allocator": type(found.pool.allocator).__name__,
            "backend": type(found.backend).__name__,
            "version": sglang_cpu.VERSION,
        }

    def clear(self, name: str) -> bool:
        done: bool = self._backends[name].backend.clear()
        return done

    def close(self, name: str) -> None:
        self._backends.pop(name).backend.close()

    def differences(self) -> list[str]:
        """What of the fakes that the tests use is not as it is in SGLang."""
        import sglang_compare

        return sglang_compare.differences()


def serve(commands: object) -> None:
    """Do what standard input says, until it ends."""
    answer(None)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        command: Callable[..., Any] = getattr(commands, name)
        answer(command(*arguments))


def answer(value: Any) -> None:
    print(MARK + json.dumps(value), flush=True)


if __name__ == "__main__":
    serve(Rank())
