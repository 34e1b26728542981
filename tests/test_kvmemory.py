"""Memory of torch and of `allocate_kvcache` reaches another process, moved where it must be."""

from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.multiprocessing

import light_mem
from light_mem.engine import kvallocation, maps
from light_mem.engine.kvallocation import allocate_kvcache
from light_mem.engine.kvmemory import MemorySource, close_source, share_tensor
from light_mem.engine.maps import HUGE_PAGE_BYTES, private_memory
from light_mem.errors import KVCacheMemoryError
from tests.kvmemory_helpers import (
    COLUMNS,
    NBYTES,
    ROOT,
    ROWS,
    child_bytes,
    no_leaks,
    open_descriptors,
    round_trip,
)

__all__ = ["no_leaks"]  # fixtures


# Memory of torch


def test_private_torch_memory_is_moved_in_place_and_views_keep_aliasing() -> None:
    tensor = torch.zeros(ROWS, COLUMNS, dtype=torch.uint8)
    tensor[2, 7] = 99
    view = tensor[2]
    source = share_tensor(tensor)
    assert source.kind == "fd"
    assert view[7] == 99
    view[8] = 77
    assert tensor[2, 8] == 77
    assert view.data_ptr() == tensor.data_ptr() + 2 * COLUMNS
    round_trip(tensor, source)
    assert np.array_equal(view.clone().numpy(), child_bytes(NBYTES)[2 * COLUMNS : 3 * COLUMNS])
    close_source(source)


def test_a_view_takes_its_whole_storage_along() -> None:
    storage = torch.full((20, COLUMNS), 42, dtype=torch.uint8)
    tensor = storage[5 : 5 + ROWS]
    source = share_tensor(tensor)
    assert source.offset == 5 * COLUMNS
    round_trip(tensor, source)
    assert torch.equal(storage[5 : 5 + ROWS], tensor)
    assert bool((storage[:5] == 42).all())
    assert bool((storage[5 + ROWS :] == 42).all())
    again = share_tensor(storage)
    assert (again.offset, again.nbytes, again.inode) == (0, 20 * COLUMNS, source.inode)
    close_source(source)
    close_source(again)


def test_memory_that_torch_shares_already_is_used_as_it_is() -> None:
    tensor = torch.zeros(ROWS, COLUMNS, dtype=torch.uint8).share_memory_()
    address = tensor.data_ptr()
    source = share_tensor(tensor)
    assert tensor.data_ptr() == address
    round_trip(tensor, source)
    close_source(source)


def test_memory_that_torch_shares_by_name_is_used_as_it_is() -> None:
    # In a process of its own: torch starts a manager process that stays as long as this one.
    code = (
        "import torch, torch.multiprocessing\n"
        "from light_mem.engine.kvmemory import attach, share_tensor\n"
        "torch.multiprocessing.set_sharing_strategy('file_system')\n"
        "tensor = torch.zeros(64, 4096, dtype=torch.uint8).share_memory_()\n"
        "address = tensor.data_ptr()\n"
        "source = share_tensor(tensor)\n"
        "attach(source)[4097] = 7\n"
        "assert tensor[1, 1] == 7 and tensor.data_ptr() == address, source\n"
        "assert source.kind == 'fd' and source.offset == 64, source\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_a_shared_file_of_torch_is_used_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(NBYTES))
    flat = torch.from_file(str(path), shared=True, size=NBYTES, dtype=torch.uint8)
    source = share_tensor(flat.view(ROWS, COLUMNS))
    round_trip(flat.view(ROWS, COLUMNS), source)
    assert path.read_bytes() == child_bytes(NBYTES).tobytes()
    close_source(source)


def test_allocate_kvcache_gives_zeroed_memory_that_is_shared_without_moving() -> None:
    before = open_descriptors()
    tensor = allocate_kvcache(ROWS, COLUMNS)
    assert tensor.shape == (ROWS, COLUMNS)
    assert tensor.dtype == torch.uint8
    assert not tensor.any()
    links = {os.readlink(f"/proc/self/fd/{fd}") for fd in open_descriptors() - before}
    assert links == {"/memfd:light_mem_kvcache (deleted)"}  # nothing in /dev/shm
    address = tensor.data_ptr()
    source = share_tensor(tensor)
    assert (source.kind, source.offset) == ("fd", 0)
    round_trip(tensor, source)
    assert tensor.data_ptr() == address
    close_source(source)


def _asks_for_huge_pages(address: int, nbytes: int) -> bool:
    """Whether one mapping with MADV_HUGEPAGE ("hg" in proc(5)) holds these bytes."""
    for mapping in psutil.Process().memory_maps(grouped=False):
        start, end = (int(part, 16) for part in mapping.addr.split("-"))
        if start <= address and address + nbytes <= end:
            smaps = Path("/proc/self/smaps").read_text()
            flags = smaps[smaps.index(mapping.addr) :].partition("VmFlags:")[2].splitlines()[0]
            return "hg" in flags.split()
    return False


has_huge_pages = pytest.mark.skipif(
    not os.path.exists("/sys/kernel/mm/transparent_hugepage"), reason="a kernel without huge pages"
)


def test_an_allocated_tensor_stays_where_it_is_when_torch_shares_it() -> None:
    kv = allocate_kvcache(4, 4096)
    address = kv.data_ptr()
    kv[2:].untyped_storage()._share_fd_cpu_()  # as for sending a view of it
    assert kv.is_shared()
    assert kv.share_memory_().data_ptr() == address


def test_a_service_whose_tensor_was_moved_refuses_to_create(tmp_path: Path) -> None:
    with tempfile.TemporaryFile(dir=tmp_path) as file:
        file.truncate(8 * 4096)
        kv = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8).view(8, 4096)
    with light_mem.LocalCacheService(tmp_path / "store", 256 * 4096, 1, kv, 1) as service:
        service.run()
        assert service.create("w", ["a"], [0]).wait(20)
        kv.share_memory_()
        for mode in "rw":
            with pytest.raises(KVCacheMemoryError, match=r"was moved.*or its \.data replaced"):
                service.create(mode, ["a"], [1])
        with pytest.raises(KVCacheMemoryError, match="was moved"):
            service.create_regions("r", ["a"], [(0, 4096)])
        assert service.query("a")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_a_program_that_is_started_inherits_no_allocated_tensor() -> None:
    tensor = allocate_kvcache(ROWS, COLUMNS)
    look = "import os\nfor fd in os.scandir('/proc/self/fd'): print(os.path.realpath(fd.path))"
    found = subprocess.run(
        [sys.executable, "-c", look], close_fds=False, capture_output=True, text=True, check=True
    )
    assert "light_mem_kvcache" not in found.stdout
    assert tensor.shape == (ROWS, COLUMNS)


@has_huge_pages
def test_allocated_memory_asks_for_huge_pages() -> None:
    tensor = allocate_kvcache(ROWS, COLUMNS)
    assert _asks_for_huge_pages(tensor.data_ptr(), tensor.nbytes)


@has_huge_pages
@pytest.mark.parametrize("nbytes", [1, 4096, HUGE_PAGE_BYTES, HUGE_PAGE_BYTES + 1])
def test_private_memory_is_whole_huge_pages_from_its_start_on(nbytes: int) -> None:
    memory = private_memory(nbytes)
    assert len(memory) == nbytes
    assert not memory.any()
    address = memory.ctypes.data
    assert address % HUGE_PAGE_BYTES == 0
    assert _asks_for_huge_pages(address, -(-nbytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES)


def test_part_of_an_allocated_tensor_is_shared_at_its_offset() -> None:
    tensor = allocate_kvcache(ROWS + 4, COLUMNS)[3 : 3 + ROWS]
    source = share_tensor(tensor)
    assert source.offset == 3 * COLUMNS
    round_trip(tensor, source)
    close_source(source)


def test_threads_that_share_one_private_tensor_agree_on_its_memory() -> None:
    tensor = torch.zeros(ROWS, COLUMNS, dtype=torch.uint8)
    sources: list[MemorySource] = []
    threads = [threading.Thread(target=lambda: sources.append(share_tensor(tensor)))]
    threads += [threading.Thread(target=lambda: sources.append(share_tensor(tensor)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({(source.device, source.inode, source.offset) for source in sources}) == 1
    assert len(sources) == 2
    for source in sources:
        close_source(source)


# Without /proc (macOS), as far as it can be tried here


@pytest.fixture
def without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "MAPS", "/nonexistent")


@pytest.mark.usefixtures("without_proc")
@pytest.mark.parametrize("memfd", [True, False])
def test_without_proc_an_allocated_tensor_is_known(
    memfd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not memfd:
        monkeypatch.delattr(os, "memfd_create")
    tensor = allocate_kvcache(ROWS + 2, COLUMNS)[1 : 1 + ROWS]
    source = share_tensor(tensor)
    assert source.offset == COLUMNS
    round_trip(tensor, source)
    close_source(source)
    del tensor
    gc.collect()
    assert kvallocation.allocated == {}


@pytest.mark.usefixtures("without_proc")
def test_without_proc_private_torch_memory_is_moved_and_the_rest_refused() -> None:
    storage = torch.full((ROWS + 2, COLUMNS), 8, dtype=torch.uint8)
    tensor = storage[1 : 1 + ROWS]
    source = share_tensor(tensor)
    assert source.offset == COLUMNS
    round_trip(tensor, source)
    assert bool((storage[0] == 8).all())
    close_source(source)
    shared = torch.zeros(ROWS, COLUMNS, dtype=torch.uint8).share_memory_()
    for other in (shared, torch.from_numpy(np.zeros((ROWS, COLUMNS), np.uint8))):
        with pytest.raises(KVCacheMemoryError, match="allocate_kvcache"):
            share_tensor(other)
