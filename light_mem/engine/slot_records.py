"""The records of one shard's slots, mapped: `shard-NNN.slots` says whose the pages are.

They make the index expendable: a record a slot, written before the block is found in the index and
cleared when the block is taken out.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from light_mem.engine.shard_header import header_bytes, map_whole, slots_path
from light_mem.index import format as fmt
from light_mem.index.description import Geometry
from light_mem.index.format import crc_of
from light_mem.index.recovery import record_crcs, states_of
from light_mem.index.written import Written

_KEEP_WORD = fmt.RECORD.fields["keep"][1] // 8  # type: ignore[index]  # of a record: keep and crc
# A `format.RECORD` up to its crc, and the crc. To pack a record costs a part of what a table of one
# does.
_RECORD, _CRC = struct.Struct("<6Q3I"), struct.Struct("<I")
assert _RECORD.size == fmt.RECORD_CRC_BYTES
assert _RECORD.size + _CRC.size == fmt.RECORD.itemsize


class SlotRecords:
    """A shard's records in this process. Any process may hold them; they are written only by the
    process whose intents name the slots, or under the shard's lock."""

    def __init__(self, directory: Path, geometry: Geometry, shard: int) -> None:
        self._slots, descriptor = map_whole(
            slots_path(directory, shard),
            fmt.slots_file_bytes(geometry.slots),
            header_bytes(fmt.SLOTS_MAGIC, geometry, shard),
        )
        os.close(descriptor)  # a mapping keeps one of its own: three a shard are enough
        self.records: npt.NDArray[np.void] = np.frombuffer(
            self._slots, fmt.RECORD, geometry.slots, fmt.SHARD_HEADER_BYTES
        )
        self._tags = self.records["tag"].data
        self._words = self.records.view("<u8").reshape(geometry.slots, -1)[:, _KEEP_WORD]

    def write_records(self, blocks: Sequence[Written]) -> None:
        """Describe blocks whose bytes are in place; the record of a block's first slot comes
        after those of its further runs."""
        for block in blocks:
            for at in range(1, len(block.runs)):
                self._put_records([block._replace(runs=block.runs[at:], keep=0)], fmt.EXTENT)
        self._put_records(blocks, fmt.LIVE)

    def _put_records(self, blocks: Sequence[Written], state: int) -> None:
        slots, size, first = self._slots, fmt.RECORD.itemsize, fmt.SHARD_HEADER_BYTES
        for low, high, checksum, nbytes, runs, used, keep in blocks:
            slot, run = runs[0]
            next_run = runs[1][0] + 1 if len(runs) > 1 else 0
            record = _RECORD.pack(low, high, state, checksum, nbytes, used, run, next_run, keep)
            at = first + slot * size
            slots[at : at + size] = record + _CRC.pack(crc_of(record))

    def set_keep(self, slot: int, keep: int) -> None:
        """Set the `keep` of the stored block at `slot`, by one store, so that no kill tears it."""
        record = self.records[slot : slot + 1].copy()
        if record_crcs(record) != [int(record["crc"][0])]:
            return  # damaged: a fitting crc would make it believed
        record["keep"] = keep
        record["crc"] = record_crcs(record)
        self._words[slot] = record.view("<u8")[_KEEP_WORD]

    def follow_keeps(self, entries: npt.NDArray[np.void]) -> None:
        """Make the records say what the entries, ENTRY [slots], do: a holder of the shard's lock
        may have died between the two."""
        records = self.records
        differ = (records["keep"] != entries["keep"]) & (states_of(records) == fmt.LIVE)
        differ &= states_of(entries) == fmt.LIVE
        for slot in np.flatnonzero(differ).tolist():
            self.set_keep(slot, int(entries["keep"][slot]))

    def clear_records(self, starts: Sequence[int] | npt.NDArray[np.intp]) -> None:
        """The blocks that began at these slots are gone."""
        tags = self._tags
        if isinstance(starts, np.ndarray):
            starts = starts[np.asarray(tags)[starts] != fmt.FREE].tolist()
        for start in starts:
            if tags[start] != fmt.FREE:  # leaves clean pages clean
                tags[start] = fmt.FREE

    def sync(self) -> None:
        """Put the records on the device; raises OSError."""
        _sync_map(self._slots)


def _sync_map(mapping: mmap.mmap) -> None:
    mapping.flush()
