"""Nothing stays behind: descriptors, threads, mappings, memory, entries in /dev/shm."""

from __future__ import annotations

import asyncio
import gc
import os
import tracemalloc
from pathlib import Path

import psutil
import torch

import light_mem
from light_mem import CacheTask, LocalCacheService
from tests.conftest import threads, wait_until
from tests.service_child import Child, unpack
from tests.service_rig import WAIT, Rig, rig


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def mapped(text: str) -> int:
    return Path("/proc/self/maps").read_text().count(text)


def test_services_that_come_and_go_leave_nothing(tmp_path: Path) -> None:
    kv = light_mem.allocate_kvcache(8, 4096)
    before = None
    for turn in range(4):
        with LocalCacheService(tmp_path / "store", 1 << 20, 2, kv, 1) as service:
            service.run()
            service.create("w", [f"a{turn}"], [0]).wait(WAIT)
            service.create("r", ["a0"], [1]).wait(WAIT)
            service.delete("a0")
            with service.client() as client:
                client.query("a")
        del service, client
        gc.collect()
        now = descriptors(), mapped(str(tmp_path)), mapped("lightmem-tasks"), threads()
        assert now[1:] == (0, 0, 0)
        if turn:
            assert now == before
        before = now


def test_a_service_that_moved_the_tensor_leaves_no_name_in_dev_shm(tmp_path: Path) -> None:
    def torch_names() -> set[str]:
        return {name for name in os.listdir("/dev/shm") if name.startswith("torch_")}

    before = torch_names()
    kv = torch.zeros((8, 4096), dtype=torch.uint8)
    with LocalCacheService(tmp_path / "store", 1 << 20, 1, kv, 1) as service:
        service.run()
        assert service.create("w", ["a"], [0]).wait(WAIT)
        wait_until(lambda: torch_names() <= before)  # other programs' come and go
    kv.fill_(1)  # the tensor outlives the service


def test_thousands_of_tasks_leave_no_memory_and_no_room_taken(tmp_path: Path) -> None:
    def many(r: Rig, name: str) -> None:
        for n in range(300):
            task = r.service.create("w", [f"{name} {n} {m}" for m in range(4)], range(4))
            if n % 10 == 0:
                assert task.wait(WAIT)
        wait_until(lambda: r.service.active_create_count("write") == 0)
        # takes back the room of what is ready
        assert r.service.create("w", [f"{name} last"], [0]).wait(WAIT)
        gc.collect()

    with rig(tmp_path, max_blocks=64) as r:
        many(r, "first")
        tracemalloc.start()
        many(r, "second")
        before = tracemalloc.get_traced_memory()[0]
        many(r, "third")
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        assert grown < 50_000, grown  # 1,201 blocks
        # All 64 blocks can be had at once.
        assert r.service.create("r", [f"no {n}" for n in range(32)], range(32)).wait(WAIT)
        wide = r.service.create("w", [f"wide {n}" for n in range(64)], [0] * 64)
        assert wide.wait(WAIT)


def test_clients_that_come_and_go_leave_no_descriptor_and_no_thread(tmp_path: Path) -> None:
    script = """
    import light_mem
    kv = light_mem.allocate_kvcache(8, 4096)
    service = light_mem.LocalCacheService(sys.argv[1], 1 << 20, 1, kv, 1)
    service.run()
    say(pack(service.client()))
    hear()
    service.close()
    """
    with Child(script, tmp_path / "store") as server:
        (packed,) = server.hear()
        before = descriptors()
        for n in range(70):  # more than there are lanes
            client = unpack(packed)
            if n % 10 == 0:
                assert client.create("w", [f"a{n}"], [0]).wait(WAIT)
            else:
                client.query("a0")
            assert threads("lightmem-watch") == 1
            client.close()
            del client
            gc.collect()
            wait_until(lambda: threads("lightmem-watch") == 0)
        wait_until(lambda: descriptors() <= before)
        assert mapped("lightmem-tasks") == 0
        server.say("end")
        assert server.end() == 0


def test_awaiting_leaves_no_thread(tmp_path: Path) -> None:
    async def some(r: Rig) -> None:
        tasks = [r.service.create("w", [f"k{n}"], [n]) for n in range(8)]
        waits = asyncio.gather(*(_awaited(task) for task in tasks))
        await asyncio.sleep(0)  # each gets to where it waits
        assert threads("lightmem-await") == 1
        r.service.run()
        await waits

    with rig(tmp_path, run=False) as r:
        asyncio.run(some(r))
        wait_until(lambda: threads("lightmem-await") == 0)


async def _awaited(task: CacheTask) -> None:
    await task


def test_a_worker_inherits_nothing_that_is_not_its_business(tmp_path: Path) -> None:
    secret = os.open(tmp_path / "secret", os.O_RDWR | os.O_CREAT)
    os.set_inheritable(secret, True)
    try:
        with rig(tmp_path) as r:
            r.write(["a"], [0])
            (pid,) = r.service.worker_pids
            worker = psutil.Process(pid)
            assert [f.path for f in worker.open_files() if "secret" in f.path] == []
            assert worker.num_fds() < 20
            assert worker.num_threads() == 2  # its own and the one that watches the server
    finally:
        os.close(secret)
