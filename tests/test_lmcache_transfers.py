"""Jobs of LMCache on a service that is slow, full, stopped or closed: nobody blocks, nothing that
is late counts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from light_mem import (
    LocalCacheService,
    ServiceClosedError,
    TaskTableFullError,
    allocate_kvcache,
)
from light_mem.integrations.lmcache.jobs import Job
from light_mem.integrations.lmcache.transfers import TASK_BLOCKS, Transfers
from light_mem.integrations.lmcache.under_way import UnderWay
from tests.conftest import wait_until

PAGE = 4096
N = 4096


class Gate(LocalCacheService):
    """A service whose `create_regions` waits at a gate, or fails."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gate = threading.Event()
        self.gate.set()
        self.refuse_from = 10**9  # calls
        self.order: list[str] = []

    def create_regions(self, mode: str, hash_values: Any, regions: Any) -> Any:
        assert self.gate.wait(20)
        self.order.append(mode)
        if len(self.order) > self.refuse_from:
            raise TaskTableFullError("full", blocks=1, capacity=1, timeout=0.0)
        return super().create_regions(mode, hash_values, regions)


class Finished:
    """Collects the jobs that are over."""

    def __init__(self) -> None:
        self.jobs: dict[int, Job] = {}

    def __call__(self, job: Job) -> None:
        assert job.number not in self.jobs
        self.jobs[job.number] = job

    def wait(self, *numbers: int) -> list[Job]:
        wait_until(lambda: set(self.jobs) >= set(numbers), what=f"jobs {numbers}")
        return [self.jobs[number] for number in numbers]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Gate]:
    kv = allocate_kvcache(N, PAGE)
    with Gate(tmp_path / "store", N * PAGE, 1, kv, 1, create_timeout=0.0) as service:
        yield service
    service.__dict__.clear()  # pytest keeps the object for longer than its memory may live


@pytest.fixture
def finished() -> Iterator[Finished]:
    collected = Finished()
    yield collected
    collected.jobs.clear()


def transfers_of(service: Gate, finished: Finished, **options: Any) -> Transfers:
    settings: dict[str, Any] = {"max_queued": N * PAGE, "store_timeout": 60, "load_timeout": 60}
    return Transfers(service, finished, bool, **{**settings, **options})


@pytest.fixture
def transfers(service: Gate, finished: Finished) -> Iterator[Transfers]:
    made = transfers_of(service, finished)
    yield made
    service.gate.set()
    made.close(0.0)


Part = tuple[list[str], list[bool], list[int], list[Any]]


def part(n: int, start: int = 0, to: int = 0) -> Part:
    """Keys, objects (whether they have their memory), hashes and regions of `n` objects; `to`: how
    many pages further on they lie."""
    at = range(start, start + n)
    return [str(k) for k in at], [True] * n, list(at), [((k + to) * PAGE, PAGE) for k in at]


def stop_workers(service: LocalCacheService, stop: bool) -> None:
    for pid in service.worker_pids:
        (psutil.Process(pid).suspend if stop else psutil.Process(pid).resume)()


def test_calls_return_while_the_service_hangs(
    service: Gate, transfers: Transfers, finished: Finished
) -> None:
    service.run()
    service.gate.clear()  # as when a stopped process holds the queue
    numbers = [transfers.store(*part(1, n)) for n in range(100)]
    loads = [transfers.load(*part(1, 500, to=n)) for n in range(10)]
    assert finished.jobs == {}
    assert transfers.queued_bytes() == 100 * PAGE
    service.gate.set()
    assert all(job.done == [True] for job in finished.wait(*numbers))
    assert all(job.done == [False] for job in finished.wait(*loads))
    assert transfers.queued_bytes() == 0


def test_loads_go_before_stores(service: Gate, transfers: Transfers, finished: Finished) -> None:
    service.run()
    service.gate.clear()
    numbers = [transfers.store(*part(1, n)) for n in range(5)]  # the first may be at the gate
    numbers.append(transfers.load(*part(1, 100)))
    service.gate.set()
    finished.wait(*numbers)
    assert "read" in service.order[:2]


def test_a_full_table_drops_stores_and_fails_loads(
    service: Gate, transfers: Transfers, finished: Finished
) -> None:
    service.run()
    service.refuse_from = 0
    (store,) = finished.wait(transfers.store(*part(5)))
    (load,) = finished.wait(transfers.load(*part(5)))
    assert store.done == load.done == [False] * 5
    assert transfers.counters["dropped_blocks"] == 5
    assert transfers.counters["failed_load_blocks"] == 5
    assert service.stats()["dropped_stores"] == 5
    assert transfers.queued_bytes() == 0


def test_of_a_large_job_the_part_that_found_room_counts(
    service: Gate, transfers: Transfers, finished: Finished
) -> None:
    service.run()
    n = 2 * TASK_BLOCKS + 10
    service.refuse_from = 2
    expected = [True] * (2 * TASK_BLOCKS) + [False] * 10
    assert finished.wait(transfers.store(*part(n)))[0].done == expected
    assert transfers.counters["dropped_blocks"] == 10
    service.refuse_from = 10**9
    assert finished.wait(transfers.load(*part(n)))[0].done == expected


def test_what_lies_out_of_reach_fails_alone(
    service: Gate, transfers: Transfers, finished: Finished
) -> None:
    service.run()
    keys, objects, hashes, regions = part(3)
    regions[1] = None
    number = transfers.store(keys, objects, hashes, regions)
    assert finished.wait(number)[0].done == [True, False, True]
    assert finished.wait(transfers.load(*part(3, to=10)))[0].done == [True, False, True]
    assert finished.wait(transfers.load(keys[:1], [True], hashes[:1], [None]))[0].done == [False]


def test_a_load_that_takes_too_long_is_over_when_nobody_holds_its_memory(
    service: Gate, finished: Finished
) -> None:
    transfers = transfers_of(service, finished, load_timeout=0.2)
    service.run()
    finished.wait(transfers.store(*part(3)))
    stop_workers(service, True)
    try:
        (load,) = finished.wait(transfers.load(*part(3, to=10)))
        assert load.done == [False] * 3
    finally:
        stop_workers(service, False)
    (load,) = finished.wait(transfers.load(*part(3, to=10)))
    assert load.done == [True] * 3
    transfers.close(5)


def test_a_store_that_waited_too_long_is_not_begun(service: Gate, finished: Finished) -> None:
    transfers = transfers_of(service, finished, store_timeout=0.05)
    service.run()
    service.gate.clear()
    first, second = transfers.store(*part(1)), transfers.store(*part(1, 1))
    wait_until(lambda: transfers.queued_bytes() == 2 * PAGE)
    threading.Event().wait(0.1)  # LMCache's locks run out meanwhile
    service.gate.set()
    assert [job.done for job in finished.wait(first, second)] == [[False], [False]]
    assert len(service.order) == 1
    transfers.close(5)
    assert transfers.queued_bytes() == 0


def test_a_store_that_ends_too_late_is_taken_out_again(service: Gate, finished: Finished) -> None:
    transfers = transfers_of(service, finished, store_timeout=0.3)
    service.run()
    begun = service.create_regions

    def late(*arguments: Any) -> Any:
        task = begun(*arguments)
        assert task.wait(20)
        threading.Event().wait(0.4)
        return task

    service.create_regions = late  # type: ignore[method-assign]
    assert finished.wait(transfers.store(*part(2)))[0].done == [False, False]
    wait_until(lambda: service.query([0, 1]) == [False, False])
    transfers.close(5)


def test_what_is_being_stored_is_found_when_it_is_sure(
    service: Gate, transfers: Transfers, finished: Finished
) -> None:
    service.run()
    assert transfers.find([0, 1]) == [False, False]
    first = transfers.store(*part(2))
    finished.wait(first)
    assert transfers.find([0, 1, 2]) == [True, True, False]
    service.gate.clear()
    keys, _, hashes, regions = part(2)
    second = transfers.store(keys, [True, False], hashes, regions)  # the other lost its memory
    assert service.query(hashes) == [True, True]
    assert transfers.find(hashes) == [False, False]
    service.gate.set()
    assert finished.wait(second)[0].done == [True, False]
    wait_until(lambda: service.query(hashes) == [True, False])
    wait_until(lambda: transfers.find(hashes) == [True, False])
    finished.wait(transfers.store(*part(2)))
    assert transfers.find(hashes) == [True, True]


def test_closing_waits_for_stores_and_then_for_nobody(service: Gate, finished: Finished) -> None:
    transfers = transfers_of(service, finished)
    number = transfers.store(*part(2))  # no worker yet
    threading.Timer(0.1, service.run).start()
    transfers.close(20)
    assert finished.wait(number)[0].done == [True, True]
    with pytest.raises(ServiceClosedError):
        transfers.service()
    assert finished.wait(transfers.store(*part(2)))[0].done == [False, False]
    assert finished.wait(transfers.load(*part(2)))[0].done == [False, False]
    transfers.close(20)


def test_closing_gives_up_what_takes_too_long(service: Gate, finished: Finished) -> None:
    transfers = transfers_of(service, finished)
    number = transfers.store(*part(2))  # no worker, ever
    transfers.close(0.05)
    assert finished.wait(number)[0].done == [False, False]


def test_what_breaks_a_close_off_is_made_up_for_by_the_next(
    service: Gate, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfers = transfers_of(service, finished)
    number = transfers.store(*part(2))  # no worker, ever

    def interrupt(self: UnderWay, timeout: float) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(UnderWay, "wait_idle", interrupt)
        with pytest.raises(KeyboardInterrupt):
            transfers.close(20)
    assert transfers.service() is service
    transfers.close(0.0)
    assert finished.wait(number)[0].done == [False, False]
    with pytest.raises(ServiceClosedError):
        transfers.service()


def test_whoever_closes_returns_when_it_is_closed(service: Gate, finished: Finished) -> None:
    transfers = transfers_of(service, finished)
    number = transfers.store(*part(2))  # no worker yet
    first = threading.Thread(target=transfers.close, args=(20,))
    first.start()
    wait_until(lambda: not transfers.is_alive())  # it has begun
    threading.Timer(0.2, service.run).start()
    transfers.close(20)
    assert finished.jobs[number].done == [True, True]
    with pytest.raises(ServiceClosedError):
        transfers.service()
    first.join(20)


def test_closing_ends_each_job_that_was_queued_once(service: Gate, finished: Finished) -> None:
    transfers = transfers_of(service, finished)
    service.gate.clear()  # as when a stopped process holds the queue
    numbers = [transfers.store(*part(1, n)) for n in range(5)]
    numbers += [transfers.load(*part(1, n)) for n in range(10, 13)]
    threading.Timer(0.2, service.gate.set).start()
    transfers.close(0.0)
    assert set(finished.jobs) == set(numbers)
    assert not any(job.done[0] for job in finished.jobs.values())
    assert transfers.queued_bytes() == 0


def test_an_error_that_nobody_expects_fails_its_job_alone(
    service: Gate, transfers: Transfers, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.run()
    monkeypatch.setattr(service, "create_regions", lambda *_: 1 / 0)
    assert finished.wait(transfers.store(*part(2)))[0].done == [False, False]
    monkeypatch.undo()
    assert finished.wait(transfers.store(*part(2)))[0].done == [True, True]
    assert transfers.is_alive()


def test_an_idle_adapter_uses_no_processor(service: Gate, transfers: Transfers) -> None:
    service.run()
    (thread,) = [t for t in threading.enumerate() if t.name == "lightmem-lmcache"]
    status = Path(f"/proc/self/task/{thread.native_id}/status")

    def switches() -> int:
        lines = status.read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)

    wait_until(lambda: service.active_create_count("w") == 0)
    before = switches()
    threading.Event().wait(0.5)
    assert switches() - before <= 2
