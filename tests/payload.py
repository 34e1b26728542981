"""Bytes that a block's key determines, so that wrong bytes show themselves."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import numpy.typing as npt


def page_bytes_of(key: object, page: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """The bytes of the `page`-th page of the block `key`, uint8 [nbytes]."""
    seed = int.from_bytes(blake2b(f"{key!r}:{page}".encode(), digest_size=8).digest(), "little")
    return np.random.Generator(np.random.SFC64(seed)).integers(0, 256, nbytes, np.uint8)


def block_bytes_of(key: object, pages: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """All pages of the block `key`, uint8 [pages, nbytes]."""
    return np.stack([page_bytes_of(key, n, nbytes) for n in range(pages)])
