"""Host pools that lay out their memory, and name it, as those of SGLang 0.5.23 do."""

from __future__ import annotations

import mmap
import os
from typing import Any

import torch


def shared(dims: tuple[int, ...], dtype: torch.dtype, fds: list[int]) -> torch.Tensor:
    """As SGLang's allocator "shm": a memfd, mapped and kept open."""
    count = int(torch.Size(dims).numel())
    fd = os.memfd_create("sglang_host_pool", os.MFD_CLOEXEC)
    os.ftruncate(fd, count * dtype.itemsize)
    fds.append(fd)
    return torch.frombuffer(mmap.mmap(fd, 0), dtype=dtype, count=count).reshape(dims)


def private(dims: tuple[int, ...], dtype: torch.dtype, fds: list[int]) -> torch.Tensor:
    """As SGLang's default allocator may do: memory of this process alone."""
    return torch.zeros(dims, dtype=dtype)


class HostPool:
    """A host pool with indices [size], a page of `page_size` of them."""

    def __init__(self, pages: int, page_size: int, layout: str, layers: int) -> None:
        self.page_size = page_size
        self.layout = layout
        self.size = pages * page_size
        self.page_num = pages
        self.layer_num = layers
        self.start_layer = 0
        self.end_layer = layers
        self._fds: list[int] = []
        self.kv_buffer: Any = None

    @property
    def logical_page_size(self) -> int:
        return self.page_size

    def close(self) -> None:
        self.kv_buffer = None
        while self._fds:
            os.close(self._fds.pop())


class MHATokenToKVPoolHost(HostPool):
    """K and V of every head: two pieces a page, or two a layer."""

    def __init__(
        self,
        pages: int = 32,
        page_size: int = 4,
        layout: str = "page_first",
        dtype: torch.dtype = torch.float16,
        layers: int = 3,
        heads: int = 2,
        dim: int = 64,
        allocate: Any = shared,
    ) -> None:
        super().__init__(pages, page_size, layout, layers)
        self.dtype = dtype
        self.head_num, self.head_dim, self.v_head_dim = heads, dim, dim
        dims = {
            "layer_first": (2, layers, self.size, heads, dim),
            "page_first": (2, self.size, layers, heads, dim),
            "page_first_direct": (2, pages, layers, page_size, heads, dim),
        }[layout]
        self.kv_buffer = allocate(dims, dtype, self._fds)

    def get_hybrid_pool_buffer(self) -> list[torch.Tensor]:
        return [self.kv_buffer[0], self.kv_buffer[1]]

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        assert len(indices) % self.page_size == 0
        base = self.kv_buffer.data_ptr()
        row = self.head_num * self.head_dim * self.dtype.itemsize
        half = self.layer_num * self.size * row
        starts = indices.tolist()[:: self.page_size]
        if self.layout == "layer_first":
            step, length = self.size * row, self.page_size * row
            addresses = [
                base + start * row + layer * step + part
                for start in starts
                for layer in range(self.layer_num)
                for part in (0, half)
            ]
        else:
            length = self.layer_num * self.page_size * row
            addresses = [
                base + start * self.layer_num * row + part for start in starts for part in (0, half)
            ]
        return addresses, [length] * len(addresses)


class MLATokenToKVPoolHost(HostPool):
    """Compressed KV, the same on all tensor-parallel ranks: one piece a page."""

    def __init__(
        self,
        pages: int = 32,
        page_size: int = 4,
        layout: str = "page_first",
        dtype: torch.dtype = torch.bfloat16,
        layers: int = 3,
        width: int = 96,
        allocate: Any = shared,
    ) -> None:
        super().__init__(pages, page_size, layout, layers)
        self.dtype = dtype
        self.kv_cache_dim = width
        dims = {
            "layer_first": (layers, self.size, 1, width),
            "page_first": (self.size, layers, 1, width),
            "page_first_direct": (pages, layers, page_size, 1, width),
        }[layout]
        self.kv_buffer = allocate(dims, dtype, self._fds)

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        assert len(indices) % self.page_size == 0
        base = self.kv_buffer.data_ptr()
        row = self.kv_cache_dim * self.dtype.itemsize
        starts = indices.tolist()[:: self.page_size]
        if self.layout == "layer_first":
            length = self.page_size * row
            addresses = [
                base + start * row + layer * self.size * row
                for start in starts
                for layer in range(self.layer_num)
            ]
        else:
            length = self.layer_num * self.page_size * row
            addresses = [base + start * self.layer_num * row for start in starts]
        return addresses, [length] * len(addresses)


class StatePool(HostPool):
    """As the pool of recurrent layers: two pieces a page, each in a buffer of its own."""

    def __init__(self, pages: int = 8, temporal: int = 640, conv: int = 96) -> None:
        super().__init__(pages, 1, "page_first", 1)
        self.buffers = [
            shared((pages, temporal), torch.float32, self._fds),
            shared((pages, conv), torch.bfloat16, self._fds),
        ]

    def get_hybrid_pool_buffer(self) -> list[torch.Tensor]:
        return self.buffers

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        found = [(b[i].data_ptr(), b[i].nbytes) for i in indices.tolist() for b in self.buffers]
        return [address for address, _ in found], [length for _, length in found]

    def close(self) -> None:
        self.buffers = []
        super().close()


class LogicalHostPool(HostPool):
    """Indices only, for models whose side pools have all the bytes."""

    def __init__(self, pages: int = 32, page_size: int = 4) -> None:
        super().__init__(pages, page_size, "page_first", 0)

    def get_page_buffer_meta(self, indices: torch.Tensor) -> None:
        return None
