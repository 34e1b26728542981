"""A server that becomes another program (`os.exec`): its pid and start stay, nothing else does."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from light_mem import ServiceClosedError
from tests.conftest import wait_until
from tests.engine_helpers import open_local
from tests.service_child import Child, unpack
from tests.service_rig import WAIT, alive

SERVER = """
import light_mem, signal
kv = light_mem.allocate_kvcache(16, 4096)
service = light_mem.LocalCacheService(sys.argv[1], 64 * 4096, 1, kv, 2)
service.run()
assert service.create("w", ["a"], [0]).wait(20)
forked = 0
if sys.argv[2:]:
    forked = os.fork()
    if not forked:
        signal.pause()
say(service.worker_pids, pack(service.client()), forked)
hear()
os.execv(sys.executable, [sys.executable, "-c", "print('[]', flush=True); input()"])
"""


@pytest.mark.parametrize("forks", [False, True])
def test_its_workers_end_and_the_store_is_free(tmp_path: Path, forks: bool) -> None:
    """A child that it has forked lives on, and has what it had open but for its end of pipes."""
    with Child(SERVER, tmp_path / "store", *["fork"] * forks) as server:
        workers, _, forked = server.hear()
        try:
            assert alive(workers) == workers
            server.say()
            server.hear()
            wait_until(lambda: not alive(workers))
            engine = open_local(tmp_path / "store", 64, page_bytes=4096)
            assert engine.owners() == []
            engine.close()
            assert not forked or alive([forked])
        finally:
            if forked:
                os.kill(forked, signal.SIGKILL)


def test_its_clients_hear_of_it(tmp_path: Path) -> None:
    with Child(SERVER, tmp_path / "store") as server:
        workers, packed, _ = server.hear()
        client = unpack(packed)
        assert client.query("a")
        server.say()
        server.hear()
        wait_until(lambda: not alive(workers))
        with pytest.raises(ServiceClosedError):
            client.create("w", ["b"], [1])
        client.close()


def test_so_does_who_waits_where_no_worker_can_tell(tmp_path: Path) -> None:
    with Child(SERVER, tmp_path / "store") as server:
        workers, packed, _ = server.hear()
        try:
            client = unpack(packed)
            assert client.query("a")
            for pid in workers:
                os.kill(pid, signal.SIGSTOP)
            task = client.create("w", ["b"], [1])
            server.say()
            server.hear()
            with pytest.raises(ServiceClosedError, match="is gone"):
                task.wait(WAIT)
            client.close()
        finally:
            for pid in workers:
                os.kill(pid, signal.SIGKILL)


def test_one_who_only_polls_hears_of_it_from_the_workers(tmp_path: Path) -> None:
    with Child(SERVER, tmp_path / "store") as server:
        workers, packed, _ = server.hear()
        client = unpack(packed)
        assert client.query("a")
        table = client._session.table
        assert not table.orphaned
        server.say()
        server.hear()
        wait_until(lambda: table.orphaned)
        client.close()
        wait_until(lambda: not alive(workers))
