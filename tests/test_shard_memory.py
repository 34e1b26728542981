"""What it costs a process to map a shard in which it writes nothing."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from light_mem.engine.shard_file import ShardFile
from light_mem.engine.shard_header import data_path, slots_path
from light_mem.index import format as fmt
from tests.engine_helpers import geometry_of

SLOTS = 4 << 20
PAGE = 64


def test_a_process_that_only_reads_a_shard_takes_no_memory_for_each_slot(tmp_path: Path) -> None:
    for path, size in (
        (data_path(tmp_path, 0), fmt.data_file_bytes(SLOTS, PAGE)),
        (slots_path(tmp_path, 0), fmt.slots_file_bytes(SLOTS)),
    ):
        path.touch()
        os.truncate(path, size)  # sparse
    process = psutil.Process()
    before = process.memory_info().rss
    file = ShardFile(tmp_path, geometry_of(SLOTS, page_bytes=PAGE), 0)
    try:
        assert not file.bytes(SLOTS - 1, 1).any()
        assert process.memory_info().rss - before < SLOTS
    finally:
        file.close()
