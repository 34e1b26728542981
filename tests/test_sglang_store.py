"""Pages in and out of the store when services fail, stall or stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from light_mem import LockTimeoutError, ServiceClosedError, State
from light_mem.errors import LightMemError, TaskTableFullError, WorkerStartError
from light_mem.integrations.namespace import Namespace
from light_mem.integrations.sglang.pool import HostPool
from light_mem.integrations.sglang.store import PageStore
from tests.sglang_fake_pools import MHATokenToKVPoolHost, StatePool

KEYS = ["a", "b", "c"]
INDICES = torch.arange(12)


class Task:
    """A task whose blocks are in `states`; it is ready when they are told to be."""

    mode = "read"

    def __init__(self, states: list[State], ready: bool) -> None:
        self.states = states
        self.ready = ready
        self.waited: list[float] = []

    def wait(self, timeout: float) -> bool:
        self.waited.append(timeout)
        return self.ready

    def state(self) -> list[State]:
        return self.states

    def __len__(self) -> int:
        return len(self.states)


class Service:
    """A service that does as it is told."""

    def __init__(self, task: Task | LightMemError, abort: LightMemError | None = None) -> None:
        self.task = task
        self.abort_error = abort
        self.aborted: list[Task] = []
        self.closed = 0
        self.regions: Any = None

    def create_regions(self, mode: str, hashes: list[int], regions: Any) -> Task:
        if isinstance(self.task, LightMemError):
            raise self.task
        self.regions = regions
        return self.task

    def abort(self, task: Task) -> None:
        self.aborted.append(task)
        if self.abort_error is not None:
            raise self.abort_error

    def match_prefix(self, hashes: list[int]) -> int:
        raise WorkerStartError("the service has no workers any more")

    def query(self, hashes: list[int]) -> list[bool]:
        raise ServiceClosedError("the service is closed")

    def close(self) -> None:
        self.closed += 1


DONE, MIXED = [State.Finished] * 3, [State.Finished, State.Aborted, State.Finished]


@pytest.fixture
def host_pool() -> Iterator[Any]:
    pool = MHATokenToKVPoolHost()
    yield pool
    pool.close()


@pytest.fixture
def over(host_pool: Any) -> Callable[..., PageStore]:
    """Makes a PageStore over such services."""

    def make(*services: Any, **timeouts: float) -> PageStore:
        chosen = {"load_timeout": 30.0, "store_timeout": 60.0, **timeouts}
        return PageStore(HostPool("kv", host_pool), Namespace({}), services, **chosen)

    return make


def test_each_page_has_its_own_answer(over: Callable[..., PageStore]) -> None:
    service = Service(Task(MIXED, ready=True))
    assert over(service).load(KEYS, INDICES) == [True, False, True]
    assert service.regions.shape == (3, 2, 2)
    assert not service.aborted


def test_a_page_of_two_buffers_needs_both(host_pool: Any) -> None:
    pool = StatePool()
    first, second = Service(Task(DONE, ready=True)), Service(Task(MIXED, ready=True))
    store = PageStore(
        HostPool("mamba", pool), Namespace({}), [first, second], load_timeout=1, store_timeout=1
    )
    assert store.load(KEYS, torch.arange(3)) == [True, False, True]
    assert [s.regions.shape for s in (first, second)] == [(3, 1, 2), (3, 1, 2)]
    assert np.array_equal(first.regions[:, 0, 0], [0, 2560, 5120])
    assert np.array_equal(second.regions[:, 0, 0], [0, 192, 384])
    store.close()
    pool.close()


def test_what_takes_too_long_is_given_up_and_what_was_done_counts(
    over: Callable[..., PageStore],
) -> None:
    task = Task(MIXED, ready=False)
    service = Service(task)
    assert over(service, load_timeout=0.25).load(KEYS, INDICES) == [True, False, True]
    assert service.aborted == [task]
    assert service.closed == 0
    assert 0 < task.waited[0] <= 0.25


def test_a_close_in_the_middle_of_a_close_of_the_same_thread_ends(
    over: Callable[..., PageStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a signal's handler makes it."""
    first, second = (Service(Task(DONE, ready=True)) for _ in range(2))
    store = over(first, second)
    with monkeypatch.context() as once:
        once.setattr(first, "close", lambda: (once.undo(), store.close()))
        store.close()
    assert first.closed == 1
    assert second.closed == 2
    assert store.load(KEYS, INDICES) == [False] * 3


def test_a_worker_that_does_not_let_go_ends_the_store(over: Callable[..., PageStore]) -> None:
    stuck = LockTimeoutError("a worker did not let go", what="task", timeout=10)
    service = Service(Task([State.Aborted] * 3, ready=False), abort=stuck)
    store = over(service, store_timeout=0.0)
    assert store.store(KEYS, INDICES) == [False] * 3
    assert service.closed == 1
    assert store.load(KEYS, INDICES) == [False] * 3
    assert store.match_prefix(KEYS) == 0
    assert not store.stored(KEYS).any()
    assert service.closed == 1
    with pytest.raises(ServiceClosedError):
        store.clear()


def test_a_call_returns_only_when_all_workers_are_gone(over: Callable[..., PageStore]) -> None:
    """Two threads find the same stopped worker: none hands its pages back before that is ended."""
    both, closing, proceed = threading.Barrier(2), threading.Event(), threading.Event()

    class Slow(Service):
        def abort(self, task: Task) -> None:
            both.wait(20)
            super().abort(task)

        def close(self) -> None:
            if closing.is_set():
                return  # as a service that another thread closes
            closing.set()
            assert proceed.wait(20)
            super().close()

    stuck = LockTimeoutError("a worker did not let go", what="task", timeout=10)
    service = Slow(Task([State.Aborted] * 3, ready=False), abort=stuck)
    store = over(service, load_timeout=0.0)
    closed_at_return: list[int] = []

    def load() -> None:
        store.load(KEYS, INDICES)
        closed_at_return.append(service.closed)

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert closing.wait(20)
    for thread in threads:
        thread.join(0.1)  # time to return too early
        assert thread.is_alive()
    proceed.set()
    for thread in threads:
        thread.join(20)
    assert closed_at_return == [1, 1]


REFUSALS: dict[str, Callable[[], LightMemError]] = {  # an error that was raised keeps its frames
    "full": lambda: TaskTableFullError("full", blocks=3, capacity=1, timeout=10),
    "closed": lambda: ServiceClosedError("the service is closed"),
    "no workers": lambda: WorkerStartError("the service has no workers any more"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_a_miss(over: Callable[..., PageStore], name: str) -> None:
    store = over(Service(REFUSALS[name]()))
    assert store.load(KEYS, INDICES) == [False] * 3
    assert store.store(KEYS, INDICES) == [False] * 3


def test_a_refusal_of_one_buffer_waits_for_the_others(host_pool: Any) -> None:
    pool = StatePool()
    task = Task(DONE, ready=False)
    first, second = Service(task), Service(ServiceClosedError("the service is closed"))
    store = PageStore(
        HostPool("mamba", pool), Namespace({}), [first, second], load_timeout=0, store_timeout=0
    )
    assert store.load(KEYS, torch.arange(3)) == [False] * 3
    assert first.aborted == [task]
    store.close()
    pool.close()


def test_look_ups_that_fail_find_nothing(over: Callable[..., PageStore]) -> None:
    store = over(Service(Task(DONE, ready=True)))
    assert store.match_prefix(KEYS) == 0
    assert store.stored(KEYS).tolist() == [False] * 3


@pytest.mark.parametrize("call", ["load", "match_prefix", "stored"])
def test_a_store_that_is_closed_during_a_call_has_no_page(call: str) -> None:
    """Closed between the two looks of the call: at its services, and at its pool."""

    class Closing(PageStore):
        armed = False

        def __getattribute__(self, name: str) -> Any:
            found = super().__getattribute__(name)
            if name in ("_pool", "_services") and self.armed:
                self.armed = False
                self.close()
            return found

    class Service:
        closed = False

        def close(self) -> None:
            self.closed = True

        def __getattr__(self, name: str) -> Any:
            raise ServiceClosedError("the service is closed")

    service: Any = Service()
    host_pool: Any = type("Pool", (), {"page_bytes": 64, "regions": lambda *_: [[]]})()
    store = Closing(host_pool, Namespace({}), [service], load_timeout=1, store_timeout=1)
    store.armed = True
    keys = ["a", "b"]
    answer = store.load(keys, torch.arange(2)) if call == "load" else getattr(store, call)(keys)
    assert service.closed
    assert not np.any(answer)
