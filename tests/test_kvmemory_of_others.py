"""Memory that others have mapped, from files, memfds or System V segments, is used as it is."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing

from light_mem.engine import maps
from light_mem.engine.kvmemory import MemorySource, attach, close_source, share_tensor
from light_mem.errors import KVCacheMemoryError
from tests.kvmemory_helpers import (
    COLUMNS,
    NBYTES,
    PAGE,
    ROWS,
    child_bytes,
    map_and_close,
    map_files_allowed,
    map_path,
    maps_lines,
    no_leaks,
    over,
    round_trip,
    shm_path,
    sysv,
)

__all__ = ["no_leaks", "shm_path", "sysv"]  # fixtures


def test_posix_shared_memory_is_used_at_a_non_zero_offset(shm_path: Path) -> None:
    memory = map_path(shm_path, offset=3 * PAGE)
    tensor = over(memory, 123)
    source = share_tensor(tensor)
    assert (source.kind, source.offset) == ("fd", 3 * PAGE + 123)
    shm_path.unlink()  # the source survives its name
    round_trip(tensor, source)
    assert set(memory[:123]) | set(memory[123 + NBYTES :]) == {0}
    close_source(source)


@pytest.mark.parametrize(
    "name", ["plain", "two words ", "line\nbreak", r"no\012break", "x (deleted)"]
)
def test_a_mapped_file_is_used_whatever_its_name(tmp_path: Path, name: str) -> None:
    memory = map_path(tmp_path / name)
    tensor = over(memory, 5)
    source = share_tensor(tensor)
    round_trip(tensor, source)
    assert (tmp_path / name).read_bytes()[5 : 5 + NBYTES] == child_bytes(NBYTES).tobytes()
    close_source(source)


def test_a_numpy_memmap_is_used(tmp_path: Path) -> None:
    array = np.memmap(tmp_path / "file", np.uint8, "w+", offset=100, shape=(ROWS, COLUMNS))
    tensor = torch.from_numpy(array)
    source = share_tensor(tensor)
    assert source.offset == 100
    round_trip(tensor, source)
    close_source(source)


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_RDONLY, os.O_PATH])
def test_a_deleted_file_is_reached_through_any_open_descriptor(tmp_path: Path, flags: int) -> None:
    path = tmp_path / "file"
    memory = map_path(path)
    kept = os.open(path, flags)
    path.unlink()
    tensor = over(memory)
    source = share_tensor(tensor)
    os.close(kept)
    round_trip(tensor, source)
    close_source(source)


def test_a_file_that_took_a_deleted_files_name_is_not_mistaken_for_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    memory = map_path(path)
    kept = os.open(path, os.O_RDWR)
    path.unlink()
    for name in ("file", "file (deleted)"):
        (tmp_path / name).write_bytes(b"\1" * (PAGE + NBYTES))
    tensor = over(memory)
    source = share_tensor(tensor)
    assert source.inode == os.fstat(kept).st_ino
    os.close(kept)
    round_trip(tensor, source)
    assert set(path.read_bytes()) == {1}
    close_source(source)


@pytest.mark.parametrize("kind", ["memfd without a descriptor", "anonymous"])
def test_nameless_memory_takes_map_files_or_is_refused(kind: str) -> None:
    memory = mmap.mmap(-1, PAGE + NBYTES)
    if kind != "anonymous":
        memory = map_and_close(os.memfd_create("other"))
    tensor = over(memory, 9)
    if map_files_allowed():
        source = share_tensor(tensor)
        assert source.kind == "fd"
        round_trip(tensor, source)
        close_source(source)
    else:
        with pytest.raises(KVCacheMemoryError, match="allocate_kvcache"):
            share_tensor(tensor)


def test_nameless_memory_is_refused_with_advice_when_map_files_is_not_permitted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = os.open

    def deny(path: Any, *args: Any, **kwargs: Any) -> int:
        if "map_files" in str(path):
            raise PermissionError(1, "Operation not permitted")
        return real(path, *args, **kwargs)

    tensor = over(map_and_close(os.memfd_create("other")))
    monkeypatch.setattr(os, "open", deny)
    with pytest.raises(KVCacheMemoryError, match=r"memfd:other.*map_files.*allocate_kvcache"):
        share_tensor(tensor)


def test_a_memfd_whose_descriptor_is_open_is_used() -> None:
    fd = os.memfd_create("other")
    os.ftruncate(fd, PAGE + NBYTES)
    memory = mmap.mmap(fd, PAGE + NBYTES)
    os.close(fd)  # mmap's duplicate remains
    tensor = over(memory)
    source = share_tensor(tensor)
    round_trip(tensor, source)
    close_source(source)


@pytest.mark.parametrize("offset", [0, 2 * PAGE + 77])
def test_a_sysv_segment_is_used(sysv: Callable[[int], tuple[int, Any]], offset: int) -> None:
    shmid, memory = sysv(offset + NBYTES)
    tensor = over(memory, offset)
    source = share_tensor(tensor)
    assert source == MemorySource("sysv", -1, 0, 0, shmid, offset, NBYTES)
    round_trip(tensor, source)
    close_source(source)  # nothing to close


def test_a_tensor_over_split_mappings_of_one_object_is_used(shm_path: Path) -> None:
    memory = map_path(shm_path, offset=PAGE)
    tensor = over(memory, 10)
    lines = maps_lines(shm_path.stat().st_ino)
    memory.madvise(mmap.MADV_DONTDUMP, PAGE, PAGE)
    assert maps_lines(shm_path.stat().st_ino) == lines + 2
    source = share_tensor(tensor)
    assert source.offset == PAGE + 10
    round_trip(tensor, source)
    close_source(source)


def test_a_source_survives_the_allocators_descriptor_and_name(shm_path: Path) -> None:
    fd = os.open(shm_path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, NBYTES)
    memory = mmap.mmap(fd, NBYTES)
    source = share_tensor(over(memory))
    os.close(fd)
    shm_path.unlink()
    view = attach(source)
    close_source(source)
    view[3] = 17
    assert memory[3] == 17


def test_another_device_number_is_accepted_for_the_same_path_inode_and_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # btrfs and overlayfs: st_dev is not the number in /proc/self/maps.
    tensor = over(map_path(tmp_path / "file"))
    region = maps.find_region(tensor.data_ptr(), NBYTES)
    fd = maps.open_region(region._replace(device=12345))
    assert fd is not None
    assert os.fstat(fd).st_ino == region.inode
    os.close(fd)
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened another file"))
    assert maps.open_region(region._replace(inode=region.inode + 1)) is None
    assert maps.open_region(region._replace(device=12345, end=1 << 40)) is None
