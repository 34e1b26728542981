"""The task table while other processes change it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from light_mem import ServiceClosedError
from light_mem.engine import task_table
from light_mem.engine.table_layout import READ
from light_mem.engine.table_memory import Sizes
from light_mem.engine.task_table import TaskTable
from light_mem.index.owners import process_start
from tests.deaths import interleave
from tests.opcodes import LIBRARY
from tests.service_rig import rig

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


@contextmanager
def table() -> Iterator[TaskTable]:
    """A small one."""
    made = TaskTable.create(
        Sizes.for_blocks(64), store="x", page_bytes=1, num_pages=1, pages_per_block=1, workers=1
    )
    try:
        yield made
    finally:
        made.close()


def test_a_table_that_another_user_may_not_open_is_not_called_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = os.open

    def refuse(path: Any, *rest: Any) -> int:
        if str(path).startswith(f"/proc/{os.getpid()}/fd/"):
            raise PermissionError(13, "Permission denied", path)
        return opened(path, *rest)

    monkeypatch.setattr(os, "open", refuse)
    with table() as made:
        address = made.address()
        expected = rf"lives, and /proc/{address.pid}/fd/{address.fd} cannot be reached"
        with pytest.raises(ServiceClosedError, match=expected):
            TaskTable._attach(address)


def test_a_server_that_only_proc_shows_is_not_called_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(pid: int) -> int:  # as to a process of a PID namespace below the server's
        raise ProcessLookupError(3, "No such process")

    monkeypatch.setattr(os, "pidfd_open", unknown)
    expected = "another user, container or PID namespace than the server"
    with table() as made, pytest.raises(ServiceClosedError, match=expected):
        TaskTable._attach(made.address())


def test_a_server_that_has_died_is_gone() -> None:
    with (
        table() as made,
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child,
    ):
        address = made.address()._replace(pid=child.pid, started=process_start(child.pid))
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie still
        for _ in range(2):
            with pytest.raises(ServiceClosedError, match="is gone, or is in another container"):
                TaskTable._attach(address)
            child.wait()


def test_a_service_that_is_closed_is_not_called_barred() -> None:
    with table() as made:
        address = made.address()
    with pytest.raises(ServiceClosedError, match="has closed its service or is gone"):
        TaskTable._attach(address)


def test_a_signals_handler_may_use_a_client_while_another_one_connects(tmp_path: Path) -> None:
    """After any instruction that finds the server's table."""
    files = tuple(str(Path(LIBRARY, name)) for name in ("client.py", "engine/task_table.py"))
    with rig(tmp_path, run=False) as r:
        for at in count(1):
            task_table._tables.clear()  # as in another process
            client, handlers = r.service.client(), r.service.client()
            found, happened = interleave(
                lambda: client.query("a"),  # noqa: B023
                lambda: handlers.query("a"),  # noqa: B023
                at,
                files,
            )
            assert found is False
            assert client._session.table is handlers._session.table
            client.close()
            handlers.close()
            if not happened:
                break
        assert at > 200


def test_a_table_whose_file_was_tidied_up_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no /proc it is a file in the temporary directory, found by its name."""
    monkeypatch.setattr(task_table, "OWN_DESCRIPTORS", "/nowhere")
    table = TaskTable.create(
        Sizes.for_blocks(64), store="x", page_bytes=1, num_pages=1, pages_per_block=1, workers=1
    )
    Path(table.path).unlink()
    table.close()
    assert table.fd == -1
