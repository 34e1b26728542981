"""Jobs of the tier on a service that is slow, full, stopped or closed: nobody blocks."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from light_mem import InvalidArgumentError, LocalCacheService, TaskTableFullError, allocate_kvcache
from light_mem.integrations.namespace import Namespace
from light_mem.integrations.vllm.background import TASK_BLOCKS
from light_mem.integrations.vllm.jobs import Fence, Finished, Inbox, Job, Stop
from light_mem.integrations.vllm.opening import rows_of
from light_mem.integrations.vllm.transfers import TierTransfers
from tests.conftest import wait_until

ROW = 4096
KEYS = [n.to_bytes(36, "big") for n in range(4096)]


class Gate(LocalCacheService):
    """A service whose `create` waits at a gate, or fails."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gate = threading.Event()
        self.gate.set()
        self.refuse_from = 10**9  # create calls
        self.order: list[str] = []

    def create(self, mode: str, hash_values: Any, page_indices: Any) -> Any:
        assert self.gate.wait(20)
        self.order.append(mode)
        if len(self.order) > self.refuse_from:
            raise TaskTableFullError("full", blocks=1, capacity=1, timeout=0.0)
        return super().create(mode, hash_values, page_indices)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Gate]:
    kv = allocate_kvcache(4096, ROW)
    with Gate(tmp_path / "store", 4096 * ROW, 1, kv, 1, create_timeout=0.0) as service:
        yield service
    service.__dict__.clear()  # pytest keeps the object for longer than its memory may live


@pytest.fixture
def transfers(service: Gate) -> Iterator[TierTransfers]:
    made = TierTransfers(service, Namespace({}), max_queued=4096, load_timeout=60)
    yield made
    service.gate.set()
    made.close(0.0)


def rows(n: int, start: int = 0) -> Any:
    return np.arange(start, start + n)


def results(transfers: TierTransfers, *numbers: int) -> dict[int, Finished]:
    found: dict[int, Finished] = {}

    def poll() -> bool:
        found.update({result.job_id: result for result in transfers.finished()})
        return set(found) == set(numbers)

    wait_until(poll, what=f"jobs {numbers}")
    return found


def test_calls_return_while_the_service_hangs(service: Gate, transfers: TierTransfers) -> None:
    service.run()
    service.gate.clear()  # as when a stopped process holds the queue
    for n in range(200):
        transfers.store(n, [KEYS[n]], rows(1, n), "r")
    transfers.load(200, [KEYS[0]], rows(1, 300), "r")
    transfers.touch(KEYS[:4])
    assert not transfers.lookup(KEYS[0], "r")
    assert transfers.finished() == []
    assert not transfers.drain(timeout=0.05)
    service.gate.set()
    done = results(transfers, *range(201))
    assert all(done[n].success for n in range(200))


def test_loads_go_before_stores(service: Gate, transfers: TierTransfers) -> None:
    service.run()
    service.gate.clear()
    for n in range(5):  # the first may be at the gate already
        transfers.store(n, [KEYS[n]], rows(1, n), "r")
    transfers.load(9, [KEYS[0]], rows(1, 30), "r")
    service.gate.set()
    results(transfers, *range(5), 9)
    assert "read" in service.order[:2]


def test_a_full_table_drops_stores_and_fails_loads(service: Gate, transfers: TierTransfers) -> None:
    service.run()
    service.refuse_from = 0
    transfers.store(1, KEYS[:5], rows(5), "r")
    transfers.load(2, KEYS[:5], rows(5, 10), "r")
    done = results(transfers, 1, 2)
    assert not done[1].success
    assert not done[2].success
    assert done[2].done == ()
    assert transfers.counters["dropped_blocks"] == 5
    assert transfers.counters["failed_store_blocks"] == 0
    assert transfers.counters["failed_load_blocks"] == 5
    assert transfers.queued() == 0


def test_of_a_large_job_the_part_that_found_room_counts(
    service: Gate, transfers: TierTransfers
) -> None:
    service.run()
    n = 2 * TASK_BLOCKS + 10
    service.refuse_from = 2
    transfers.store(1, KEYS[:n], rows(n), "r")
    done = results(transfers, 1)[1]
    assert done.done == tuple(KEYS[: 2 * TASK_BLOCKS])
    assert transfers.counters["dropped_blocks"] == 10
    service.refuse_from = 10**9
    transfers.load(2, KEYS[:n], rows(n), "r")
    done = results(transfers, 2)[2]
    assert done.done == tuple(KEYS[: 2 * TASK_BLOCKS])
    assert done.nbytes == 2 * TASK_BLOCKS * ROW


def test_a_load_that_takes_too_long_is_given_up(service: Gate) -> None:
    transfers = TierTransfers(service, Namespace({}), max_queued=64, load_timeout=0.0)
    hashes = transfers_hashes(KEYS[:3])
    service.run()
    assert service.create("write", hashes, [0, 1, 2]).wait(20)
    stop_workers(service, True)
    try:
        transfers.load(1, KEYS[:3], rows(3, 10), "r")
        done = results(transfers, 1)[1]
        assert not done.success
        assert done.done == ()
        assert not transfers.lookup(KEYS[0], "r")
    finally:
        stop_workers(service, False)
    transfers.close(5)


def transfers_hashes(keys: Sequence[bytes]) -> list[int]:
    return Namespace({}).hashes(keys)


def stop_workers(service: LocalCacheService, stop: bool) -> None:
    for pid in service.worker_pids:
        (psutil.Process(pid).suspend if stop else psutil.Process(pid).resume)()


def test_a_service_that_closed_is_a_miss_and_fails_jobs(
    service: Gate, transfers: TierTransfers, caplog: pytest.LogCaptureFixture
) -> None:
    service.close()
    for _ in range(100):
        assert not transfers.lookup(KEYS[0], "r")
    transfers.store(1, KEYS[:2], rows(2), "r")
    transfers.load(2, KEYS[:2], rows(2), "r")
    done = results(transfers, 1, 2)
    assert not done[1].success
    assert not done[2].success
    assert sum("look-ups fail" in line for line in caplog.messages) == 1  # not a hundred


def test_an_error_that_nobody_expects_fails_its_job_alone(
    service: Gate, transfers: TierTransfers, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.run()
    monkeypatch.setattr(service, "create", lambda *_: 1 / 0)
    transfers.store(1, KEYS[:2], rows(2), "r")
    assert not results(transfers, 1)[1].success
    monkeypatch.undo()
    transfers.store(2, KEYS[:2], rows(2), "r")
    assert results(transfers, 2)[2].success


def test_draining_waits_for_what_is_under_way(service: Gate, transfers: TierTransfers) -> None:
    transfers.store(1, KEYS[:2], rows(2), "r")  # no worker yet
    assert not transfers.drain(timeout=0.05)
    service.run()
    assert transfers.drain(timeout=20)
    (done,) = transfers.finished()
    assert done.success


def test_after_closing_jobs_fail_and_nothing_is_found(
    service: Gate, transfers: TierTransfers
) -> None:
    service.run()
    transfers.store(1, KEYS[:2], rows(2), "r")
    transfers.close(20)
    transfers.store(2, KEYS[:2], rows(2), "r")
    transfers.touch(KEYS)
    done = results(transfers, 1, 2)
    assert done[1].success
    assert not done[2].success
    assert not transfers.lookup(KEYS[0], "r")


def test_a_view_that_is_no_primary_tier_is_refused() -> None:
    for view in (memoryview(bytearray(10)), memoryview(bytes(8)).cast("b", (2, 4))):
        with pytest.raises(InvalidArgumentError, match="num_chunks, row_bytes"):
            rows_of(view)


def test_hundreds_of_jobs_under_way_all_come_to_an_end(
    service: Gate, transfers: TierTransfers
) -> None:
    for n in range(300):  # more than one look at them takes in
        transfers.store(n, [KEYS[n]], rows(1, n), "r")
    assert not transfers.drain(timeout=0.05)  # no worker yet
    assert transfers.finished() == []
    assert transfers.queued() == 300
    service.run()
    assert transfers.drain(timeout=60)
    done = transfers.finished()
    assert sorted(job.job_id for job in done) == list(range(300))
    assert all(job.success for job in done)
    assert transfers.queued() == 0


def test_a_stopped_worker_that_a_load_waits_for_delays_no_other_job(service: Gate) -> None:
    hashes = transfers_hashes(KEYS[:2])
    service.run()
    assert service.create("write", hashes, [0, 1]).wait(20)
    transfers = TierTransfers(service, Namespace({}), max_queued=64, load_timeout=0.0)
    stop_workers(service, True)
    try:
        transfers.store(1, KEYS[2:3], rows(1, 2), "r")  # waits for a worker
        transfers.load(2, KEYS[:1], rows(1, 10), "r")
        assert not results(transfers, 2)[2].success
        transfers.store(3, KEYS[:2], rows(2), "r")  # stored already
        assert results(transfers, 3)[3].success
    finally:
        stop_workers(service, False)
    assert results(transfers, 1)[1].success
    transfers.close(5)


def test_what_is_queued_when_the_tier_closes_has_a_result_too(
    service: Gate, transfers: TierTransfers, caplog: pytest.LogCaptureFixture
) -> None:
    service.run()
    service.gate.clear()
    for n in range(4):
        transfers.store(n, [KEYS[n]], rows(1, n), "r")
    closing = threading.Thread(target=transfers.close, args=(0.0,))
    closing.start()
    wait_until(lambda: "they are given up" in caplog.text)
    service.gate.set()
    closing.join()
    assert sorted(job.job_id for job in transfers.finished()) == [0, 1, 2, 3]
    assert transfers.queued() == 0


def test_results_are_made_in_the_background(service: Gate) -> None:
    service.run()
    here = threading.get_ident()
    transfers = TierTransfers(
        service,
        Namespace({}),
        max_queued=64,
        load_timeout=60,
        tell=lambda job: (job.job_id, threading.get_ident() == here),
    )
    transfers.store(1, KEYS[:2], rows(2), "r")
    assert transfers.drain(20)
    assert transfers.finished() == [(1, False)]
    transfers.close(5)


def test_the_inbox_gives_what_is_urgent_first() -> None:
    inbox = Inbox()
    store, load = (Job(n, n == 2, [], rows(0), "r") for n in (1, 2))
    for item in (fence := Fence(), store, load, stop := Stop(())):
        inbox.put(item)
    assert [inbox.get() for _ in range(4)] == [stop, load, store, fence]
    assert inbox.pop() is None


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("load", [False, True])
def test_who_waits_at_the_inbox_finds_what_comes(before: bool, load: bool) -> None:
    inbox = Inbox()
    got: list[Any] = []
    if before:  # then it naps instead of sleeping until it is woken
        inbox.put(Fence())
        inbox.get()
    thread = threading.Thread(target=lambda: got.append(inbox.get()))
    thread.start()
    job = Job(1, load, [], rows(0), "r")
    inbox.put(job)
    thread.join(20)
    assert got == [job]
    thread = threading.Thread(target=lambda: got.append(inbox.get()))
    thread.start()
    inbox.wake()
    thread.join(20)
    assert got == [job, None]
