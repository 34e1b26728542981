"""The KV memory, seen in the ways in which its pages are copied."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from light_mem.engine.pieces import SMALL_PAGE_BYTES
from light_mem.engine.places import Bytes1D, Place

# Says who made the processor (Linux, x86: asm/processor.h has the numbers). Not /proc/cpuinfo: to
# open that, Linux before 5.19 asks every core for its frequency.
MODALIAS = Path("/sys/devices/system/cpu/modalias")
_INTEL = "x86,ven0000"


def is_intel() -> bool:
    """Whether this machine's processors are Intel's, where that can be told."""
    try:
        return _INTEL in MODALIAS.read_text()
    except (OSError, UnicodeDecodeError):
        return False


# Intel's processors look ahead over the stores themselves: there the loads are but a step more, 2
# to 4% of a scatter of rows of 1 to 8 KiB (Xeon). On an EPYC 7003 they save a seventh of it.
LOADS_BEFORE_STORES = not is_intel()


class PageViews:
    """Views of one memory of rows, or of bytes: they are made once, for most blocks are of the
    same."""

    def __init__(self, place: Place) -> None:
        memory = self.memory = place.memory
        self.flat = memory.reshape(-1)  # uint8 [bytes]
        if memory.ndim == 1:
            return
        self.row_bytes = int(memory.shape[1])
        # Addresses to load before copying small rows, so that the CPU's page walks and fetches
        # overlap. Gain: 20% at 1 KiB, 10% at 4 KiB, none at 32 KiB (EPYC 7003); 6% at 1 KiB, 0 to
        # 3% above (Intel Xeon).
        self.firsts: Bytes1D | None = None
        self.firsts_to_put: Bytes1D | None = None  # the same, before rows are stored to
        if self.row_bytes < SMALL_PAGE_BYTES:
            self.firsts = memory[:, 0]
            self.firsts_to_put = self.firsts if LOADS_BEFORE_STORES else None
        self.take = memory.take
        # An array of one element a row: `put` copies an element by one call, where an assignment
        # to rows walks an iterator (64 rows of 3,840 bytes: 7.5 against 10.8 us).
        self.element = np.dtype((np.void, self.row_bytes))
        self.put = memory.view(self.element).reshape(-1).put
