"""Memory that no other process can map, or that there is no room for, is refused by name."""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.multiprocessing

from light_mem.engine import kvallocation
from light_mem.engine.kvallocation import allocate_kvcache
from light_mem.engine.kvmemory import close_source, share_tensor
from light_mem.errors import InvalidArgumentError, KVCacheMemoryError, SharedMemoryFullError
from tests.kvmemory_helpers import COLUMNS, NBYTES, PAGE, ROWS, map_path, no_leaks, over, shm_path

__all__ = ["no_leaks", "shm_path"]  # fixtures


# Refusals


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        ([[1]], "list"),
        (np.zeros((2, 2), np.uint8), "ndarray"),
        (torch.zeros(2, 2), r"float32 \(\.view\(torch\.uint8\)"),
        (torch.zeros(4, dtype=torch.uint8), "1 dimensions"),
        (torch.zeros(2, 2, 2, dtype=torch.uint8), "3 dimensions"),
        (torch.zeros(4, 6, dtype=torch.uint8).T, "not contiguous"),
        (torch.zeros(4, 6, dtype=torch.uint8)[:, :3], "not contiguous"),
        (torch.zeros(0, 6, dtype=torch.uint8), "empty"),
        (torch.zeros(4, 6, dtype=torch.uint8, device="meta"), "meta"),
    ],
)
def test_a_tensor_of_another_form_is_refused_naming_what_was_found(tensor: Any, found: str) -> None:
    with pytest.raises(InvalidArgumentError, match=found):
        share_tensor(tensor)


def exported_to_numpy() -> tuple[torch.Tensor, Any]:
    tensor = torch.zeros(ROWS, COLUMNS, dtype=torch.uint8)
    return tensor, tensor.numpy()


@pytest.mark.parametrize(
    "make",
    [
        lambda _: (torch.from_numpy(np.zeros((ROWS, COLUMNS), np.uint8)), None),
        lambda _: (over(bytearray(NBYTES)), None),
        lambda _: exported_to_numpy(),
        lambda path: (torch.from_numpy(np.memmap(path, np.uint8, "c", shape=(2, 2))), None),
        lambda path: (
            torch.from_file(str(path), shared=False, size=4, dtype=torch.uint8).view(2, 2),
            None,
        ),
    ],
    ids=["numpy", "bytearray", "exported to numpy", "private memmap", "private torch file"],
)
def test_private_memory_that_torch_cannot_move_is_refused_with_advice(
    make: Callable[[Path], tuple[torch.Tensor, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(NBYTES))
    tensor, _alias = make(path)
    address = tensor.data_ptr()
    advice = r"allocate_kvcache.*share_memory_\(\) before \.numpy\(\)"
    with pytest.raises(KVCacheMemoryError, match=advice):
        share_tensor(tensor)
    assert tensor.data_ptr() == address


def test_pinned_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.zeros(ROWS, COLUMNS, dtype=torch.uint8)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: True)  # needs an accelerator
    with pytest.raises(KVCacheMemoryError, match="pinned"):
        share_tensor(tensor)
    assert not tensor.is_shared()


def test_memory_mapped_read_only_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(NBYTES))
    array = np.memmap(path, np.uint8, "r", shape=(ROWS, COLUMNS))
    array.flags  # noqa: B018 - torch warns of read-only arrays; ctypes hides it
    memory = (ctypes.c_uint8 * NBYTES).from_address(array.ctypes.data)
    with pytest.raises(KVCacheMemoryError, match="read-only: map it readable and writable"):
        share_tensor(over(memory))


def test_a_tensor_past_the_end_of_its_file_is_refused(tmp_path: Path) -> None:
    memory = map_path(tmp_path / "file")
    os.truncate(tmp_path / "file", PAGE)
    with pytest.raises(KVCacheMemoryError, match="past the end"):
        share_tensor(over(memory))


def test_a_tensor_over_two_objects_is_refused(shm_path: Path) -> None:
    # Two mappings side by side: the second replaces the first's tail (MAP_FIXED).
    size = 2 * (PAGE + NBYTES)
    memory = mmap.mmap(-1, size)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    fd = os.open(shm_path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, PAGE)
    placed = libc.mmap(address + PAGE, PAGE, mmap.PROT_READ | mmap.PROT_WRITE, 0x11, fd, 0)
    os.close(fd)
    assert placed == address + PAGE
    with pytest.raises(KVCacheMemoryError, match="different mappings"):
        share_tensor(over(memory))


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (-1, 5), (1.5, 2), ("1", 2), (True, 2)])
def test_sizes_that_are_not_positive_integers_are_refused(sizes: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="positive integer"):
        allocate_kvcache(*sizes)


def test_sizes_may_be_integers_of_numpy() -> None:
    assert allocate_kvcache(np.int64(3), np.uint16(4096)).shape == (3, 4096)  # type: ignore[arg-type]


# Room


def test_a_move_without_room_in_dev_shm_names_both_sizes_and_moves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = torch.zeros(10 * ROWS, COLUMNS, dtype=torch.uint8)
    storage[0, 0] = 5
    tensor = storage[:ROWS]
    address = tensor.data_ptr()
    small = SimpleNamespace(f_blocks=100, f_bavail=2, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda _: small)
    with pytest.raises(SharedMemoryFullError, match="allocate_kvcache") as caught:
        share_tensor(tensor)
    error: Any = caught.value
    assert (error.needed, error.available) == (10 * NBYTES, 8192)  # the whole storage's bytes
    assert str(10 * NBYTES) in str(error)
    assert "8192" in str(error)
    assert pickle.loads(pickle.dumps(error)).needed == 10 * NBYTES
    assert (tensor.data_ptr(), tensor.is_shared(), int(storage[0, 0])) == (address, False, 5)
    monkeypatch.undo()
    close_source(share_tensor(tensor))  # works as soon as there is room


def test_a_dev_shm_without_a_limit_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited = SimpleNamespace(f_blocks=0, f_bavail=0, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda _: unlimited)
    close_source(share_tensor(torch.zeros(ROWS, COLUMNS, dtype=torch.uint8)))


def test_a_machine_without_memory_left_names_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.zeros(ROWS, COLUMNS, dtype=torch.uint8)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1234))
    for action in (lambda: share_tensor(tensor), lambda: allocate_kvcache(ROWS, COLUMNS)):
        with pytest.raises(SharedMemoryFullError, match=f"{NBYTES} bytes.*1234") as caught:
            action()
        error: Any = caught.value
        assert (error.needed, error.available) == (NBYTES, 1234)
    assert not tensor.is_shared()


def test_a_machine_that_does_not_say_what_memory_it_has_may_have_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise FileNotFoundError(2, "No such file or directory", "/proc/meminfo")

    monkeypatch.setattr(psutil, "virtual_memory", fail)
    close_source(share_tensor(allocate_kvcache(ROWS, COLUMNS)))
    close_source(share_tensor(torch.zeros(ROWS, COLUMNS, dtype=torch.uint8)))


def test_a_machine_without_dev_shm_is_told_how_to_allocate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvallocation, "SHM_DIR", "/nonexistent")
    with pytest.raises(KVCacheMemoryError, match="allocate_kvcache"):
        share_tensor(torch.zeros(ROWS, COLUMNS, dtype=torch.uint8))
