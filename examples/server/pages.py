"""Pages: K and V of a fixed number of tokens as one row of the KV tensor, and who has which row.

LightMem moves rows of bytes and knows nothing of their contents; the model has a tensor of keys
and one of values a layer and knows nothing of rows. `PageLayout` is all that lies between.

The rows are a place to pass through, as the pinned host memory of a GPU server is: a prefix is
read into rows and copied on into the model's cache; new K and V are copied into rows and written
from there. What keeps recent prefixes in memory is the kernel's page cache over the store.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

import torch
from torch import Tensor

Layers = Sequence[tuple[Tensor, Tensor]]
"""K and V a layer, each `[kv_heads, tokens, head_dim]`."""


@dataclass(frozen=True)
class PageLayout:
    """One page: `[layers, 2 (K and V), kv_heads, tokens_per_page, head_dim]` of `dtype`."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    tokens_per_page: int

    @property
    def page_bytes(self) -> int:
        numbers = self.layers * 2 * self.kv_heads * self.tokens_per_page * self.head_dim
        return numbers * self.dtype.itemsize

    def view(self, kvcache: Tensor) -> Tensor:
        """The rows of `kvcache`, uint8 `[num_pages, page_bytes]`, as numbers; the same memory."""
        page = (self.layers, 2, self.kv_heads, self.tokens_per_page, self.head_dim)
        return kvcache.view(self.dtype).view(-1, *page)

    def empty(self, pages: int) -> Tensor:
        """Room for `pages` pages one after the other: `[layers, 2, kv_heads, tokens, head_dim]`."""
        tokens = pages * self.tokens_per_page
        return torch.empty(self.layers, 2, self.kv_heads, tokens, self.head_dim, dtype=self.dtype)

    def gather(self, numbers: Tensor, rows: Iterable[int], out: Tensor, first: int) -> None:
        """Copy `rows` of `view()` to `out` (see `empty`), from its page `first` on."""
        size = self.tokens_per_page
        for page, row in enumerate(rows, first):
            out[:, :, :, page * size : (page + 1) * size] = numbers[row]

    def scatter(self, numbers: Tensor, row: int, layers: Layers, page: int) -> None:
        """Copy K and V of the tokens of page `page` to row `row` of `view()`."""
        tokens = slice(page * self.tokens_per_page, (page + 1) * self.tokens_per_page)
        for layer, (keys, values) in enumerate(layers):
            numbers[row, layer, 0] = keys[:, tokens]
            numbers[row, layer, 1] = values[:, tokens]


class Task(Protocol):
    """What the pool asks of LightMem's `CacheTask`."""

    def data_safe(self) -> bool: ...
    def wait(self, timeout: float | None = None) -> bool: ...


class PagePool:
    """Rows of the KV tensor that are free, and rows that a task still has in its hands.

    Any thread. A row of a task that reads or writes it must not be used for anything else: for a
    write until its bytes have left it (`data_safe`), for a read until the task is ready.
    """

    def __init__(self, rows: Iterable[int]) -> None:
        self._free = list(rows)
        self._lent: list[tuple[Task, list[int]]] = []
        self._guard = threading.Lock()

    def take(self, count: int, timeout: float = 0.0) -> list[int]:
        """Up to `count` free rows; waits up to `timeout` seconds for a task if there are none."""
        rows = self._take(count)
        if not rows and timeout > 0 and (oldest := self._oldest()) is not None:
            oldest.wait(timeout)
            rows = self._take(count)
        return rows

    def give_back(self, rows: Iterable[int]) -> None:
        """These rows are free again."""
        with self._guard:
            self._free.extend(rows)

    def lend(self, task: Task, rows: list[int]) -> None:
        """These rows are free again once `task` says that they are safe."""
        with self._guard:
            self._lent.append((task, rows))

    def lent(self) -> int:
        """Rows that a task still has."""
        with self._guard:
            self._reap()
            return sum(len(rows) for _, rows in self._lent)

    def drain(self, timeout: float) -> None:
        """Wait up to `timeout` seconds for all tasks that have rows."""
        deadline = monotonic() + timeout
        with self._guard:
            tasks = [task for task, _ in self._lent]
        for task in tasks:
            task.wait(max(0.0, deadline - monotonic()))

    def _take(self, count: int) -> list[int]:
        with self._guard:
            self._reap()
            rows, self._free = self._free[:count], self._free[count:]
            return rows

    def _oldest(self) -> Task | None:
        with self._guard:
            return self._lent[0][0] if self._lent else None

    def _reap(self) -> None:
        waiting = []
        for task, rows in self._lent:
            if task.data_safe():
                self._free.extend(rows)
            else:
                waiting.append((task, rows))
        self._lent = waiting
