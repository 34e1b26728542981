"""The on-disk format: bytes by name. `docs/format.md` says the same in tables.

All numbers are little-endian. Every offset follows from the field before it. A change here is a
new FORMAT_VERSION, of the index alone a new INDEX_VERSION; `tests/test_format.py` compares literal
bytes and the document.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

FORMAT_VERSION = 2
INDEX_VERSION = 3  # of the index file alone: one of another version is made anew
BLOCK_ALIGN = 4096  # sections start on a page of the kernel, so that they can be mapped and synced

# --- slot state: the low byte of a tag ---------------------------------------------------------
FREE = 0  # no block starts here (inner slots of a run are FREE too)
WRITING = 1  # first slot of a block that is being copied; invisible
LIVE = 2  # first slot of a stored block
EXTENT = 3  # first slot of a further run of a block that is not contiguous
HELD = 4  # first slot of a block that was taken out while it was leased: neither stored nor free

# A tag is one aligned 64-bit number, so that one store changes state and generation together:
# bits 0-7 state, 8-23 owner (index in the owners file), 32-63 generation.
STATE_MASK = 0xFF
OWNER_SHIFT = 8
OWNER_MASK = 0xFFFF
GENERATION_SHIFT = 32
GENERATION_MASK = 0xFFFFFFFF
_BELOW_GENERATION = (1 << GENERATION_SHIFT) - 1
WORD_MASK = (1 << 64) - 1  # all bits of one number


def make_tag(state: int, owner: int, generation: int) -> int:
    """A tag from its parts; the generation wraps at 32 bits."""
    return state | owner << OWNER_SHIFT | (generation & GENERATION_MASK) << GENERATION_SHIFT


def next_tag(tag: int, state: int, owner: int = 0) -> int:
    """The tag that follows upon `tag`: of the next generation."""
    return (tag | _BELOW_GENERATION) + 1 & WORD_MASK | owner << OWNER_SHIFT | state


def live_tag(tag: int) -> int:
    """The tag of what was WRITING, once it is stored: of the same generation."""
    return tag & ~_BELOW_GENERATION | LIVE


def state_of(tag: int) -> int:
    """The state in a tag, also in one of an array."""
    return int(tag) & STATE_MASK


def states_of(tags: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The states in tags, of the same shape."""
    return np.asarray(tags & np.uint64(STATE_MASK))


# --- entry (index) and record (slots file), 64 bytes each: one cache line ------------------------
_COMMON = [
    ("low", "<u8"),  # key, low half
    ("high", "<u8"),  # key, high half
    ("tag", "<u8"),
    ("checksum", "<u8"),  # xxh3-64 over the 16 key bytes, then the block's bytes
    ("nbytes", "<u8"),  # length of the block
    ("used", "<u8"),  # when it was stored, ns since 1970; an entry's last use is in `uses`
    ("run", "<u4"),  # slots in this run
    ("next_run", "<u4"),  # first slot + 1 of the next run of the block, 0: none
]
ENTRY = np.dtype([*_COMMON, ("next", "<u4"), ("keep", "<u4")])  # next: slot + 1 in the chain
RECORD = np.dtype([*_COMMON, ("keep", "<u4"), ("crc", "<u4")])  # crc: low half of xxh3-64 of 0..59
RECORD_CRC_BYTES = 60
assert ENTRY.itemsize == RECORD.itemsize == 64

# How long a block is kept: bit 31 set while it is pinned; bits 0-30 the second since 2020 (UTC)
# from which on it counts as absent when it is not pinned, 0: none. A pin leaves the time alone.
KEEP_PINNED = 1 << 31
KEEP_TIME_MASK = KEEP_PINNED - 1
KEEP_EPOCH = 1577836800  # 2020-01-01T00:00:00Z in seconds since 1970

# --- index file: header, one control page a shard, heads, entries, uses --------------------------
INDEX_MAGIC = b"LMINDEX\x00"
INDEX_HEADER = np.dtype(
    [
        ("magic", "V8"),
        ("version", "<u4"),
        ("crc", "<u4"),  # low half of xxh3-64 over the geometry fields below
        ("store_id", "V16"),
        ("page_bytes", "<u8"),
        ("shards", "<u4"),
        ("slots", "<u4"),  # a shard
        ("buckets", "<u4"),  # a shard; a power of two
        ("clean", "<u4"),  # 1: synced by the last owner that left
        ("boot_id", "V16"),  # of the kernel that may hold unsynced pages of this file
        ("lookups", "<u8"),  # hashes that servers asked for ever; a statistic, not exact
        ("hits", "<u8"),  # ... and found
    ]
)
INDEX_HEADER_CRC = ("version", "store_id", "page_bytes", "shards", "slots", "buckets")

JOURNAL_LENGTH = 448
CONTROL = np.dtype(
    [
        ("dirty", "<u8"),  # CHANGING or RELINKING while held; found set: the holder died
        ("epoch", "<u8"),  # changes of the free space ever made; the journal's write position
        ("unlinks", "<u8"),  # chains cut ever; a look-up that missed looks again when it moved
        ("blocks", "<u8"),  # stored blocks
        ("used_slots", "<u8"),  # slots of stored blocks and of blocks being written
        ("evictions", "<u8"),
        ("inserts", "<u8"),
        ("removals", "<u8"),  # deleted, cleared, damaged, replaced; evictions not among them
        ("damaged", "<u8"),  # blocks whose bytes did not fit their checksum
        ("pinned", "<u8"),  # pinned blocks
        ("pinned_slots", "<u8"),  # ... and their slots
        # no stored block's time is up before this second of `keep`; 0: none has
        ("expires", "<u8"),
        ("leased", "<u8"),  # 1: blocks may be leased: look into the owners file; 0: none is
        ("spare", "<u8", (51,)),
        ("journal", "<u8", (JOURNAL_LENGTH,)),  # last changes of free space: see `JOURNAL_FREED`
    ]
)
assert CONTROL.itemsize == BLOCK_ALIGN
# What a dead holder was at. After a change every stored block can still be found, and the next
# holder has time to put the shard in order; while chains were linked anew, blocks are missing.
CHANGING, RELINKING = 1, 2
# A journal record: first slot in bits 32-63, length in bits 0-30, bit 31 set: freed, else taken.
JOURNAL_FREED = 1 << 31
JOURNAL_LENGTH_MASK = JOURNAL_FREED - 1

# --- shard files: `shard-NNN.data` and `shard-NNN.slots` open with the same header ----------------
DATA_MAGIC = b"LMDATA\x00\x00"
SLOTS_MAGIC = b"LMSLOTS\x00"
SHARD_HEADER = np.dtype(
    [
        ("magic", "V8"),
        ("version", "<u4"),
        ("crc", "<u4"),  # low half of xxh3-64 over the fields below
        ("store_id", "V16"),
        ("page_bytes", "<u8"),
        ("shard", "<u4"),
        ("shards", "<u4"),
    ]
)
SHARD_HEADER_CRC = ("version", "store_id", "page_bytes", "shard", "shards")
SHARD_HEADER_BYTES = BLOCK_ALIGN  # slots and records start here

# --- owners file: one record a process that has the store open ------------------------------------
MAX_OWNERS = 1024
MAX_INTENTS = 112  # blocks that one process may be filling at a time
MAX_LEASES = 384  # blocks that one process may be looking at in place at a time
OWNER = np.dtype(
    [
        ("pid", "<u8"),  # 0: the process left in order
        ("started", "<f8"),  # start time of the process, s since 1970: for people, not identity
        ("kind", "S16"),  # "server", "worker", "client", "tool"
        ("joined", "<u8"),  # ns since 1970
        ("spare", "<u8", (11,)),
        ("intents", "<u8", (MAX_INTENTS,)),  # see `slot_word`; 0: none
        ("leases", "<u8", (MAX_LEASES,)),  # the same, of blocks whose slots are not given away
    ]
)
assert OWNER.itemsize == BLOCK_ALIGN
ShardSlot = tuple[int, int]  # shard, first slot of a block


def slot_word(shard: int, slot: int) -> int:
    """How an owner's record names a block."""
    return 1 + (shard << 32 | slot)


def named_slot(word: int) -> ShardSlot:
    """The block that a word of an owner's record, not 0, names."""
    return word - 1 >> 32, word - 1 & 0xFFFFFFFF


def align(n: int) -> int:
    """`n` rounded up to a multiple of BLOCK_ALIGN."""
    return -(-n // BLOCK_ALIGN) * BLOCK_ALIGN


def buckets_for(slots: int) -> int:
    """Buckets of a shard: the power of two that is not below `slots`, at least 64."""
    return max(64, 1 << (slots - 1).bit_length())


class IndexLayout(NamedTuple):
    """Byte offsets of the sections of the index file, and its size."""

    control: int
    heads: int
    entries: int
    uses: int
    size: int


def index_layout(shards: int, slots: int) -> IndexLayout:
    """Where the sections of an index of `shards` shards of `slots` slots lie."""
    control = BLOCK_ALIGN
    heads = control + shards * CONTROL.itemsize
    entries = align(heads + 4 * shards * buckets_for(slots))
    uses = align(entries + ENTRY.itemsize * shards * slots)
    return IndexLayout(control, heads, entries, uses, align(uses + 8 * shards * slots))


def data_file_bytes(slots: int, page_bytes: int) -> int:
    """Size of a shard's data file: the header, then `slots` pages without gaps."""
    return SHARD_HEADER_BYTES + slots * page_bytes


def slots_file_bytes(slots: int) -> int:
    """Size of a shard's slots file: the header, then a record a slot."""
    return SHARD_HEADER_BYTES + RECORD.itemsize * slots


def crc_of(raw: bytes) -> int:
    """What every `crc` holds: the low half of xxh3-64 over these bytes."""
    return xxhash.xxh3_64_intdigest(raw) & 0xFFFFFFFF


def header_crc(header: np.ndarray, fields: tuple[str, ...]) -> int:
    """The crc over the named fields, in their order on disk."""
    return crc_of(b"".join(header[f].tobytes() for f in fields))
