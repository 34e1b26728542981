"""Memory of every kind for the tests of what another process may map, a process that maps it, and
the check that nothing of it stays behind."""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing

from light_mem.engine import maps
from light_mem.engine.kvmemory import MemorySource

ROOT = Path(__file__).parents[1]
CHILD = Path(__file__).with_name("kvmemory_child.py")
PAGE = mmap.PAGESIZE
ROWS, COLUMNS = 6, 3000  # no multiple of anything
NBYTES = ROWS * COLUMNS


def parent_bytes(nbytes: int) -> np.ndarray:
    return ((np.arange(nbytes) * 7 + 3) % 251).astype(np.uint8)


def child_bytes(nbytes: int) -> np.ndarray:
    return ((np.arange(nbytes) * 13 + 5) % 241).astype(np.uint8)


def round_trip(tensor: torch.Tensor, source: MemorySource) -> None:
    """A child without torch maps the source; each side sees what the other writes after that."""
    assert source.nbytes == tensor.nbytes
    process = subprocess.Popen(
        [sys.executable, str(CHILD), json.dumps(source._asdict())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        pass_fds=[source.fd] if source.kind == "fd" else [],
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "attached\n", process.communicate()[1]
        tensor.copy_(torch.from_numpy(parent_bytes(tensor.nbytes)).view(tensor.shape))
        _, stderr = process.communicate("go\n", timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, stderr
    assert np.array_equal(tensor.clone().numpy().reshape(-1), child_bytes(tensor.nbytes))


def over(buffer: Any, offset: int = 0) -> torch.Tensor:
    """A tensor over somebody else's memory."""
    array = np.frombuffer(buffer, np.uint8, NBYTES, offset)
    return torch.from_numpy(array).view(ROWS, COLUMNS)


def map_path(path: Path, offset: int = 0) -> mmap.mmap:
    """Maps a new file like a library does: the descriptor is closed, mmap's duplicate too."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    return map_and_close(fd, offset)


def map_and_close(fd: int, offset: int = 0) -> mmap.mmap:
    os.ftruncate(fd, offset + PAGE + NBYTES)
    before = open_descriptors()
    memory = mmap.mmap(fd, PAGE + NBYTES, offset=offset)
    for duplicate in open_descriptors() - before:
        # mmap keeps it to resize itself; C libraries do not. Its number stays taken, so that
        # mmap's own close hits nothing else.
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, duplicate)
        os.close(null)
    os.close(fd)
    return memory


def open_descriptors() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            os.fstat(int(name))
        except OSError:
            continue  # the listing's own
        found.add(int(name))
    return found


def torch_entries() -> list[str]:
    """This process's names in /dev/shm (others may come and go)."""
    return [name for name in os.listdir("/dev/shm") if f"torch_{os.getpid()}_" in name]


def maps_lines(inode: int) -> int:
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    return sum(line[1][3] == "s" and line[4] == str(inode) for line in lines)


def map_files_allowed() -> bool:
    memory = mmap.mmap(-1, PAGE)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    region = maps.find_region(address, PAGE)
    try:
        os.close(os.open(f"/proc/self/map_files/{region.span}", os.O_RDWR))
    except OSError:
        return False
    return True


@pytest.fixture
def shm_path() -> Iterator[Path]:
    path = Path("/dev/shm") / f"light_mem_test_{uuid.uuid4().hex}"
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def sysv() -> Iterator[Callable[[int], tuple[int, Any]]]:
    """Segments made the way LightLLM does: bytes -> (shmid, ctypes array over all of it)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.shmat.restype = ctypes.c_void_p
    libc.shmat.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
    libc.shmdt.argtypes = (ctypes.c_void_p,)
    libc.shmget.argtypes = (ctypes.c_int, ctypes.c_size_t, ctypes.c_int)
    made = []

    def make(nbytes: int) -> tuple[int, Any]:
        shmid = libc.shmget(0, nbytes, 0o1600)  # IPC_PRIVATE, IPC_CREAT
        assert shmid >= 0, os.strerror(ctypes.get_errno())
        address = libc.shmat(shmid, None, 0)
        made.append((shmid, address))
        return shmid, (ctypes.c_uint8 * nbytes).from_address(address)

    yield make
    for shmid, address in made:
        libc.shmctl(shmid, 0, None)  # IPC_RMID
        libc.shmdt(address)


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    gc.collect()
    before = open_descriptors()
    yield
    gc.collect()
    assert open_descriptors() <= before
    assert torch_entries() == []
