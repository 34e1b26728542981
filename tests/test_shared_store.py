"""One store, several services: of one process, of several, at once and one after the other."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

import light_mem
from light_mem import LocalCacheService, State, StoreFormatError
from tests.conftest import wait_until
from tests.service_child import Child
from tests.service_rig import WAIT, Rig, rig

SERVER = """
import light_mem, torch
from tests.payload import page_bytes_of
kv = light_mem.allocate_kvcache(64, 4096)
service = light_mem.LocalCacheService(sys.argv[1], 512 * 4096, 2, kv, 1)
service.run()
def write(keys):
    for page, key in enumerate(keys):
        kv[page] = torch.from_numpy(page_bytes_of(key, 0, 4096))
    task = service.create("w", keys, range(len(keys)))
    task.wait(20)
    return [int(s) for s in task.state()]
def right(keys):
    task = service.create("r", keys, range(len(keys)))
    task.wait(20)
    return [state == 2 and torch.equal(kv[page], torch.from_numpy(page_bytes_of(key, 0, 4096)))
            for page, (key, state) in enumerate(zip(keys, task.state()))]
say("runs", service.worker_pids)
while True:
    command, *rest = hear()
    if command == "write": say(write(*rest))
    if command == "right": say(right(*rest))
    if command == "query": say(service.query(*rest))
    if command == "delete": say(service.delete(*rest))
    if command == "forever":
        say("begins")
        n = 0
        while True:
            write([f"forever {n + at}" for at in range(64)])
            n += 64
"""


def listing(store: Path) -> dict[str, Any]:
    """All that a refused open must leave alone."""
    return {
        path.name: (path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_ino)
        for path in store.iterdir()
        if path.suffix != ".lock"
    } | {"store.json": (store / "store.json").read_bytes()}


def test_two_services_of_one_process_see_each_others_blocks(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"shards": 2, "slots": 512}
    with rig(tmp_path, **shape) as one, rig(tmp_path, **shape) as two:
        one.write(["a", "b"], [0, 1])
        assert two.service.query(["a", "b", "c"]) == [True, True, False]
        two.write(["c"], [7])
        assert one.read(["a", "c"], [10, 11]).state() == [State.Finished] * 2
        assert one.holds("c", [11])
        assert two.service.create("w", ["a"], [0]).get_page_already_list() == [0]
        assert two.service.delete(["b"]) == 1
        assert one.service.query("b") is False
        assert one.service.clear() == 2
        assert two.service.query(["a", "c"]) == [False] * 2
        assert one.service.stats()["used_slots"] == two.service.stats()["used_slots"] == 0


def test_services_that_write_the_same_hashes_at_once_store_each_once(tmp_path: Path) -> None:
    keys = [f"k{n}" for n in range(256)]

    def write_all(r: Rig) -> None:
        for first in range(0, 256, 32):
            part = keys[first : first + 32]
            for page, key in enumerate(part):
                r.fill(key, [page])
            task = r.service.create("w", part, range(32))
            assert task.wait(WAIT)
            assert task.state() == [State.Finished] * 32

    shape: dict[str, Any] = {"shards": 2, "slots": 512}
    with rig(tmp_path, **shape) as one, rig(tmp_path, **shape) as two:
        threads = [threading.Thread(target=write_all, args=(r,)) for r in (one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = one.service.stats()
        assert stats["blocks"] == stats["used_slots"] == stats["inserts"] == 256
        assert one.service.query(keys) == two.service.query(keys) == [True] * 256
        for first in range(0, 256, 32):
            part = keys[first : first + 32]
            assert two.read(part, range(32)).state() == [State.Finished] * 32
            assert all(two.holds(key, [page]) for page, key in enumerate(part))


def test_servers_of_two_processes_share_a_store_and_one_may_be_killed(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with rig(tmp_path, slots=512, shards=2) as r, Child(SERVER, store) as other:
        workers = other.hear()[1]
        r.write(["ours"], [0])
        other.say("query", ["ours", "theirs"])
        assert other.hear() == [[True, False]]
        other.say("write", ["theirs", "ours"])
        assert other.hear() == [[State.Finished] * 2]
        assert r.read(["theirs"], [3]).state() == [State.Finished]
        assert r.holds("theirs", [3])
        other.say("delete", "theirs")
        assert other.hear() == [1]
        assert r.service.query("theirs") is False

        # Both write all of these at once, in opposite order.
        same = [f"same {n}" for n in range(32)]
        other.say("write", same[::-1])
        r.write(same, range(32))
        assert other.hear() == [[State.Finished] * 32]
        assert r.read(same, range(32)).state() == [State.Finished] * 32

        # The other is killed in the middle of its writes; here the work goes on all the time.
        other.say("forever")
        assert other.hear() == ["begins"]
        for n in range(16):
            if n == 5:
                os.kill(other.pid, signal.SIGKILL)
                other.process.wait()
            keys = [f"{n} {page}" for page in range(32)]
            r.write(keys, range(32))
            for page, state in enumerate(r.read(keys, range(32)).state()):
                if state is State.Finished:  # else evicted by the other's flood
                    assert r.holds(keys[page], [page])
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
        r.service._engine.reclaim()
        stats = r.service.stats()
        assert stats["used_slots"] == stats["blocks"] > 256
        assert stats["damaged"] == 0
        all_theirs = [f"forever {n}" for n in range(4096)]
        found = r.service.query(all_theirs)
        theirs = [key for key, stored in zip(all_theirs, found, strict=True) if stored][:32]
        assert r.read(theirs, range(len(theirs))).state() == [State.Finished] * len(theirs)
        assert all(r.holds(key, [page]) for page, key in enumerate(theirs))


@pytest.mark.parametrize("in_use", [False, True])
@pytest.mark.parametrize(
    ("change", "field"),
    [({"page_bytes": 8192}, "page_bytes"), ({"shards": 3}, "num_of_shard")],
)
def test_another_page_size_or_shard_count_is_refused_and_nothing_changes(
    tmp_path: Path, change: dict[str, int], field: str, in_use: bool
) -> None:
    with rig(tmp_path, shards=2) as r:
        r.write(["a", "b"], [0, 1])
        if not in_use:
            r.service.close()
        before = listing(tmp_path / "store")
        with (
            pytest.raises(StoreFormatError, match=field) as caught,
            rig(tmp_path, run=False, **{"shards": 2, **change}),
        ):
            pass
        assert caught.value.field == field  # type: ignore[attr-defined]
        assert listing(tmp_path / "store") == before
    with rig(tmp_path, shards=2) as r:
        assert r.read(["a", "b"], [5, 6]).state() == [State.Finished] * 2
        assert r.holds("a", [5])


def test_a_larger_storage_size_keeps_all_blocks(tmp_path: Path) -> None:
    keys = [f"k{n}" for n in range(128)]
    with rig(tmp_path, pages=128, slots=128, shards=2) as r:
        for page, key in enumerate(keys):
            r.fill(key, [page])
        assert r.service.create("w", keys, range(128)).wait(WAIT)
        stored = r.service.query(keys)
    with rig(tmp_path, pages=128, slots=512, shards=2) as r:
        assert r.service.stats()["slots"] == 512
        assert r.service.query(keys) == stored
        r.blank(range(128))
        task = r.service.create("r", keys, range(128))
        assert task.wait(WAIT)
        assert [state is State.Finished for state in task.state()] == stored
        assert all(r.holds(key, [page]) for page, key in enumerate(keys) if stored[page])
        r.write([f"more {n}" for n in range(128)], range(128))
        assert r.service.query(keys) == stored  # there is room for both


def test_a_smaller_storage_size_keeps_what_fits_and_cuts_the_files(tmp_path: Path) -> None:
    keys = [f"k{n}" for n in range(300)]
    with rig(tmp_path, pages=300, slots=512, shards=2) as r:
        r.write(keys, range(300))
    with rig(tmp_path, pages=300, slots=256, shards=2) as r:
        stats = r.service.stats()
        assert stats["slots"] == 256
        assert 0 < stats["blocks"] <= 256
        assert stats["used_slots"] == stats["blocks"]
        stored = r.service.query(keys)
        assert sum(stored) == stats["blocks"]
        r.blank(range(300))
        task = r.service.create("r", keys, range(300))
        assert task.wait(WAIT)
        assert [state is State.Finished for state in task.state()] == stored
        assert all(r.holds(k, [p]) if stored[p] else r.is_blank([p]) for p, k in enumerate(keys))
        data = sum(path.stat().st_size for path in (tmp_path / "store").glob("*.data"))
        assert data <= 256 * 4096 + 2 * 4096
        r.write([f"new {n}" for n in range(64)], range(64))


@pytest.mark.parametrize("slots", [128, 512])
def test_a_store_that_is_open_elsewhere_keeps_its_size(
    tmp_path: Path, slots: int, caplog: pytest.LogCaptureFixture
) -> None:
    with rig(tmp_path, slots=256) as r, rig(tmp_path, slots=slots) as other:
        assert other.service.stats()["slots"] == 256
        assert "keeps its storage_size" in caplog.text
        r.write(["a"], [0])
        assert other.read(["a"], [0]).state() == [State.Finished]
        assert other.holds("a", [0])


def test_services_that_make_a_store_at_once_make_one(tmp_path: Path) -> None:
    kv = light_mem.allocate_kvcache(4, 4096)
    services: list[LocalCacheService] = []

    def make() -> None:
        services.append(LocalCacheService(tmp_path / "store", 256 * 4096, 2, kv, 1))

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(services) == 4
    services[0].run()
    assert services[0].create("w", ["a"], [0]).wait(WAIT)
    assert [service.query("a") for service in services] == [True] * 4
    for service in services:
        service.close()
