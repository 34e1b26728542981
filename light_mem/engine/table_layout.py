"""What the task table's memory holds, and the states of a block in it."""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

# States of a cell. The first four are the public ones; COPIED is Working for everyone but
# `data_safe`: the bytes have left the KV pages, so the block must not be copied from them again.
INITIAL, WORKING, FINISHED, ABORTED, COPIED = range(5)
READ, WRITE = 1, 2
CLOSED, SERVER_GONE = 1, 2  # values of `shutdown`

MAGIC = b"LMTABLE7"
NAME = "lightmem-tasks"  # of the memory object, in /proc/<pid>/fd
MAX_WORKERS = 128  # worker 0 stands for the server
CLIENT_LANES = 63
MAX_BLOCKS = 1 << 22  # a lane: page indices of all lanes are numbered with 32 bits
MAX_PATH_BYTES = 2047
PAGES_PER_CELL = 16  # room for page indices; a table full of 64-page blocks holds a quarter as many
WORDS_PER_REGION = 4  # of page indices: offset and length, 64 bits each

HEADER = np.dtype(
    [
        ("magic", "V8"),
        ("table_id", "S32"),
        ("server_pid", "<u8"),
        ("server_started", "<f8"),
        ("lanes", "<u4"),
        ("rows", "<u4"),  # a lane
        ("cells", "<u4"),  # a lane
        ("pages", "<u4"),  # a lane
        ("workers", "<u4"),
        ("pages_per_block", "<u4"),
        ("page_bytes", "<u8"),
        ("num_pages", "<u8"),
        ("shutdown", "<u4"),  # not 0: workers leave when they find no work, nobody queues anything
        ("work_seq", "<u4"),  # futex: changes when blocks are queued
        ("done_seq", "<u4"),  # futex: changes when a task is ready
        ("server_fd", "<u4"),  # descriptor of this table in the server
        ("read_head", "<u8"),
        ("read_tail", "<u8"),
        ("write_head", "<u8"),
        ("write_tail", "<u8"),
        ("restarts", "<u8"),  # workers replaced
        ("to_wake", "<u8"),  # workers that whoever queued has left to the one that it woke
        ("store", f"S{MAX_PATH_BYTES + 1}"),  # the store's directory
        ("store_id", "S32"),
        ("store_device", "<u8"),  # which directory that was when the server opened it
        ("store_inode", "<u8"),
    ]
)
LANE = np.dtype(
    [
        ("pid", "<u8"),
        ("started", "<f8"),
        ("queried", "<u8"),  # hashes asked for
        ("hits", "<u8"),  # ... and stored
        ("present", "<u8"),  # blocks of writes that were stored already
        ("missing", "<u8"),  # blocks of reads that were not stored
        ("read_tasks", "<u8"),
        ("write_tasks", "<u8"),
        ("dropped", "<u8"),  # blocks that were to be stored and never became a task
        ("cells_top", "<u8"),  # cells and rows beyond these were never used: memory not touched
        ("rows_top", "<u8"),
    ]
)
WORKER_COUNTERS = (
    "blocks_written",
    "bytes_written",
    "blocks_present",
    "blocks_read",
    "bytes_read",
    "missing",
    "lost_races",
    "damaged",
    "no_room",
    "stopped",
    "failed",
    "write_ns",
    "read_ns",
)
WORKER = np.dtype(
    [
        ("pid", "<u8"),
        ("started", "<f8"),
        ("ready", "<u8"),
        ("done", "<u8"),  # tasks it completed; makes its values of futex words its own
        *[(name, "<u8") for name in WORKER_COUNTERS],
    ]
)
ROW = np.dtype(
    [
        ("generation", "<u4"),
        ("done", "<u4"),  # futex: changes when the task is ready
        ("abort", "<u4"),
        ("start", "<u4"),  # first cell, global
        ("count", "<u4"),
        ("pad", "<u4"),
        ("created", "<u8"),  # monotonic ns, the same clock in all processes
    ]
)
CELL = np.dtype(
    [
        ("low", "<u8"),
        ("high", "<u8"),
        ("nbytes", "<u8"),  # length of the block
        ("pages", "<u4"),  # first page index, global
        ("places", "<u4"),  # page indices; or, where `regions` is set, regions
        ("row", "<u4"),
        ("worker", "<u2"),
        ("attempts", "u1"),
        ("mode", "u1"),
        ("regions", "<u4"),  # 1: the block is regions of the KV memory, not pages
        ("home", "<u4"),  # the worker that had better do it, see `dealing`; 0: any
        ("listed", "<u8"),  # read: where the index listed it, entry + 1; 0: nobody has looked
        ("mixed", "<u8"),  # write: the key's `keys.mix`, which says its shard and its chain
    ]
)


# A CELL, field by field: to unpack one costs a tenth of what an array's fields do.
CELL_FIELDS = struct.Struct("<3Q3IH2B2I2Q")
assert CELL_FIELDS.size == CELL.itemsize


class Cells(NamedTuple):
    """The fields of some cells, as CELL names them; each by position among those cells."""

    low: tuple[int, ...]
    high: tuple[int, ...]
    nbytes: tuple[int, ...]
    pages: tuple[int, ...]
    places: tuple[int, ...]
    row: tuple[int, ...]
    worker: tuple[int, ...]
    attempts: tuple[int, ...]
    mode: tuple[int, ...]
    regions: tuple[int, ...]
    home: tuple[int, ...]
    listed: tuple[int, ...]
    mixed: tuple[int, ...]


assert Cells._fields == CELL.names


def words_of(dtype: np.dtype[np.void]) -> dict[str, int]:
    """Which 8-byte word each field of a record begins in."""
    return {name: offset // 8 for name, (_, offset, *_) in (dtype.fields or {}).items()}


def is_final(states: bytes) -> bool:
    """Whether every state is FINISHED or ABORTED."""
    return not (INITIAL in states or WORKING in states or COPIED in states)


def is_safe(states: bytes) -> bool:
    """Whether every block's bytes have left the KV pages."""
    return not (INITIAL in states or WORKING in states)
