"""A /proc of processes only (subset=pid), as some containers have it, or none at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import psutil
import pytest

from light_mem import State
from light_mem.engine import maps, task_table
from light_mem.engine.task_table import TaskTable
from light_mem.filesystem import file_system
from tests.service_rig import rig


def missing(*_: object, **__: object) -> None:
    raise FileNotFoundError(2, "No such file or directory", "/proc/...")


def test_a_server_runs_where_proc_has_processes_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", missing)
    with rig(tmp_path) as r:
        r.write(["a"], [0])
        assert r.read(["a"], [1]).state() == [State.Finished]


def test_a_server_runs_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", missing)
    monkeypatch.setattr(psutil, "disk_partitions", missing)
    monkeypatch.setattr(maps, "MAPS", "/nonexistent")
    monkeypatch.setattr(task_table, "OWN_DESCRIPTORS", "/nonexistent")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert file_system(tmp_path) == ("", "")
    with rig(tmp_path) as r:
        table = TaskTable.attach(r.service.client()._address)
        assert os.path.samefile(table.path, table.lock_path())
        r.write(["a"], [0])
        assert r.read(["a"], [1]).state() == [State.Finished]
        assert r.service.client().query(["a"]) == [True]
    assert {path.name for path in tmp_path.iterdir()} == {"store"}
