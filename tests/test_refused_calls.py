"""System calls that Python knows and that the kernel does not, or that a sandbox forbids."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from light_mem import descriptors
from light_mem.engine.process import is_alive
from light_mem.index.owners import process_start
from tests.children import ROOT

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


def test_want_of_descriptors_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pidfd_open", fail)
    monkeypatch.setattr(os, "memfd_create", fail)
    with pytest.raises(OSError, match="open files"):
        descriptors.pidfd(os.getpid())
    with pytest.raises(OSError, match="open files"):
        descriptors.memory_object("test")
