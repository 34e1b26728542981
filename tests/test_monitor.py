"""Servers seen from outside: found through /proc, read from shared memory, left alone."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from light_mem import StoreFormatError
from light_mem.engine.queue_lock import QUEUE_BYTE
from light_mem.engine.table_layout import NAME
from light_mem.engine.table_stats import read_numbers
from light_mem.engine.task_table import TaskTable
from light_mem.index.locks import PathLock, RangeLock, lock_path
from light_mem.index.owners import Owners
from light_mem.maintenance import inspect
from light_mem.monitor import look, rates
from light_mem.monitor.rates import as_json, hit_rate, together
from tests.conftest import wait_until
from tests.maintenance_helpers import BLOCKS, make_store
from tests.monitor_helpers import ask, server
from tests.service_child import unpack
from tests.service_rig import rig


def test_a_server_of_another_process_is_seen_with_its_own_numbers(tmp_path: Path) -> None:
    with server(tmp_path / "store", workers=2) as child:
        pid, workers = child.hear()
        assert ask(child, "write", "a", "b", "c")
        assert ask(child, "query", "a", "b", "z") == [True, True, False]
        assert ask(child, "read", "a")
        own = ask(child, "stats")
        found = look(tmp_path / "store")
        [seen] = found.servers
        assert found.unseen == 0
        assert (seen.pid, seen.workers, seen.num_pages) == (pid, 2, 32)
        assert "python" in seen.command
        numbers = seen.numbers
        assert isinstance(own, dict)
        assert {n: own[n] for n in numbers.counters if n != "damaged"} == {
            n: count for n, count in numbers.counters.items() if n != "damaged"
        }
        assert {n: own[n] for n in numbers.gauges} == numbers.gauges
        assert numbers.latencies["write"].number == own["write_latency"]["count"] == 1
        assert found.store.blocks == 3
        assert (found.store.lookups, found.store.hits) == (3, 2)
        assert found.store.ages is not None
        assert found.store.ages[0].blocks == 3
        assert len(workers) == 2


def test_whoever_looks_is_no_process_of_the_store(tmp_path: Path) -> None:
    with server(tmp_path / "store") as child:
        child.hear()
        before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
        owners = inspect(tmp_path / "store").owners
        look(tmp_path / "store")
        assert inspect(tmp_path / "store").owners == owners
        assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "store").iterdir()} == before
        assert os.getpid() not in {owner.pid for owner in owners}


def test_it_waits_for_no_lock_and_for_nobody_who_is_stopped(tmp_path: Path) -> None:
    with server(tmp_path / "store") as child:
        _, [worker] = child.hear()
        assert ask(child, "write", "a")
        for pid in (worker, child.pid):
            os.kill(pid, signal.SIGSTOP)
        shard, opening = (lock_path(tmp_path / "store", n) for n in ("shard-000", "open"))
        with PathLock(shard).hold(), PathLock(opening).hold():
            [seen] = look(tmp_path / "store").servers
            assert seen.numbers.counters["blocks_written"] == 1
        for pid in (worker, child.pid):
            os.kill(pid, signal.SIGCONT)
        assert ask(child, "write", "b")


def test_it_does_not_wait_for_the_queue(tmp_path: Path) -> None:
    with rig(tmp_path, run=False) as r:
        r.service.create("write", ["a", "b"], [0, 1])
        [seen] = look(tmp_path / "store").servers
        assert seen.numbers.gauges["write_queue"] == 2
        assert seen.numbers.gauges["active_write_tasks"] == 1
        lock = RangeLock(_table_paths()[0])
        lock.lock(QUEUE_BYTE)
        assert look(tmp_path / "store").servers == (seen,)
        lock.close()


def _table_paths() -> list[str]:
    """This process's task tables."""
    folder = "/proc/self/fd"
    return [
        f"{folder}/{fd}"
        for fd in sorted(os.listdir(folder), key=int)
        if os.path.lexists(f"{folder}/{fd}")
        and os.readlink(f"{folder}/{fd}").startswith(f"/memfd:{NAME}")
    ]


def test_without_a_server_there_are_the_numbers_of_the_store(tmp_path: Path) -> None:
    found = look(make_store(tmp_path / "store"))
    assert found.servers == ()
    assert found.unseen == 0
    assert found.store.blocks == found.store.inserts == len(BLOCKS)
    assert as_json(found)["total"]["counters"] == {}


def test_no_store_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreFormatError):
        look(tmp_path / "nothing")


def test_a_killed_server_is_gone_though_a_client_keeps_its_table(tmp_path: Path) -> None:
    with server(tmp_path / "store") as child:
        child.hear()
        client = unpack(str(ask(child, "client")))
        assert client.query("a") is False
        assert len(look(tmp_path / "store").servers) == 1
        child.kill()
        wait_until(lambda: not look(tmp_path / "store").servers)
        client.close()


def test_a_closed_service_is_gone_and_another_takes_its_place(tmp_path: Path) -> None:
    with server(tmp_path / "store") as child:
        child.hear()
        [first] = look(tmp_path / "store").servers
        assert ask(child, "close") == "closed"
        wait_until(lambda: not look(tmp_path / "store").servers)
    with server(tmp_path / "store") as child:
        child.hear()
        [second] = look(tmp_path / "store").servers
        assert second.table_id != first.table_id


def test_only_the_servers_of_this_store(tmp_path: Path) -> None:
    with rig(tmp_path / "one", run=False), rig(tmp_path / "two", run=False) as two:
        two.service.create("write", ["a"], [0])
        [seen] = look(tmp_path / "one" / "store").servers
        assert seen.numbers.gauges["write_queue"] == 0


def test_two_services_of_one_process_are_two(tmp_path: Path) -> None:
    with rig(tmp_path, run=False), rig(tmp_path, run=False):
        seen = look(tmp_path / "store").servers
        assert [s.pid for s in seen] == [os.getpid()] * 2
        assert len({s.table_id for s in seen}) == 2


def test_a_store_is_known_by_any_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "store")
    with rig(tmp_path, run=False):
        assert len(look(tmp_path / "link").servers) == 1


@pytest.mark.parametrize("content", [b"", b"x" * 10000, b"LMTABLE1" + bytes(9000)])
def test_other_memory_by_that_name_is_passed_over(tmp_path: Path, content: bytes) -> None:
    with rig(tmp_path, run=False):
        other = os.memfd_create(NAME)
        os.write(other, content)
        assert len(look(tmp_path / "store").servers) == 1
        os.close(other)


def test_a_header_that_lies_about_its_sizes_is_passed_over(tmp_path: Path) -> None:
    with rig(tmp_path, run=False):
        with open(_table_paths()[0], "rb") as table:
            header = bytearray(table.read(8192))
        other = os.memfd_create(NAME)
        os.write(other, bytes(header))  # right, but nothing behind it
        assert len(look(tmp_path / "store").servers) == 1
        os.close(other)


def test_a_table_that_is_only_read_cannot_be_changed(tmp_path: Path) -> None:
    with rig(tmp_path, run=False):
        descriptor = os.open(_table_paths()[0], os.O_RDONLY)
        table = TaskTable(descriptor, None, writable=False)
        os.close(descriptor)
        table.fd = -1
        with pytest.raises(ValueError, match="read-only"):
            table.states[0] = 1
        assert read_numbers(table).gauges["workers"] == 0


@pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("unshare") is None, reason="needs unshare and root"
)
def test_a_server_in_another_pid_namespace_is_found(tmp_path: Path) -> None:
    through = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    with server(tmp_path / "store", through=through) as child:
        pid, _ = child.hear()
        assert ask(child, "write", "a")
        found = look(tmp_path / "store")
        [seen] = found.servers
        assert seen.pid != pid  # its number out here
        assert seen.numbers.counters["blocks_written"] == 1
        assert found.unseen == 0
        assert ask(child, "close") == "closed"
        child.end()


def test_servers_of_containers_whose_pids_are_the_same_are_counted_one_by_one(
    tmp_path: Path,
) -> None:
    """In a container of its own each is, say, pid 1."""
    with rig(tmp_path, run=False):
        theirs = [Owners(tmp_path / "store") for _ in range(2)]
        for number, owners in enumerate(theirs):
            owners.records["started"][owners.join("server").number] += 0.25 + number / 10
            found = look(tmp_path / "store")
            assert len(found.servers) == 1
            assert found.unseen == number + 1
        for owners in theirs:
            owners.close()


def test_a_closed_service_whose_blocks_are_viewed_is_no_servers_of_others(tmp_path: Path) -> None:
    with rig(tmp_path) as closed:
        closed.write(["a"], [0])
        view = closed.service.view("a")
        assert view is not None
        with rig(tmp_path, run=False):
            closed.service.close()
            found = look(tmp_path / "store")
            assert (len(found.servers), found.unseen) == (1, 0)
        view.close()


# --- rates ----------------------------------------------------------------------------------------


def test_rates_are_what_happened_in_between(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        r.write(["a", "b"], [0, 1])
        before = look(tmp_path / "store")
        r.read(["a", "b"], [4, 5])
        r.read(["a"], [4])
        r.service.query(["a", "x", "y", "z"])
        after = look(tmp_path / "store")._replace(clock=before.clock + 2.0)
        found = rates(before, after)
        assert found.seconds == 2.0
        [server_rates] = found.servers.values()
        assert server_rates["bytes_read"] == found.of_all("bytes_read") == 3 * 4096 / 2.0
        assert server_rates["bytes_written"] == 0
        assert hit_rate(server_rates) == 0.25
        assert found.store["lookups"] == 2.0
        [latencies] = found.latencies.values()
        assert latencies["read"].number == 2
        assert latencies["write"].number == 0
        shown = as_json(after, found)
        assert shown["rates"]["servers"]["read_tasks"] == 1.0
        assert shown["rates"]["latencies"]["read"]["count"] == 2


def test_a_service_seen_once_has_no_rates(tmp_path: Path) -> None:
    before = look(make_store(tmp_path / "a"))
    with rig(tmp_path, run=False):
        found = rates(before, look(tmp_path / "store"))
        assert found.servers == {}
        assert found.of_all("bytes_read") == 0.0


def test_services_are_added_up(tmp_path: Path) -> None:
    with rig(tmp_path) as one, rig(tmp_path) as two:
        one.write(["a", "b"], [0, 1])
        two.write(["c"], [0])
        total = together([s.numbers for s in look(tmp_path / "store").servers])
        assert total.counters["blocks_written"] == 3
        assert total.gauges["workers"] == 2
        assert total.latencies["write"].number == 2
