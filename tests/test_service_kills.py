"""Workers and servers that are killed: no block stays Working, no slot stays taken."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from light_mem import LockTimeoutError, State
from light_mem.engine import queue_lock
from light_mem.engine.queue_lock import QUEUE_BYTE
from light_mem.engine.worker import BUSY_QUEUE_SECONDS, Worker
from light_mem.index.locks import RangeLock
from tests.conftest import wait_until
from tests.payload import page_bytes_of
from tests.service_child import Child
from tests.service_rig import WAIT, alive, rig

PAGE = 64 << 10
BLOCK = 64  # pages: 4 MiB
FINAL = {State.Finished, State.Aborted}

SERVER = """
import light_mem, torch
from tests.payload import page_bytes_of
kv = torch.zeros((64, 65536), dtype=torch.uint8)  # moved to /dev/shm
service = light_mem.LocalCacheService(sys.argv[1], 512 * 65536, 2, kv, 2)
service.run()
for page in range(64):
    kv[page] = torch.from_numpy(page_bytes_of(sys.argv[2], page, 65536))
say(service.worker_pids)
before = []
for done in range(1000):
    tasks = [service.create("w", [f"{sys.argv[2]} {done} {page}"], [page]) for page in range(64)]
    for task in before: task.wait()
    say(done)
    before = tasks
"""


@pytest.mark.parametrize("how_many", [1, 2])
def test_blocks_of_killed_workers_are_done_again_or_aborted(tmp_path: Path, how_many: int) -> None:
    with rig(tmp_path, pages=8 * BLOCK, page_bytes=PAGE, slots=40 * BLOCK, workers=2) as r:
        pages = range(8 * BLOCK)
        killed = 0

        def all_replaced() -> bool:
            stats = r.service.stats()
            return stats["restarts"] == killed and stats["workers"] == 2

        for turn in range(5):
            keys = [f"{turn} {n}" for n in range(8)]
            for n in range(8):
                r.kv[n * BLOCK : (n + 1) * BLOCK] = 8 * turn + n + 1
            workers = r.service.worker_pids
            task = r.service.create("w", keys, pages)
            wait_until(lambda: State.Initial not in task.state()[: turn + 1])  # noqa: B023
            for pid in workers[:how_many]:
                os.kill(pid, signal.SIGKILL)
                killed += 1
            assert task.wait(WAIT)
            written = task.state()
            assert set(written) <= FINAL
            for stored, state in zip(r.service.query(keys), written, strict=True):
                assert stored or state is State.Aborted

            r.kv[:] = 0
            wait_until(all_replaced)
            assert len(set(r.service.worker_pids) - set(workers)) == how_many
            task = r.service.create("r", keys, pages)
            if turn % 2:
                os.kill(r.service.worker_pids[0], signal.SIGKILL)
                killed += 1
            assert task.wait(WAIT)
            for n, state in enumerate(task.state()):
                part = r.kv[n * BLOCK : (n + 1) * BLOCK]
                if state is State.Finished:
                    assert bool((part == 8 * turn + n + 1).all())
            wait_until(all_replaced)
        stats = r.service.stats()
        assert stats["used_slots"] == BLOCK * stats["blocks"]  # what the dead were filling is free
        assert len(alive(r.service.worker_pids)) == 2


def test_an_idle_worker_that_dies_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with rig(tmp_path) as r:
        (before,) = r.service.worker_pids
        os.kill(before, signal.SIGKILL)
        wait_until(lambda: r.service.stats()["restarts"] == 1)
        r.write(["a"], [0])
        (after,) = r.service.worker_pids
        assert after != before
    assert f"pid {before}" in caplog.text


def test_a_block_that_kills_every_worker_is_aborted_in_the_end(tmp_path: Path) -> None:
    with rig(tmp_path, pages=BLOCK, page_bytes=1 << 20, slots=BLOCK) as r:
        kills = 0
        for attempt in range(50):  # until the first worker is caught at it
            r.service.clear()
            task = r.service.create("w", [f"poison {attempt}"], range(BLOCK))
            while not task.ready():
                if task.state() == [State.Working]:
                    os.kill(r.service.worker_pids[0], signal.SIGKILL)
                    kills += 1
                    wait_until(lambda: r.service.stats()["restarts"] == kills)  # noqa: B023
            if kills:
                break
        assert 1 <= kills <= 3
        wait_until(lambda: r.service.stats()["workers"] == 1)
        r.service.clear()
        again = r.service.create("w", ["harmless"], range(BLOCK))
        assert again.wait(WAIT)
        assert again.state() == [State.Finished]


def test_a_client_stopped_with_the_queue_in_hand_holds_up_but_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(queue_lock, "LOCK_TIMEOUT_SECONDS", 0.1)  # in this process
    with rig(tmp_path) as r:
        table = r.service._session.table
        stopped_client = RangeLock(f"/proc/self/fd/{table.fd}")
        try:
            stopped_client.lock(QUEUE_BYTE)
            os.kill(r.service.worker_pids[0], signal.SIGKILL)
            with pytest.raises(LockTimeoutError) as caught:
                r.service.create("w", ["a"], [0])
            error: Any = caught.value
            assert (error.path, error.byte) == (table.lock_path(), QUEUE_BYTE)
            wait_until(lambda: "waits to be replaced" in caplog.text)
            assert r.service.stats()["restarts"] == 0
            stopped_client.unlock(QUEUE_BYTE)
            wait_until(lambda: r.service.stats()["restarts"] == 1)
            assert r.service.active_create_count("write") == 0  # the refused task left nothing
            r.write(["a"], [0])
            stopped_client.lock(QUEUE_BYTE)
            r.service.close()  # does not wait for it forever either
        finally:
            stopped_client.close()


def test_a_thread_that_has_the_queue_is_named_as_another_process_is(tmp_path: Path) -> None:
    with rig(tmp_path, run=False) as r:
        waited, path = r.service._session.queue, r.service._session.table.lock_path()
        has, go_on = threading.Event(), threading.Event()

        def hold() -> None:
            with waited.held():
                has.set()
                go_on.wait(20)

        holder = threading.Thread(target=hold)
        holder.start()
        assert has.wait(20)
        with pytest.raises(LockTimeoutError) as caught, waited.held(0.01):
            pass
        go_on.set()
        holder.join()
        assert caught.value.values == {"path": path, "byte": QUEUE_BYTE, "timeout": 0.01}


def test_a_worker_outlasts_a_queue_that_is_not_free_in_time(tmp_path: Path) -> None:
    class Queue:
        claims = 0

        def claim(self, number: int, timeout: float | None) -> list[int]:
            self.claims += 1
            if self.claims < 3:
                raise LockTimeoutError("not free", path="table", byte=0, timeout=10)
            r.service._session.table.header["shutdown"] = 1
            return []

    with rig(tmp_path, run=False) as r:
        queue = Queue()
        engine = Mock(has_begun_reads=False, has_begun_writes=False)
        engine.finish_reads.return_value = engine.finish_writes.return_value = False
        parts: Any = (queue, np.zeros((1, 1), np.uint8), engine)
        Worker(1, r.service._session.table, *parts).run()
        assert queue.claims == 3
        assert not engine.rest.called  # nor did it sleep, in the end: what it waits for is there


@pytest.mark.parametrize("what", ["reads", "writes"])
def test_what_a_worker_has_begun_waits_no_longer_for_a_queue_that_is_not_free(
    tmp_path: Path, what: str
) -> None:
    engine = Mock(has_begun_reads=False, has_begun_writes=False)
    setattr(engine, f"has_begun_{what}", True)
    begun: list[bool] = []
    timeouts: list[float | None] = []

    def finish(kind: str) -> bool:
        was = getattr(engine, f"has_begun_{kind}")
        setattr(engine, f"has_begun_{kind}", False)
        return bool(was)

    engine.finish_reads.side_effect = lambda: finish("reads")
    engine.finish_writes.side_effect = lambda: finish("writes")

    def claim(number: int, timeout: float | None) -> list[int]:
        begun.append(engine.has_begun_reads or engine.has_begun_writes)
        timeouts.append(timeout)
        if len(begun) < 3:
            raise LockTimeoutError("not free", path="table", byte=0, timeout=timeout or 10)
        r.service._session.table.header["shutdown"] = 1
        return []

    with rig(tmp_path, run=False) as r:
        queue = Mock()
        queue.claim.side_effect = queue.claim_ahead.side_effect = claim
        parts: Any = (queue, np.zeros((1, 1), np.uint8), engine)
        Worker(1, r.service._session.table, *parts).run()
    assert begun == [True, False, False]
    assert queue.claim_ahead.call_count == (what == "reads")
    assert not engine.rest.called
    assert timeouts == [BUSY_QUEUE_SECONDS, None, None]


def test_a_killed_server_takes_its_workers_along_and_leaves_a_sound_store(tmp_path: Path) -> None:
    found = 0
    for turn in range(2):
        with Child(SERVER, tmp_path / "store", turn) as server:
            (workers,) = server.hear()
            while server.hear() != [2 * turn + 1]:  # the tasks of one turn are done, others not
                pass
            os.kill(server.pid, signal.SIGKILL)
            killed = time.monotonic()
            wait_until(lambda: not alive(workers), 10)  # noqa: B023
            assert time.monotonic() - killed < 10
        with rig(tmp_path, pages=64, page_bytes=PAGE, slots=512, shards=2, workers=2) as r:
            for old in range(turn + 1):
                for done in range(2 * old + 3):
                    keys = [f"{old} {done} {page}" for page in range(64)]
                    stored = r.service.query(keys)
                    task = r.read(keys, range(64))
                    for page, state in enumerate(task.state()):
                        assert (state is State.Finished) is stored[page]
                        if state is State.Finished:
                            expected = torch.from_numpy(page_bytes_of(str(old), page, PAGE))
                            assert torch.equal(r.kv[page], expected)
                            found += 1
            r.service._engine.reclaim()
            r.write([f"after {turn} {n}" for n in range(16)], range(16))  # in every shard
            stats = r.service.stats()
            assert stats["damaged"] == 0
            assert stats["used_slots"] == stats["blocks"]  # nothing in flight is left
    assert found >= 64
