"""The KV tensor's memory reaches another process, whoever allocated it, or is refused by name."""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import pickle
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.multiprocessing

from light_mem.engine import kvallocation, maps
from light_mem.engine.kvallocation import allocate_kvcache
from light_mem.engine.kvmemory import (
    MemorySource,
    attach,
    close_source,
    share_tensor,
)
from light_mem.engine.maps import HUGE_PAGE_BYTES, private_memory
from light_mem.errors import InvalidArgumentError, KVCacheMemoryError, SharedMemoryFullError

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


# Memory of others


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


def test_a_path_source_is_opened_by_the_attacher(tmp_path: Path) -> None:
    memory = map_path(tmp_path / "file")
    tensor = over(memory, 5)
    shared = share_tensor(tensor)
    close_source(shared)
    source = shared._replace(kind="path", fd=-1, path=str(tmp_path / "file"))
    round_trip(tensor, source)
    close_source(source)
    (tmp_path / "other").write_bytes(bytes(2 * PAGE + NBYTES))
    with pytest.raises(KVCacheMemoryError, match="another file"):
        attach(source._replace(path=str(tmp_path / "other")))


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
    assert source == MemorySource("sysv", -1, "", 0, 0, shmid, offset, NBYTES)
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


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (-1, 5), (1.5, 2), ("1", 2)])
def test_sizes_that_are_not_positive_integers_are_refused(sizes: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="positive integer"):
        allocate_kvcache(*sizes)


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


def test_a_machine_without_dev_shm_is_told_how_to_allocate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvallocation, "SHM_DIR", "/nonexistent")
    with pytest.raises(KVCacheMemoryError, match="allocate_kvcache"):
        share_tensor(torch.zeros(ROWS, COLUMNS, dtype=torch.uint8))


# What stays behind


@pytest.mark.parametrize("fails", [False, True])
def test_a_move_leaves_no_name_and_restores_the_sharing_strategy(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    seen = []
    real = torch.Tensor.share_memory_

    def spy(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(torch.multiprocessing.get_sharing_strategy())
        if fails:
            raise RuntimeError("no luck")
        return real(tensor)

    monkeypatch.setattr(torch.Tensor, "share_memory_", spy)
    try:
        tensor = torch.zeros(ROWS, COLUMNS, dtype=torch.uint8)
        if fails:
            with pytest.raises(KVCacheMemoryError, match="no luck"):
                share_tensor(tensor)
        else:
            close_source(share_tensor(tensor))
        assert torch_entries() == []
        assert torch.multiprocessing.get_sharing_strategy() == "file_system"
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
    assert seen == ["file_descriptor"]


def test_a_killed_server_leaves_nothing_in_dev_shm() -> None:
    code = (
        "import os, signal, torch, torch.multiprocessing\n"
        "from light_mem.engine.kvallocation import allocate_kvcache\n"
        "from light_mem.engine.kvmemory import share_tensor\n"
        "torch.multiprocessing.set_sharing_strategy('file_system')\n"
        "share_tensor(torch.zeros(64, 4096, dtype=torch.uint8))\n"
        "share_tensor(allocate_kvcache(64, 4096))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert [name for name in os.listdir("/dev/shm") if f"_{process.pid}_" in name] == []


def test_closing_a_source_closes_its_descriptor_and_nothing_else(tmp_path: Path) -> None:
    tensor = allocate_kvcache(ROWS, COLUMNS)
    before = open_descriptors()
    source = share_tensor(tensor)
    assert open_descriptors() - before == {source.fd}
    assert not os.get_inheritable(source.fd)
    view = attach(source)
    close_source(source)
    close_source(source)  # closed already
    view[0] = 3
    assert tensor[0, 0] == 3
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    if other != source.fd:
        os.dup2(other, source.fd)
        os.close(other)
    close_source(source)  # the number is another object's by now
    os.close(source.fd)  # would raise if close_source had closed it
    close_source(share_tensor(tensor))  # the tensor is shared again


def test_a_lost_tensor_takes_its_memory_along() -> None:
    tensor = allocate_kvcache(ROWS, COLUMNS)
    source = share_tensor(tensor)
    row = tensor[1]
    del tensor
    gc.collect()
    row[0] = 1
    assert maps_lines(source.inode) == 1
    del row
    gc.collect()
    assert maps_lines(source.inode) == 0
    close_source(source)


# Attaching


def test_memory_stays_attached_while_any_view_lives() -> None:
    tensor = allocate_kvcache(ROWS, COLUMNS)
    source = share_tensor(tensor)
    view = attach(source)[100:].reshape(-1, 100)[2]
    close_source(source)
    gc.collect()
    view[1] = 9
    assert tensor.view(-1)[301] == 9
    assert maps_lines(source.inode) == 2
    del view
    gc.collect()
    assert maps_lines(source.inode) == 1


def test_a_sysv_segment_stays_attached_while_any_view_lives(
    sysv: Callable[[int], tuple[int, Any]],
) -> None:
    shmid, memory = sysv(NBYTES)
    source = share_tensor(over(memory))
    view = attach(source)[100:][:50]
    gc.collect()
    view[1] = 9
    assert memory[101] == 9
    assert maps_lines(shmid) == 2
    del view
    gc.collect()
    assert maps_lines(shmid) == 1


def test_an_array_is_flat_writable_bytes() -> None:
    source = share_tensor(allocate_kvcache(ROWS, COLUMNS))
    view = attach(source)
    assert (view.shape, view.dtype, view.flags.writeable) == ((NBYTES,), np.uint8, True)
    close_source(source)


def test_another_object_behind_the_descriptor_is_refused() -> None:
    source = share_tensor(allocate_kvcache(ROWS, COLUMNS))
    with pytest.raises(KVCacheMemoryError, match="another file"):
        attach(source._replace(inode=source.inode + 1))
    with pytest.raises(KVCacheMemoryError, match="another file"):
        attach(source._replace(device=source.device + 1))
    close_source(source)
    with pytest.raises(KVCacheMemoryError, match="Bad file descriptor"):
        attach(source)


def test_an_object_that_is_too_small_is_refused() -> None:
    source = share_tensor(allocate_kvcache(ROWS, COLUMNS))
    with pytest.raises(KVCacheMemoryError, match="too few"):
        attach(source._replace(offset=1))
    os.ftruncate(source.fd, NBYTES - 1)
    with pytest.raises(KVCacheMemoryError, match="too few"):
        attach(source)
    close_source(source)


def test_a_sysv_segment_that_is_too_small_or_gone_is_refused(
    sysv: Callable[[int], tuple[int, Any]],
) -> None:
    shmid, memory = sysv(NBYTES)
    source = share_tensor(over(memory))
    with pytest.raises(KVCacheMemoryError, match="too few"):
        attach(source._replace(offset=1))
    gc.collect()
    assert maps_lines(shmid) == 1
    with pytest.raises(KVCacheMemoryError, match="Invalid argument"):
        attach(source._replace(shmid=0x7FFFFFF0))


@pytest.mark.parametrize("change", [{"kind": "wire"}, {"nbytes": 0}, {"offset": -1}])
def test_a_source_of_no_known_form_is_refused(change: dict[str, Any]) -> None:
    source = MemorySource("fd", 0, "", 0, 0, -1, 0, 1)
    with pytest.raises(InvalidArgumentError):
        attach(source._replace(**change))


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
