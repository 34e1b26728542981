"""What LMCache believes to be stored: keys and lengths, for its quotas and events.

LightMem evicts by itself and keeps hashes, not keys. So the adapter remembers the keys that it told
LMCache of, in the order of their use, up to the bytes that the store has room for: what is pushed
out here has in all likelihood been evicted there.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Entries(NamedTuple):
    """Keys and their lengths in bytes."""

    keys: list[Any]
    sizes: list[int]


class Ledger:
    """Keys of this life of the server by use, least recently used first. Any thread."""

    def __init__(self, capacity: int) -> None:
        """`capacity`: bytes that the store has room for."""
        self._capacity = capacity
        self._sizes: OrderedDict[Any, int] = OrderedDict()
        self._total = 0
        self._guard = threading.Lock()

    def __len__(self) -> int:
        return len(self._sizes)

    def stored(self, keys: Sequence[Any], sizes: Sequence[int]) -> tuple[Entries, Entries]:
        """These keys are stored now; which of them are new, and which others they push out."""
        new, out = Entries([], []), Entries([], [])
        with self._guard:
            for key, size in zip(keys, sizes, strict=True):
                if key in self._sizes:
                    self._sizes.move_to_end(key)
                    continue
                self._sizes[key] = size
                self._total += size
                new.keys.append(key)
                new.sizes.append(size)
            while self._total > self._capacity and self._sizes:
                key, size = self._sizes.popitem(last=False)
                self._total -= size
                out.keys.append(key)
                out.sizes.append(size)
        return new, out

    def used(self, keys: Iterable[Any]) -> None:
        """These keys were looked up and found."""
        with self._guard:
            for key in keys:
                if key in self._sizes:
                    self._sizes.move_to_end(key)

    def gone(self, keys: Iterable[Any]) -> Entries:
        """These keys are not stored any more; those of them that were listed."""
        out = Entries([], [])
        with self._guard:
            for key in keys:
                size = self._sizes.pop(key, None)
                if size is not None:
                    self._total -= size
                    out.keys.append(key)
                    out.sizes.append(size)
        return out
