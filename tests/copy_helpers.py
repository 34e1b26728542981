"""Copies of one block between rows and slots, and the checksum that they are to have."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xxhash

from light_mem.engine.copy import new_checksum
from light_mem.engine.gather import Gatherer
from light_mem.engine.places import Rows
from light_mem.engine.scatter import Scatterer
from light_mem.engine.sinks import MappedSink
from light_mem.index.keys import key_bytes

KEY = (0x0123456789ABCDEF, 0xFEDCBA9876543210)


def gather(
    gatherer: Gatherer,
    memory: np.ndarray,
    rows: np.ndarray,
    slots: np.ndarray,
    stopped: Callable[[], bool] | None = None,
) -> int:
    """Gather a block of KEY; its checksum."""
    parts = [(Rows(memory, rows), MappedSink(slots.reshape(-1)))]
    [found] = gatherer.plan([(*KEY, parts)]).run(stopped)
    return found


def scatter(
    slots: np.ndarray,
    memory: np.ndarray,
    rows: np.ndarray,
    stopped: Callable[[], bool] | None = None,
) -> int:
    """Scatter a block of KEY; its checksum."""
    checksum = new_checksum(*KEY)
    Scatterer().scatter([(Rows(memory, rows), slots.reshape(-1), checksum)], stopped)
    return checksum.intdigest()


def memory_of(page_bytes: int, rows: int = 9) -> np.ndarray:
    return np.random.default_rng(page_bytes).integers(0, 256, (rows, page_bytes), np.uint8)


def expected_sum(data: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(key_bytes(*KEY) + data.tobytes())
