"""System calls that Python knows and that the kernel does not, or that a sandbox forbids."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import light_mem
from light_mem import InvalidArgumentError, SharedMemoryFullError, descriptors
from light_mem.engine import task_table
from light_mem.engine.process import is_alive
from light_mem.engine.table_memory import Sizes
from light_mem.index.owners import process_start
from tests.children import ROOT
from tests.service_child import Child, pack
from tests.service_rig import WAIT, rig

PIDFD_OPEN = 434  # of every architecture
MEMFD_CREATE = {"x86_64": 319, "aarch64": 279}
REFUSALS = [errno.ENOSYS, errno.EPERM]


@pytest.mark.skipif(os.uname().machine not in MEMFD_CREATE, reason="the call's number")
@pytest.mark.parametrize("code", REFUSALS)
def test_a_service_runs_where_the_kernel_refuses(tmp_path: Path, code: int) -> None:
    calls = map(str, (PIDFD_OPEN, MEMFD_CREATE[os.uname().machine]))
    child = subprocess.run(
        [sys.executable, "-m", "tests.refusing_child", str(tmp_path), str(code), *calls],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if child.stdout.startswith("skip"):
        pytest.skip(child.stdout)
    assert child.stdout == "fine\n", child.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"store"}


@pytest.mark.parametrize("code", REFUSALS)
def test_a_refused_descriptor_is_none(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pidfd_open", refuse)
    monkeypatch.setattr(os, "memfd_create", refuse)
    assert descriptors.pidfd(os.getpid()) == descriptors.memory_object("test") == -1
    assert is_alive(os.getpid(), process_start(os.getpid()))


@pytest.fixture
def without_memfd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of temporary files, of a process that may have no memfd."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(os, "memfd_create", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_table_that_is_a_file_has_no_name_that_a_killed_server_would_leave(
    tmp_path: Path, without_memfd: Path
) -> None:
    script = f"""
client = unpack(*hear())
say(client.create("r", ["a"], [1]).wait({WAIT}))
"""
    with rig(tmp_path) as r, Child(script) as child:
        assert os.readlink(r.service._session.table.lock_path()).startswith(str(without_memfd))
        assert list(without_memfd.iterdir()) == []
        r.write(["a"], [0])
        child.say(pack(r.service.client()))
        assert child.hear() == [True]
        assert child.end() == 0
        assert r.holds("a", [1])


@pytest.mark.parametrize("has_proc", [True, False])
def test_a_table_that_cannot_be_made_leaves_no_file(
    without_memfd: Path, monkeypatch: pytest.MonkeyPatch, has_proc: bool
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(os, "ftruncate", fail)
    if not has_proc:
        monkeypatch.setattr(task_table, "OWN_DESCRIPTORS", "/nonexistent")
    with pytest.raises(InvalidArgumentError, match="ulimit -f"):
        task_table.TaskTable.create(
            Sizes(1, 4, 4, 4), store="", page_bytes=1, num_pages=1, pages_per_block=1, workers=1
        )
    assert list(without_memfd.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the room of others' files is not looked at")
def test_a_tensor_that_is_a_file_has_its_room(without_memfd: Path) -> None:
    tensor = light_mem.allocate_kvcache(64, 4096)
    (number,) = (
        number
        for number in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{number}")
        and os.readlink(f"/proc/self/fd/{number}").startswith(str(without_memfd))
    )
    assert os.stat(f"/proc/self/fd/{number}").st_blocks * 512 >= tensor.nbytes


def test_a_tensor_for_whose_file_there_is_no_room_is_an_error(
    without_memfd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SharedMemoryFullError, match=str(without_memfd)) as caught:
        light_mem.allocate_kvcache(64, 4096)
    assert caught.value.needed == 64 * 4096
    assert len(os.listdir("/proc/self/fd")) == before


def test_want_of_descriptors_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pidfd_open", fail)
    monkeypatch.setattr(os, "memfd_create", fail)
    with pytest.raises(OSError, match="open files"):
        descriptors.pidfd(os.getpid())
    with pytest.raises(OSError, match="open files"):
        descriptors.memory_object("test")
