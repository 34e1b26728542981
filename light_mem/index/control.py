"""The control page of one shard: its numbers as attributes.

An array's item costs ten times as much as a memoryview's, and a change of the shard asks for a
dozen of them under the shard's lock. Each is one aligned word, read and stored at once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from light_mem.index.format import CONTROL, WORD_MASK


class _Number:
    def __init__(self, name: str) -> None:
        self._at = CONTROL.fields[name][1] // 8  # type: ignore[index]

    def __get__(self, control: Control, _: type[Control]) -> int:
        return control.words[self._at]

    def __set__(self, control: Control, value: int) -> None:
        # A damaged page may say less than what is taken from it: a word is all that is stored.
        control.words[self._at] = value & WORD_MASK


class Control:
    """See `format.CONTROL` for what each number says. Changed under the shard's lock."""

    dirty = _Number("dirty")
    epoch = _Number("epoch")
    unlinks = _Number("unlinks")
    blocks = _Number("blocks")
    used_slots = _Number("used_slots")
    evictions = _Number("evictions")
    inserts = _Number("inserts")
    removals = _Number("removals")
    pinned = _Number("pinned")
    pinned_slots = _Number("pinned_slots")
    expires = _Number("expires")
    leased = _Number("leased")

    def __init__(self, page: npt.NDArray[np.void]) -> None:
        """`page`: CONTROL [1], the shared one."""
        self.words: memoryview = page.view(np.uint64).reshape(-1).data
