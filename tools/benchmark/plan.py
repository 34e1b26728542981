"""What is moved in a run: a block shape, the order of pages, and the hash of each block."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Shape:
    """Blocks of `pages` pages of `page_bytes` bytes."""

    page_bytes: int
    pages: int

    @property
    def block_bytes(self) -> int:
        return self.page_bytes * self.pages

    @property
    def name(self) -> str:
        size = self.block_bytes
        text = f"{size / 1e6:.3g} MB" if size >= 1e6 else f"{size / 1e3:.3g} KB"
        return text if self.pages > 1 else f"{text}, one page"


SHAPES = [
    Shape(3840, 64),
    Shape(61440, 64),
    Shape(983040, 64),
    Shape(983040, 1),
    Shape(19660800, 1),
]


@dataclass(frozen=True)
class Plan:
    """`blocks` blocks that together are the whole tensor, in random page order.

    Each pass of writing is a generation: every block gets a hash that was never used before.
    """

    shape: Shape
    blocks: int
    seed: int = 0

    @classmethod
    def of_size(cls, shape: Shape, nbytes: float, at_least: int, seed: int) -> Plan:
        return cls(shape, max(at_least, int(nbytes) // shape.block_bytes), seed)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Plan:
        return cls(Shape(**fields["shape"]), fields["blocks"], fields["seed"])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def num_pages(self) -> int:
        return self.blocks * self.shape.pages

    @property
    def nbytes(self) -> int:
        return self.blocks * self.shape.block_bytes

    def pages(self) -> npt.NDArray[np.int64]:
        """Pages of each block, shape [blocks, pages of a block]."""
        order = np.random.default_rng(self.seed).permutation(self.num_pages)
        return order.reshape(self.blocks, self.shape.pages)

    def rewritten(self) -> npt.NDArray[np.bool_]:
        """The three tenths of the blocks that a mixed pass writes; the others are read."""
        count = max(1, round(0.3 * self.blocks))
        chosen = np.zeros(self.blocks, bool)
        chosen[np.random.default_rng(self.seed + 1).permutation(self.blocks)[:count]] = True
        return chosen
