"""What was stored from memory that LMCache had let go of goes, whatever else happens."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from light_mem import LocalCacheService, LockTimeoutError, State, WorkerStartError, allocate_kvcache
from light_mem.integrations.lmcache import discards as module
from light_mem.integrations.lmcache import transfers as transfers_module
from light_mem.integrations.lmcache.discards import Discards, Doubts
from light_mem.integrations.lmcache.jobs import Job
from light_mem.integrations.lmcache.transfers import Transfers
from light_mem.task import CacheTask
from tests.conftest import wait_until

PAGE = 4096
N = 64
REGION = [(0, PAGE)]


class Object:
    """An object of LMCache."""

    held = True


class Rig:
    """Transfers on a store, of one life."""

    def __init__(self, store: Path) -> None:
        self.kv = allocate_kvcache(N, PAGE)
        self.service = LocalCacheService(store, N * PAGE, 1, self.kv, 1, create_timeout=0.0)
        self.service.run()
        self.over: dict[int, Job] = {}
        self.transfers = Transfers(
            self.service,
            lambda job: self.over.__setitem__(job.number, job),
            lambda obj: obj.held,
            max_queued=N * PAGE,
            store_timeout=60,
            load_timeout=60,
        )

    def store(self, value: int, held: bool = True) -> tuple[int, Object]:
        obj = Object()
        obj.held = held
        return self.transfers.store([str(value)], [obj], [value], REGION), obj

    def load(self, value: int) -> int:
        return self.transfers.load([str(value)], [Object()], [value], [(PAGE, PAGE)])

    def wait(self, number: int) -> list[bool]:
        wait_until(lambda: number in self.over, what=f"job {number}")
        return self.over[number].done

    def end(self) -> None:
        self.transfers.close(0.0)
        self.over.clear()


class Late:
    """A task that tells late that it is ready."""

    def __init__(self, task: CacheTask) -> None:
        self.task = task
        self.callbacks: list[Callable[[Any], object]] = []

    def state(self) -> list[State]:
        return self.task.state()

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        self.callbacks.append(callback)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Callable[[], Rig]]:
    rigs: list[Rig] = []

    def make() -> Rig:
        rigs.append(Rig(tmp_path / "store"))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.end()
        rig.__dict__.clear()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.01)


@pytest.mark.parametrize("deaf", [False, True])
def test_a_block_that_a_worker_finishes_while_the_adapter_closes_does_not_stay(
    live: Callable[[], Rig], monkeypatch: pytest.MonkeyPatch, deaf: bool
) -> None:
    first = live()
    locked, unlock = threading.Event(), threading.Event()

    def hold() -> None:
        with first.service._engine.change(0):
            locked.set()
            unlock.wait(8)

    holder = threading.Thread(target=hold)
    holder.start()
    assert locked.wait(20)
    number, obj = first.store(7)
    wait_until(first.transfers._under_way.tasks, what="a task")
    (task,) = first.transfers._under_way.tasks()
    wait_until(lambda: task.state() == [State.Working], what="a worker")
    obj.held = False  # cleared by force; the memory is another object's
    first.kv.fill_(9)
    if deaf:  # the worker is past the point where it looks, and slow
        monkeypatch.setattr(first.service, "abort", lambda *_: None)
        monkeypatch.setattr(transfers_module, "_ABORT_SECONDS", 0.05)

    def go_on() -> None:
        first.transfers._thread.join()
        if deaf:
            wait_until(lambda: first.service._session.table.shutdown, what="the end of workers")
        unlock.set()

    helper = threading.Thread(target=go_on)
    helper.start()
    first.transfers.close(0.0)
    helper.join()
    holder.join()
    assert first.over[number].done == [False]
    assert live().service.query([7]) == [False]


def test_closing_takes_out_what_it_cannot_ask_about_any_more(
    live: Callable[[], Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers_module, "TASK_BLOCKS", 1)
    monkeypatch.setattr(transfers_module, "_CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(transfers_module, "_ABORT_SECONDS", 0.05)
    rig = live()
    entered, leave = threading.Event(), threading.Event()
    create = rig.service.create_regions

    def create_once(mode: str, hashes: Any, regions: Any) -> Any:
        if hashes == [1]:
            return create(mode, hashes, regions)
        entered.set()
        assert leave.wait(60)  # as when a stopped process holds the queue
        raise LockTimeoutError("held")

    monkeypatch.setattr(rig.service, "create_regions", create_once)
    objects = [Object(), Object()]
    number = rig.transfers.store(["1", "2"], objects, [1, 2], [*REGION, (PAGE, PAGE)])
    assert entered.wait(20)
    wait_until(lambda: rig.service.query([1]) == [True])
    objects[0].held = False
    rig.transfers.close(0.0)
    try:
        assert number not in rig.over
        assert live().service.query([1]) == [False]
    finally:
        leave.set()
    assert rig.wait(number) == [False, False]
    monkeypatch.undo()


def test_a_discard_delays_no_load_while_a_lock_is_held(
    live: Callable[[], Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = live()
    assert rig.wait(rig.store(1)[0]) == [True]
    entered, leave = threading.Event(), threading.Event()
    delete = rig.service.delete

    def slow(hashes: Any) -> int:
        entered.set()
        assert leave.wait(60)
        return delete(hashes)

    monkeypatch.setattr(rig.service, "delete", slow)
    rig.wait(rig.store(2, held=False)[0])
    assert entered.wait(20)
    try:
        assert rig.wait(rig.load(1)) == [True]
        # What waits to be taken out is neither found nor loaded.
        assert rig.service.query([2]) == [True]
        assert rig.transfers.find([2]) == [False]
        assert rig.wait(rig.load(2)) == [False]
        assert rig.service.stats()["read_tasks"] == 1
    finally:
        leave.set()
    wait_until(lambda: rig.service.query([2]) == [False])
    monkeypatch.undo()


def test_a_load_that_copied_what_is_found_spoiled_meanwhile_is_a_miss(
    live: Callable[[], Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = live()
    rig.wait(rig.store(1)[0])
    late: list[Late] = []
    create = rig.service.create_regions

    def create_late(mode: str, hashes: Any, regions: Any) -> Any:
        task = create(mode, hashes, regions)
        if mode == "write":
            return task
        late.append(Late(task))
        return late[0]

    monkeypatch.setattr(rig.service, "create_regions", create_late)
    load = rig.load(1)
    wait_until(lambda: bool(late) and late[0].task.ready() and bool(late[0].callbacks))
    rig.wait(rig.store(1, held=False)[0])
    wait_until(lambda: rig.service.query([1]) == [False] and 1 not in rig.transfers._doubts)
    assert late[0].state() == [State.Finished]
    for callback in late[0].callbacks:
        callback(late[0])
    assert rig.wait(load) == [False]
    late.clear()
    monkeypatch.undo()


def test_a_discard_works_without_workers(
    live: Callable[[], Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = live()
    rig.wait(rig.store(1)[0])
    rig.service.end_workers()
    rig.transfers._discards.add([1])
    rig.end()
    assert live().service.query([1]) == [False]


# --- without a store ------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [LockTimeoutError("held"), OSError(5, "the device")])
def test_a_discard_that_fails_is_tried_again_with_pauses(quick: None, error: Exception) -> None:
    tries: list[list[int]] = []
    doubts = Doubts()

    def delete(hashes: list[int]) -> None:
        tries.append(hashes)
        if len(tries) < 3:
            raise error

    made = Discards(delete, doubts)
    made.add([1, 2])
    assert 1 in doubts
    wait_until(lambda: 1 not in doubts and 2 not in doubts)
    assert tries == [[1, 2]] * 3
    made.close(5)


def test_a_failing_discard_does_not_spin() -> None:
    tries: list[int] = []

    def delete(hashes: list[int]) -> None:
        tries.append(1)
        raise LockTimeoutError("held")

    made = Discards(delete, Doubts())
    made.add([1])
    wait_until(lambda: bool(tries))
    threading.Event().wait(0.3)
    assert len(tries) == 1
    made.close(5)
    assert len(tries) == 2  # the last try


def test_what_cannot_be_taken_out_is_an_error_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    tries: list[int] = []

    def gone(hashes: list[int]) -> None:
        tries.append(1)
        raise WorkerStartError("the service has no workers any more")

    def held(hashes: list[int]) -> None:
        raise LockTimeoutError("held")

    doubts = Doubts()
    made = Discards(gone, doubts)
    made.add([1])
    wait_until(lambda: errors(caplog) == 1)
    made.close(5)
    assert tries == [1]
    assert 1 in doubts  # for what is stored may still be wrong
    made = Discards(held, Doubts())
    made.add([2])
    made.close(5)
    made.add([3])
    assert errors(caplog) == 3


def test_closing_waits_for_a_bounded_time(caplog: pytest.LogCaptureFixture) -> None:
    tries: list[list[int]] = []
    entered, leave = threading.Event(), threading.Event()

    def delete(hashes: list[int]) -> None:
        tries.append(hashes)
        entered.set()
        assert leave.wait(20)

    made = Discards(delete, Doubts())
    for n in range(5):
        made.add([n])
    assert entered.wait(20)
    threading.Timer(0.2, leave.set).start()
    made.close(0.0)
    assert tries == [[0]]
    assert errors(caplog) == 4


def errors(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.levelno == logging.ERROR for record in caplog.records)
