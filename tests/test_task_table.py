"""The task table while other processes change it."""

from __future__ import annotations

import subprocess
import sys

from light_mem.engine.table_layout import READ
from light_mem.engine.table_memory import Sizes
from light_mem.engine.task_table import TaskTable

FLIP = """
import sys
from light_mem.engine.task_table import TableAddress, TaskTable
table = TaskTable.attach(TableAddress(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]),
                                      int(sys.argv[4]), ""))
active = table.active[:4096]
print("flipping", flush=True)
while True:
    active[::2] = 1
    active[::2] = 0
"""


def test_rows_are_listed_while_other_processes_change_them() -> None:
    table = TaskTable.create(
        Sizes.for_blocks(4096), store="x", page_bytes=1, num_pages=1, pages_per_block=1, workers=1
    )
    table.lanes["rows_top"][0] = 4096
    table.active[1:4096:2] = READ
    address = table.address()
    child = subprocess.Popen(
        [sys.executable, "-c", FLIP, *map(str, address[:4])], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout
        assert child.stdout.readline() == "flipping\n"
        listed = {len(table.active_rows()) for _ in range(4000)}
    finally:
        child.kill()
        child.communicate()
        table.close()
    assert min(listed) >= 2048
    assert len(listed) > 1  # it did change meanwhile
