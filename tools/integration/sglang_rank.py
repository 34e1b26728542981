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
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    count_pool_hits,
)
from sglang.srt.mem_cache.storage import StorageBackendFactory

MARK = "@@ "
UNTOUCHED = 0xA5


def key_of(n: int) -> str:
    """A key as SGLang makes it: the SHA-256 of something, in hexadecimal."""
    return hashlib.sha256(f"page {n}".encode()).hexdigest()


class Backend:
    """Host pools and the backend that SGLang's factory makes for them: the pool kv, and with
    `states` a side pool of that many recurrent states."""

    def __init__(
        self,
        kind: str,
        layout: str,
        tokens: int,
        extra_config: dict[str, Any],
        config: dict[str, Any],
        states: int = 0,
    ) -> None:
        with sglang_cpu.Settings(extra_config, layout):
            self.group = sglang_cpu.host_pools(kind, sglang_cpu.device_pool(kind, tokens))
            self.pools: dict[str, Any] = {"kv": self.group.anchor_entry.host_pool}
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
                "dynamic", HiCacheStorageConfig(**{**fields, **config}), self.pools["kv"]
            )
            self.backend.register_mem_pool_host(self.pools["kv"])
            for entry in self.group.entries:
                self.backend.register_mem_host_pool_v2(entry.host_pool, entry.name)
            if states:
                self.pools["mamba"] = sglang_cpu.state_pool(states)
                self.backend.register_mem_host_pool_v2(self.pools["mamba"], PoolName.MAMBA)
            self.backend.on_host_pools_registered()

    def indices(self, pool: str, pages: list[int]) -> torch.Tensor:
        size = self.pools[pool].page_size
        return torch.cat([torch.arange(n * size, (n + 1) * size) for n in pages])

    def payload(self, pool: str, n: int, salt: str) -> torch.Tensor:
        """The bytes of page key `n`, as the pool's flat page."""
        like = self.pools[pool].get_dummy_flat_data_page()
        digest = hashlib.sha256(f"{pool}:{salt}:{n}".encode()).digest()
        seed = int.from_bytes(digest[:8], "little")
        raw = np.random.default_rng(seed).integers(0, 256, like.nbytes, np.uint8)
        return torch.from_numpy(raw).view(like.dtype)

    def put(self, pool: str, page: int, data: torch.Tensor) -> None:
        host_pool = self.pools[pool]
        host_pool.set_from_flat_data_page(page * host_pool.page_size, data)

    def page_bytes(self, pool: str, page: int) -> torch.Tensor:
        host_pool = self.pools[pool]
        data = host_pool.get_data_page(page * host_pool.page_size, flat=True)
        return data.contiguous().view(torch.uint8)

    def fill(self, pool: str, byte: int) -> list[torch.Tensor]:
        """All memory of a pool, filled."""
        host_pool = self.pools[pool]
        buffers = [host_pool.kv_buffer] if pool == "kv" else host_pool.get_hybrid_pool_buffer()
        flat = [buffer.view(-1).view(torch.uint8) for buffer in buffers]
        for memory in flat:
            memory[:] = byte
        return flat

    def move(self, which: str, pool: str, numbers: list[int], pages: list[int]) -> list[bool]:
        """As SGLang's controller does it: of the pool kv by itself, of side pools by transfers."""
        keys, indices = [key_of(n) for n in numbers], self.indices(pool, pages)
        if pool == "kv":
            move = getattr(self.backend, f"batch_{which}_v1")
            done: list[bool] = move(keys, indices, HiCacheStorageExtraInfo())
            return done
        transfer = PoolTransfer(PoolName(pool), host_indices=indices, keys=keys)
        results = getattr(self.backend, f"batch_{which}_v2")([transfer])
        done = results[transfer.name]
        assert count_pool_hits(results)[pool] == [*done, False].index(False)
        return done

    def store(self, pool: str, numbers: list[int], pages: list[int], salt: str) -> list[bool]:
        for n, page in zip(numbers, pages, strict=True):
            self.put(pool, page, self.payload(pool, n, salt))
        done = self.move("set", pool, numbers, pages)
        self.fill(pool, 0)  # nothing that is loaded was here
        return done

    def load(self, pool: str, numbers: list[int], pages: list[int], salt: str) -> dict[str, Any]:
        """`done` of each page, `right`: whether it has its bytes, `strays`: bytes of other pages
        that changed, `seconds`."""
        memory = self.fill(pool, UNTOUCHED)
        began = time.monotonic()
        done = self.move("get", pool, numbers, pages)
        seconds = time.monotonic() - began
        right = []
        for n, page in zip(numbers, pages, strict=True):
            wanted = self.payload(pool, n, salt)
            right.append(torch.equal(self.page_bytes(pool, page), wanted.view(torch.uint8)))
            blank = torch.full((wanted.nbytes,), UNTOUCHED, dtype=torch.uint8)
            self.put(pool, page, blank.view(wanted.dtype))
        strays = sum(int((part != UNTOUCHED).sum()) for part in memory)
        return {"done": done, "right": right, "strays": strays, "seconds": seconds}

    def usable(self, numbers: list[int]) -> list[int]:
        """The prefixes that both pools can serve, when a state at their end is wanted."""
        wanted = PoolTransfer(
            PoolName.MAMBA, keys=["last"], hit_policy=PoolHitPolicy.TRAILING_PAGES
        )
        found = self.backend.batch_exists_v2([key_of(n) for n in numbers], [wanted])
        return list(found.restorable_prefix_pages)

    def sample(self, n: int, salt: str) -> str:
        """Bytes from the middle of a page, in hexadecimal: to be found in the store's files."""
        raw = self.payload("kv", n, salt).view(torch.uint8)
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
        return self._backends[name].store("kv", numbers, pages, salt)

    def load(self, name: str, numbers: list[int], pages: list[int], salt: str) -> Any:
        return self._backends[name].load("kv", numbers, pages, salt)

    def store_states(
        self, name: str, numbers: list[int], slots: list[int], salt: str
    ) -> list[bool]:
        return self._backends[name].store("mamba", numbers, slots, salt)

    def load_states(self, name: str, numbers: list[int], slots: list[int], salt: str) -> Any:
        return self._backends[name].load("mamba", numbers, slots, salt)

    def usable(self, name: str, numbers: list[int]) -> list[int]:
        return self._backends[name].usable(numbers)

    def sample(self, name: str, n: int, salt: str) -> str:
        return self._backends[name].sample(n, salt)

    def about(self, name: str) -> dict[str, str]:
        found = self._backends[name]
        return {
            "pool": type(found.pools["kv"]).__name__,
            "allocator": type(found.pools["kv"].allocator).__name__,
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
