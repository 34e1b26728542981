"""Short reads that `create` makes itself: every byte is right, or none of it is believed."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import light_mem
from light_mem import ServiceClosedError, State
from tests.engine_helpers import let_go
from tests.service_rig import WAIT, Rig, rig
from tests.small_rig import LIMIT, PAGE, data_file, go_on, stored

__all__ = ["stored"]  # fixtures


def test_a_damaged_block_is_found_damaged_by_a_worker(stored: Rig) -> None:
    with data_file(stored).open("r+b") as file:
        whole = file.read()
        wanted = stored.kv[5].numpy().tobytes()
        file.seek(whole.index(wanted) + 100)
        file.write(bytes([wanted[100] ^ 1]))
    task = stored.service.create("read", [5], [20])
    assert not task.ready()
    go_on(stored)
    assert task.wait(WAIT)
    assert task.state() == [State.Aborted]
    assert stored.service.stats()["damaged"] == 1
    assert not stored.service.query(5)


def test_without_verification_damage_is_not_looked_for(tmp_path: Path) -> None:
    with rig(tmp_path, page_bytes=PAGE, small_read_bytes=LIMIT, verify=False) as r:
        r.write([5], [0])
        with data_file(r).open("r+b") as file:
            at = file.read().index(r.kv[0].numpy().tobytes())
            file.seek(at)
            file.write(bytes(8))
        task = r.service.create("read", [5], [1])
        assert task.state() == [State.Finished]
        assert not r.kv[1, :8].any()
        assert bool((r.kv[1, 8:] == r.kv[0, 8:]).all())
    let_go(r)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("page_bytes", [4096, 3840, 520])
def test_a_block_of_small_pages_is_believed_before_its_pages_are_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page_bytes: int, verify: bool
) -> None:
    pages = [20, 3, 31, 0, 17, 9, 26]
    options = {"page_bytes": page_bytes, "small_read_bytes": 1 << 20, "verify": verify}
    with rig(tmp_path, **options) as r:
        for key in (5, 6):
            r.fill(key, pages)
            assert r.service.create("write", [key], pages).wait(WAIT)
        (worker,) = r.service.worker_pids
        os.kill(worker, signal.SIGSTOP)
        elsewhere = [1, 30, 2, 28, 4, 22, 6]
        others = sorted(set(range(32)) - set(elsewhere))
        r.blank(range(32))
        assert r.service.create("read", [5], elsewhere).state() == [State.Finished]
        assert r.holds(5, elsewhere)
        assert r.is_blank(others)
        # A byte of the last page is not what was written.
        with data_file(r).open("r+b") as file:
            r.fill(6, pages)
            last = r.kv[pages[-1]].numpy().tobytes()
            at = file.read().index(last) + page_bytes - 1
            file.seek(at)
            file.write(bytes([last[-1] ^ 1]))
        r.blank(range(32))
        damaged = r.service.create("read", [6], elsewhere)
        assert damaged.ready() == (not verify)
        assert r.is_blank(range(32)) == verify
        # Evicted while it was read.
        with monkeypatch.context() as patch:
            patch.setattr(r.service._engine.lookup, "is_unchanged", lambda _: False)
            r.blank(range(32))
            gone = r.service.create("read", [5], elsewhere)
        assert not gone.ready()
        assert r.is_blank(range(32))
        os.kill(worker, signal.SIGCONT)
        assert gone.wait(WAIT)
        assert damaged.wait(WAIT)
        assert damaged.state() == [State.Aborted if verify else State.Finished]
        assert r.service.stats()["damaged"] == verify
        scatterer = r.service._small_reads._scatterer
        assert scatterer._views is not None
    assert scatterer._views is None  # a closed service lets go of the KV memory
    let_go(r)


def test_regions_and_blocks_in_several_runs_come_back_byte_by_byte(tmp_path: Path) -> None:
    with rig(tmp_path, pages=64, page_bytes=PAGE, slots=64, small_read_bytes=1 << 20) as r:
        # Of 64 one-page blocks every second goes: what is longer then lies in several runs.
        r.write(range(64), range(64))
        assert r.service.delete(list(range(0, 64, 2))) == 32
        long = [(5, 3 * PAGE + 17), (5 * PAGE, 2 * PAGE)]
        rng = np.random.default_rng(1)
        memory = r.kv.reshape(-1).numpy()
        memory[:] = rng.integers(0, 256, len(memory), np.uint8)
        expected = np.concatenate([memory[a : a + n].copy() for a, n in long])
        task = r.service.create_regions("write", ["long"], [long])
        assert task.wait(WAIT)
        assert task.state() == [State.Finished]
        entry = r.service._engine.lookup.find_one(*light_mem.index.keys.as_key("long"))
        assert entry >= 0
        where = r.service._engine.lookup.locate(entry, *light_mem.index.keys.as_key("long"))
        assert where is not None
        assert len(where.runs) > 1
        (worker,) = r.service.worker_pids
        os.kill(worker, signal.SIGSTOP)
        try:
            elsewhere = [(40 * PAGE + 1, 3 * PAGE + 17 + 100), (50 * PAGE, 2 * PAGE - 100)]
            task = r.service.create_regions("read", ["long"], [elsewhere])
            assert task.ready()
        finally:
            os.kill(worker, signal.SIGCONT)
        found = np.concatenate([memory[a : a + n] for a, n in elsewhere])
        assert np.array_equal(found, expected)
        del memory
    let_go(r)


def test_a_file_cut_short_is_no_bus_error(stored: Rig) -> None:
    os.truncate(data_file(stored), 1 << 14)
    try:
        entries = stored.service.query(list(range(16)))
        assert all(entries)
        task = stored.service.create("read", [15], [20])
        assert not task.ready()
        stored.service.abort(task)
        assert task.state() == [State.Aborted]
    finally:
        os.truncate(data_file(stored), 2 << 20)


def test_a_read_in_whose_middle_its_thread_closes_the_service_ends_and_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome: list[object] = []
    with rig(tmp_path, page_bytes=PAGE, small_read_bytes=LIMIT, verify=False) as r:
        r.write([1], [0])
        preadv = os.preadv

        def closing(*arguments: int) -> int:  # as the handler of a signal would
            done = preadv(*arguments)  # type: ignore[call-arg, arg-type]
            r.service.close()
            return done

        def read() -> None:
            try:
                outcome.append(r.service.create("read", [1], [20]))
            except ServiceClosedError as error:
                outcome.append(error)

        monkeypatch.setattr(os, "preadv", closing)
        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        thread.join(WAIT)
        assert not thread.is_alive()
        assert isinstance(outcome[0], ServiceClosedError)
    let_go(r)


def test_threads_that_read_against_eviction_never_believe_wrong_bytes(tmp_path: Path) -> None:
    readers, enough, keys = 4, 200, 96
    with rig(tmp_path, pages=64, page_bytes=PAGE, slots=64, small_read_bytes=LIMIT) as r:
        wrong: list[str] = []
        finished = [0] * readers
        churned = threading.Event()
        stop = threading.Event()

        def read(mine: int) -> None:
            page = 32 + mine
            rng = np.random.default_rng(mine)
            deadline = time.monotonic() + WAIT
            while not (finished[mine] >= enough and churned.is_set()) and not wrong:
                assert time.monotonic() < deadline
                key = int(rng.integers(keys))
                task = r.service.create("read", [key], [page])
                if not task.wait(WAIT):
                    wrong.append(f"{key} hangs")
                elif task.state() == [State.Finished]:
                    finished[mine] += 1
                    if not r.holds(key, [page]):
                        wrong.append(f"{key} has other bytes")
                        return

        def write() -> None:
            rng = np.random.default_rng(99)
            while not stop.is_set():
                chosen = rng.choice(keys, 8, replace=False).tolist()
                for page, key in enumerate(chosen):
                    r.fill(key, [page])
                r.service.create("write", chosen, list(range(8))).wait(WAIT)
                if r.service.stats(ages=False)["evictions"] > 50:
                    churned.set()

        writer = threading.Thread(target=write)
        threads = [threading.Thread(target=read, args=(n,)) for n in range(readers)]
        writer.start()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stop.set()
        writer.join()
        assert not wrong
        assert min(finished) >= enough
        assert churned.is_set()
    let_go(r)
