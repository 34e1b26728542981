"""The file that carries blocks between machines: its bytes by name. `docs/tools.md` has the tables.

A header, then the blocks, then a trailer; each part begins at a multiple of 64 bytes and with its
own magic and crc, so that a reader who meets damage finds the next whole block again. A block's
checksum is the store's own (xxh3-64 over key and bytes): it was taken when the block was first
written, not when it was exported. The blocks last used come first: a store with too little room
gets the most useful ones. All numbers are little-endian.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from light_mem.index.format import crc_of

EXPORT_VERSION = 2
READABLE_VERSIONS = (1, 2)  # the first has no `keep`: there its bytes are zeros
ALIGN = 64

EXPORT_MAGIC = b"LMEXPORT"
EXPORT_HEADER = np.dtype(
    [
        ("magic", "V8"),
        ("version", "<u4"),
        ("crc", "<u4"),  # low half of xxh3-64 over the other bytes; so too below
        ("store_id", "V16"),  # of the store that it came from
        ("page_bytes", "<u8"),
        ("made", "<u8"),  # ns since 1970
        ("blocks", "<u8"),  # how many were meant to follow; the trailer says how many did
        ("spare", "<u8"),
    ]
)

BLOCK_MAGIC = 0x4B4C424D  # "MBLK"
BLOCK_HEADER = np.dtype(
    [
        ("magic", "<u4"),
        ("crc", "<u4"),
        ("low", "<u8"),
        ("high", "<u8"),
        ("nbytes", "<u8"),  # that follow, then zeros up to a multiple of 64
        ("checksum", "<u8"),  # xxh3-64 over the 16 key bytes, then the block's bytes
        ("used", "<u8"),  # last use, ns since 1970
        ("keep", "<u4"),  # time to live and pin, as in the store (docs/format.md)
        ("pad", "<u4"),
        ("spare", "<u8"),
    ]
)

TRAILER_MAGIC = 0x444E454D  # "MEND"
TRAILER = np.dtype(
    [
        ("magic", "<u4"),
        ("crc", "<u4"),
        ("blocks", "<u8"),
        ("nbytes", "<u8"),  # of the blocks, without headers and padding
        ("digest", "V16"),  # xxh3-128, big-endian, over all block headers in their order
        ("spare", "<u8", (3,)),
    ]
)
assert EXPORT_HEADER.itemsize == BLOCK_HEADER.itemsize == TRAILER.itemsize == ALIGN


def padding(nbytes: int) -> int:
    """Zeros after a block of this length."""
    return -nbytes % ALIGN


def sealed(part: npt.NDArray[np.void]) -> bytes:
    """The bytes of one part, its crc filled in."""
    part["crc"] = 0
    part["crc"] = crc_of(part.tobytes())
    return part.tobytes()


def is_sealed(raw: bytes, dtype: np.dtype[np.void]) -> bool:
    """Whether these bytes are a whole part of this kind: its crc fits."""
    if len(raw) < dtype.itemsize:
        return False
    part = np.frombuffer(raw[: dtype.itemsize], dtype).copy()
    found = int(part["crc"][0])
    part["crc"] = 0
    return found == crc_of(part.tobytes())
