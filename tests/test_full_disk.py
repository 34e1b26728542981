"""A full disk is a clear error when the store is opened, and never a crash later."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from light_mem import allocate_kvcache
from light_mem.engine import store_room
from light_mem.engine.table_memory import Sizes
from light_mem.engine.task_table import TaskTable
from light_mem.errors import InvalidArgumentError, SharedMemoryFullError, StoreFullError
from tests.maintenance_helpers import make_store
from tests.service_child import Child
from tests.small_disk import FILL, small_disk

PRELUDE = """
import light_mem
from light_mem import LocalCacheService
store, PAGE = sys.argv[1], 65536
kv = light_mem.allocate_kvcache(64, PAGE)
def mapped():
    return sum(store in line for line in open("/proc/self/maps"))
def descriptors():
    return sum(store in os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd"))
def taken():
    return sum(entry.stat().st_blocks * 512 for entry in os.scandir(store))
def attempt(slots):
    try:
        LocalCacheService(store, slots * PAGE, 2, kv, 1)
    except light_mem.StoreFullError as e:
        say("full", isinstance(e, OSError), e.errno, e.needed, e.available, str(e))
    say(mapped(), descriptors())
def use(slots, keys):
    for page, key in enumerate(keys): kv[page] = ord(key[0])
    with LocalCacheService(store, slots * PAGE, 2, kv, 1) as service:
        service.run()
        task = service.create("w", keys, range(len(keys)))
        task.wait(20)
        kv[:] = 0
        read = service.create("r", keys, range(len(keys)))
        read.wait(20)
        right = [bool((kv[page] == ord(key[0])).all()) for page, key in enumerate(keys)]
        say(task.state(), read.state(), right, service.stats()["slots"])
"""


def test_a_limit_on_file_sizes_is_an_error_at_open_that_leaves_nothing(tmp_path: Path) -> None:
    script = f"""{PRELUDE}
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, resource.RLIM_INFINITY))
attempt(256)
say(taken())
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
use(256, ["a", "b"])
"""
    with Child(script, tmp_path / "store") as child:
        said, is_os_error, number, needed, _, text = child.hear()
        assert (said, is_os_error) == ("full", True)
        assert number in (27, 28)  # EFBIG, ENOSPC
        assert needed > 5 << 20
        assert str(needed) in text
        assert child.hear() == [0, 0]
        assert child.hear()[0] <= 5 << 20  # the owners file; no part of a shard
        assert child.hear() == [[2, 2], [2, 2], [True, True], 256]
        assert child.end() == 0


def test_a_disk_without_room_is_an_error_at_open_and_a_smaller_store_fits(disk: Path) -> None:
    script = f"""{PRELUDE}
attempt(256)
attempt(200)
say(os.path.exists(store))
use(128, ["a", "b"])
"""
    with Child(script, disk / "store", through=small_disk(disk)) as child:
        for slots in (256, 200):  # 16 MiB; 12.5 MiB, which index and owners make too much
            said, is_os_error, number, needed, available, text = child.hear()
            assert (said, is_os_error, number) == ("full", True, 28)
            assert needed > slots * 65536
            assert 0 < available < needed
            assert str(needed) in text
            assert str(available) in text
            assert child.hear() == [0, 0]
        assert child.hear() == [False]  # nothing was begun
        assert child.hear() == [[2, 2], [2, 2], [True, True], 128]
        assert child.end() == 0


def test_a_disk_that_fills_up_later_stops_no_write_and_breaks_no_store(disk: Path) -> None:
    script = f"""{PRELUDE}
use(128, ["a"])
with open(os.path.dirname(store) + "/filler", "wb", buffering=0) as filler:
    try:
        while True: filler.write(bytes(65536))
    except OSError:
        pass
free = os.statvfs(os.path.dirname(store)).f_bavail * 4096
use(128, [chr(100 + n) + "!" for n in range(60)])  # 128 slots are 64 a shard: some go round
attempt(192)
use(128, ["x"])
say(free)
"""
    with Child(script, disk / "store", through=small_disk(disk)) as child:
        assert child.hear() == [[2], [2], [True], 128]
        written, read, right, slots = child.hear()
        assert slots == 128
        assert written == [2] * 60
        assert read == [2] * 60
        assert right == [True] * 60
        assert child.hear()[0] == "full"
        assert child.hear() == [0, 0]
        assert child.hear() == [[2], [2], [True], 128]
        assert child.hear()[0] < 65536  # it was full indeed
        assert child.end() == 0


def test_an_import_that_finds_no_room_for_a_new_store_begins_nothing(
    disk: Path, exported: Path
) -> None:
    script = f"""{FILL}
import light_mem
from light_mem import maintenance
disk, exported = sys.argv[1:]
size = 1 << 20
fill(disk, spare=size + (1 << 19))  # its shards would fit, the owners file would not
room = free(disk)
try:
    maintenance.import_store(disk + "/store", exported, storage_size=size)
except light_mem.StoreFullError as e:
    say(e.needed > 4 << 20, e.available == room, os.listdir(disk), room - free(disk))
unfill(disk)
say(maintenance.import_store(disk + "/store", exported, storage_size=size).complete)
"""
    with Child(script, disk, exported, through=small_disk(disk)) as child:
        assert child.hear() == [True, True, ["filler"], 0]
        assert child.hear() == [True]
        assert child.end() == 0


def test_a_file_system_without_a_size_is_taken_at_its_allocations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=0, free=0))
    store_room.require_room_for_new(tmp_path / "store", 4096, 1, 1 << 40)
    make_store(tmp_path / "store")

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoreFullError):
        make_store(tmp_path / "other")


def test_a_limit_on_file_sizes_is_named_where_memory_is_above_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def above(*_: int) -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(os, "ftruncate", above)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 20, -1))
    with pytest.raises(SharedMemoryFullError, match="RLIMIT_FSIZE") as caught:
        allocate_kvcache(512, 4096)
    error: Any = caught.value
    assert (error.needed, error.available, error.errno) == (2 << 20, 1 << 20, errno.EFBIG)
    with pytest.raises(InvalidArgumentError, match=r"RLIMIT_FSIZE.*or lower max_blocks"):
        TaskTable.create(
            Sizes.for_blocks(64), store="x", page_bytes=1, num_pages=1, pages_per_block=1, workers=1
        )
