"""Fixtures that every test has: nothing may stay behind."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import psutil
import pytest
import torch

import light_mem
from light_mem import blocks
from light_mem.maintenance import export_store
from tests import maintenance_helpers
from tests.small_disk import small_disk

SHM = Path("/dev/shm")

# The tests' blocks are short: read by `create` itself, none would go the workers' way. Inherited by
# the processes that tests start; the users of tests/small_rig.py and the stress runs turn it on.
os.environ["LIGHTMEM_SMALL_READ_BYTES"] = "0"
os.environ["LIGHTMEM_SMALL_WRITE_BYTES"] = "0"


def wait_until(condition: Callable[[], object], seconds: float = 20.0, what: str = "") -> None:
    """Poll a condition that another process brings about; fails when it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what or condition}"
        time.sleep(0.002)


def threads(prefix: str = "lightmem") -> int:
    """How many threads of this process have such a name."""
    return sum(thread.name.startswith(prefix) for thread in threading.enumerate())


def _children() -> set[int]:
    return {p.pid for p in psutil.Process().children(recursive=True)}


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _shm() -> set[str]:
    return {p.name for p in SHM.iterdir()} if SHM.is_dir() else set()


@pytest.fixture(scope="session", autouse=True)
def _warm_torch(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What libraries open once and keep is not a leak of the test that came first."""
    torch.zeros(4, dtype=torch.uint8).share_memory_()
    kv = light_mem.allocate_kvcache(2, 4096)
    directory = tmp_path_factory.mktemp("warm")
    with light_mem.LocalCacheService(directory / "s", 1 << 20, 1, kv, 1) as service:
        service.run()
    resource_tracker.ensure_running()  # multiprocessing's, for the tests that spawn with it
    # What is imported by now stays: without it a collection, two a test, is 0.1 s faster.
    gc.collect()
    gc.freeze()


def _mapped_by_others(names: set[str]) -> set[str]:
    """Those /dev/shm entries that a process outside this one's family maps or has open: another
    process of a parallel run, say, whose test is not at its end."""
    family = {os.getpid(), *_children()}
    found = set()
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) not in family:
            try:
                text = (process / "maps").read_text()
                text += "\n".join(os.readlink(link) for link in (process / "fd").iterdir())
            except OSError:
                continue  # it has ended, or is not ours to look at
            found |= {name for name in names if f"{SHM}/{name}" in text}
    return found


@pytest.fixture(autouse=True)
def _nothing_stays_behind() -> Iterator[None]:
    """A test leaves no process, no descriptor and no /dev/shm entry."""
    gc.collect()
    before = _children(), _descriptors(), _shm()
    yield
    start = time.monotonic()
    shm: set[str] | None = None
    while True:
        gc.collect()
        processes, now = _children() - before[0], _shm() - before[2]
        shm = now if shm is None else shm & now  # what others have made since is not this test's
        descriptors = _descriptors() - before[1]
        if shm and time.monotonic() > start + 1:
            shm -= _mapped_by_others(shm)
        if not processes and not shm and descriptors <= 0:
            return
        if time.monotonic() > start + 10:
            break
        time.sleep(0.01)
    open_now = [
        os.readlink(f"/proc/self/fd/{n}")
        for n in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{n}")
    ]
    pytest.fail(f"left behind: {processes=} {shm=} {descriptors=} of {open_now}")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Where `small_disk` may mount one."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if os.getuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("only root mounts a small disk")
    if subprocess.run([*small_disk(directory), "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount")
    return directory


# --- for the tests of the tools -------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A closed store of the blocks of `maintenance_helpers`."""
    return maintenance_helpers.make_store(tmp_path / "store")


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers write blocks of one page: stores of a few pages are not too small for the tools."""
    monkeypatch.setattr(blocks, "MAX_PAGES_PER_BLOCK", 1)


@pytest.fixture
def exported(store: Path) -> Path:
    """An export of that store, beside it."""
    path = store.parent / "blocks.lmx"
    export_store(store, path)
    return path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> maintenance_helpers.Command:
    """`light-mem`, in this process."""
    return maintenance_helpers.Command(capsys)
