"""Processes without standard streams: their numbers are nothing of ours."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from light_mem import allocate_kvcache
from light_mem.descriptors import keep_standard_numbers
from light_mem.engine.kvmemory import close_source, share_tensor
from light_mem.engine.shard_header import map_whole
from light_mem.engine.table_memory import Sizes
from light_mem.engine.task_table import TaskTable
from light_mem.index.kept_lock import KeptFileLock
from light_mem.index.owners import Owners
from light_mem.maintenance import verify
from light_mem.maintenance.scan_process import ScanProcess
from tests.children import ROOT


@pytest.mark.parametrize("closed", ["<&-", "<&- >&- 2>&-"])
def test_a_server_without_standard_streams_serves(tmp_path: Path, closed: str) -> None:
    command = shlex.join([sys.executable, "-m", "tests.without_streams_child", str(tmp_path)])
    subprocess.run(
        ["sh", "-c", f"exec {command} {closed}"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )
    right, *streams = (tmp_path / "said").read_text().split()
    assert right == "True"
    # A library may have been first, for a file of its own: Debian's libffi keeps itself open.
    assert os.devnull in streams or closed == "<&-"
    assert not [name for name in streams if "memfd" in name or str(tmp_path) in name]
    assert verify(tmp_path / "store").clean


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_command_without_standard_streams_ends_with_its_exit_code(
    store: Path, closed: str
) -> None:
    verified = shlex.join([sys.executable, "-m", "light_mem", "verify", str(store)])
    missing = shlex.join([sys.executable, "-m", "light_mem", "verify", str(store / "none")])
    # Said by a shell that has its streams: those of the commands are closed.
    script = f"{verified} {closed}; echo $? >&3; {missing} {closed}; echo $? >&3"
    said = subprocess.run(
        ["sh", "-c", f"( {script} ) 3>&1 >/dev/null"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert said.stdout.split() == ["0", "2"], said.stderr
    assert "Traceback" not in said.stderr


@pytest.fixture
def no_input() -> Iterator[None]:
    """This process without standard input."""
    kept = os.dup(0)
    os.close(0)
    try:
        yield
    finally:
        os.dup2(kept, 0)
        os.close(kept)


@pytest.mark.usefixtures("no_input")
@pytest.mark.parametrize(
    "what", ["tensor", "source", "table", "owners", "lock", "shard", "scan process"]
)
def test_what_lives_long_has_no_standard_number(tmp_path: Path, what: str) -> None:
    if what == "tensor":
        kept = allocate_kvcache(1, 4096)
    elif what == "source":
        kept = allocate_kvcache(1, 4096)
        os.close(0)
        close_source(share_tensor(kept))
    elif what == "table":
        TaskTable.create(
            Sizes.for_blocks(64), store="x", page_bytes=1, num_pages=1, pages_per_block=1, workers=1
        ).close()
    elif what == "owners":
        Owners(tmp_path).close()
    elif what == "lock":
        with KeptFileLock(str(tmp_path / "lock")):
            pass
    elif what == "shard":
        (tmp_path / "data").write_bytes(bytes(4096))
        _, descriptor = map_whole(tmp_path / "data", 4096, b"")
        os.close(descriptor)
    else:
        ScanProcess().close()
    assert os.readlink("/proc/self/fd/0") == os.devnull


@pytest.mark.usefixtures("no_input")
def test_streams_that_are_open_stay() -> None:
    before = os.readlink("/proc/self/fd/1"), os.readlink("/proc/self/fd/2")
    keep_standard_numbers()
    assert (os.readlink("/proc/self/fd/1"), os.readlink("/proc/self/fd/2")) == before
    assert not os.get_inheritable(0)
