"""The recovery tool, as a library; `light-mem` shows it to people.

report.py           what the tools found and did, as NamedTuples
store.py            a store seen from outside: nothing locked, joined, made or changed
owners.py           who has it open
opening.py          an existing store opened for changes
inspecting.py       its numbers, and its blocks one by one
structure.py        whether a shard's entries, chains, counters and records agree
data.py             whether the bytes of blocks fit their checksums, by several threads or processes
data_file.py        a shard's data file, read block by block
scanning.py         many small blocks of it at once
scan_process.py     the same in a process, for the thread that owns it
scan_child.py       that process
verifying.py        both together; `check` for programs
repairing.py        what was found put right
rebuilding.py       the index made anew from the shard files
in_place.py         the same under running servers
changing.py         clear, evict, resize
compacting.py       blocks moved to the front of a shard that gets shorter
transfer_format.py  the export file: its bytes by name
reading.py          a block's bytes, read from outside
exporting.py        a store, or some of it, into one file
export_file.py      that file read again, damaged or not
importing.py        its blocks into a store

Names are imported when they are first used: the process of `scan_child.py` needs none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from light_mem.lazy import names

if TYPE_CHECKING:
    from light_mem.maintenance.changing import clear, evict, resize
    from light_mem.maintenance.exporting import export_store
    from light_mem.maintenance.importing import import_store
    from light_mem.maintenance.inspecting import blocks, inspect
    from light_mem.maintenance.rebuilding import rebuild
    from light_mem.maintenance.report import (
        BlockReport,
        ChangeReport,
        DamagedBlock,
        Finding,
        RebuildReport,
        StoreReport,
        TransferReport,
        VerifyReport,
    )
    from light_mem.maintenance.verifying import check, verify

_HOMES = {  # of the names in __all__; the others are reports
    "blocks": "inspecting",
    "check": "verifying",
    "clear": "changing",
    "evict": "changing",
    "export_store": "exporting",
    "import_store": "importing",
    "inspect": "inspecting",
    "rebuild": "rebuilding",
    "resize": "changing",
    "verify": "verifying",
}

__all__ = [
    "BlockReport",
    "ChangeReport",
    "DamagedBlock",
    "Finding",
    "RebuildReport",
    "StoreReport",
    "TransferReport",
    "VerifyReport",
    "blocks",
    "check",
    "clear",
    "evict",
    "export_store",
    "import_store",
    "inspect",
    "rebuild",
    "resize",
    "verify",
]

__getattr__, __dir__ = names(__name__, __all__, _HOMES, "report")
