"""What workers and other children are told at their start, and where they look for modules."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing import spawn
from pathlib import Path

import psutil
import pytest

from light_mem import descriptors
from light_mem.engine import child_start
from light_mem.maintenance.scan_process import ScanProcess
from tests.conftest import wait_until
from tests.service_child import ROOT
from tests.service_rig import Rig, rig
from tests.strange_files import StrangeFiles

# A server whose current directory becomes one of strange files before its service is made.
SERVER = """
import os, signal, sys, time
import linecache, queue, light_mem, light_mem.local_service, torch
assert sys.path[0] == ""
kv = light_mem.allocate_kvcache(4, 4096)
os.chdir(sys.argv[1])
with light_mem.LocalCacheService(sys.argv[2], 1 << 20, 1, kv, 1) as service:
    service.run()
    first = service.worker_pids
    os.kill(first[0], signal.SIGKILL)
    deadline = time.monotonic() + 20
    while service.stats()["workers"] == 0 or service.worker_pids == first:
        assert time.monotonic() < deadline and not service._pool.failure
    assert service.create("w", ["a"], [0]).wait(20)
"""


@pytest.fixture
def strange(tmp_path: Path) -> StrangeFiles:
    return StrangeFiles(tmp_path)


@pytest.fixture
def executable() -> Iterator[None]:
    """What multiprocessing starts, put back after the test."""
    before = spawn.get_executable()
    yield
    spawn.set_executable(before)


def replace_worker(r: Rig) -> None:
    """Kill the only worker, and wait for the next one."""
    before = r.service.worker_pids
    os.kill(before[0], signal.SIGKILL)
    wait_until(lambda: r.service._pool.failure or r.service.worker_pids not in ([], before))
    wait_until(lambda: r.service._pool.failure or r.service.stats()["workers"] == 1)
    assert r.service._pool.failure == ""


@pytest.mark.parametrize("python_path", ["{}", "{}:", ":{}"])
def test_workers_run_no_file_of_the_servers_current_directory(
    tmp_path: Path, strange: StrangeFiles, python_path: str
) -> None:
    """An empty part of PYTHONPATH means that directory to the interpreter itself."""
    clean = tmp_path / "clean"
    clean.mkdir()
    subprocess.run(
        [sys.executable, "-c", SERVER, strange.directory, tmp_path / "store"],
        cwd=clean,
        env={**os.environ, "PYTHONPATH": python_path.format(ROOT)},
        timeout=120,
        check=True,
    )
    assert strange.that_ran == []


def test_a_scan_process_runs_no_file_of_the_current_directory(
    strange: StrangeFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(strange.directory)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:")
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    process = ScanProcess()
    process.close()  # it has started by then: it leaves at the end of its input
    assert strange.that_ran == []


def test_the_path_is_absolute_and_the_current_directory_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    entries = ["", "/a", "b", Path("/c"), b"/d", None, "/e\0", "/\udcff", "/f.zip/g"]
    monkeypatch.setattr(sys, "path", entries)
    here = str(tmp_path)
    wanted = ["/a", f"{here}/b", "/\udcff", "/f.zip/g", str(ROOT), here]
    assert child_start.search_path() == wanted


def test_without_a_current_directory_the_path_is_what_does_not_depend_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setattr(sys, "path", ["", "/a", "b"])
    assert child_start.search_path() == ["/a", str(ROOT)]


def test_only_what_is_absolute_stays_of_pythonpath() -> None:
    given = {"A": "1", "PYTHONPATH": ":/a:b::/c:"}
    assert child_start.environment(given) == {"A": "1", "PYTHONPATH": "/a:/c"}
    assert child_start.environment({"A": "1", "PYTHONPATH": ":"}) == {"A": "1"}
    assert child_start.environment({"A": "1"}) == {"A": "1"}


def test_a_worker_is_replaced_though_the_current_directory_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    with rig(tmp_path) as r:
        gone.rmdir()
        replace_worker(r)
        r.write(["a"], [0])


@pytest.mark.parametrize("memory", [True, False])
def test_a_path_of_any_length_and_kind_reaches_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: bool
) -> None:
    """One argument has room for 128 KiB, a pipe for 64."""
    if not memory:
        monkeypatch.setattr(descriptors, "memory_object", lambda _: -1)
    many = [f"/nowhere/{'x' * 200}/{n}" for n in range(2000)]
    strange = [Path("/nowhere"), b"/nowhere", None, "/\udcff", "/" + "x" * (1 << 18)]
    monkeypatch.setattr(sys, "path", [*many, *strange, *sys.path])
    with rig(tmp_path) as r:
        r.write(["a"], [0])
        replace_worker(r)
        r.write(["b"], [1])


def test_ps_shows_nothing_of_the_service_and_nothing_stays_open(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        r.write(["a"], [0])
        pid = r.service.worker_pids[0]
        shown = " ".join(psutil.Process(pid).cmdline())
        assert "parent" not in shown
        assert str(tmp_path) not in shown
        for of in ("self", str(pid)):
            opened = [os.readlink(entry) for entry in _descriptors(of)]
            assert not [name for name in opened if "light-mem-start" in name]


def _descriptors(of: str) -> list[Path]:
    return [entry for entry in Path(f"/proc/{of}/fd").iterdir() if entry.is_symlink()]


def test_what_a_child_is_told_is_what_it_was(tmp_path: Path) -> None:
    config = {"a": [1, None, "\0 \udcff \u20ac"], "b": {"c": 0.5}}
    (tmp_path / "telling.py").write_text(
        "import json, sys\n"
        "def main(config):\n"
        "    safe = getattr(sys.flags, 'safe_path', True)  # 3.10 has no such flag\n"
        "    print(json.dumps([config, sys.path, safe]))\n"
    )
    path = [str(tmp_path), "/\udcff\n\u20ac", *child_start.search_path()]
    with child_start.command("telling", config, path) as (command, told):
        answer = subprocess.run(command, pass_fds=[told], capture_output=True, check=True)
    assert json.loads(answer.stdout) == [config, path, True]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(told)


@pytest.mark.usefixtures("executable")
def test_a_ctrl_c_while_workers_start_does_not_end_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupted = tmp_path / "python"  # before its first line, and so before Python's own start
    interrupted.write_text(
        f"#!{sys.executable} -S\n"
        "import os, signal, sys\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        f"os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])\n"
    )
    interrupted.chmod(0o755)
    spawn.set_executable(str(interrupted))
    with rig(tmp_path, workers=2) as r:
        r.write(["a"], [0])
        workers = r.service.worker_pids
        for pid in workers:
            assert _has_sigint(f"/proc/{pid}/status", "SigIgn")
            assert not _has_sigint(f"/proc/{pid}/status", "SigBlk")
        assert "lightmem-pool" in [thread.name for thread in threading.enumerate()]
        for thread in Path("/proc/self/task").iterdir():  # of the server, none has become deaf
            assert not _has_sigint(str(thread / "status"), "SigBlk")
        assert r.service.stats()["restarts"] == 0
    assert "KeyboardInterrupt" not in caplog.text
    assert "SIGINT" not in caplog.text


def _has_sigint(status: str, which: str) -> bool:
    """Whether SIGINT is in this set of a process's or thread's signals."""
    lines = dict(line.split(":\t", 1) for line in Path(status).read_text().splitlines())
    return bool(int(lines[which], 16) >> (signal.SIGINT - 1) & 1)
