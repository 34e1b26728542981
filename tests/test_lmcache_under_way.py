"""LMCache's jobs under way: what of a store is chosen, who has taken too long, what is spoiled."""

from __future__ import annotations

import pytest

from light_mem.integrations.lmcache import under_way
from light_mem.integrations.lmcache.jobs import Job
from light_mem.integrations.lmcache.under_way import UnderWay


def job_of(load: bool, *sizes: int | None, number: int = 0) -> Job:
    regions = [None if size is None else (0, size) for size in sizes]
    count = len(sizes)
    return Job(number, load, [""] * count, [True] * count, list(range(count)), regions)


def queued(jobs: UnderWay, job: Job) -> Job:
    job.chosen = list(range(len(job.regions)))
    assert jobs.begin(job, lambda _: None)
    return job


def test_what_has_no_room_is_dropped_from_the_end() -> None:
    jobs = UnderWay(10, {True: 60, False: 60})
    store = job_of(False, 4, None, 8, 1)
    assert jobs.choose(store) == 2  # the small one too: it lies behind
    assert (store.chosen, store.nbytes, jobs.queued_bytes) == ([0], 4, 4)
    second = job_of(False, 6, 1)
    assert jobs.choose(second) == 1
    assert jobs.queued_bytes == 10


def test_who_was_given_up_is_waited_for_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(under_way.time, "monotonic", lambda: now)
    jobs = UnderWay(100, {True: 5, False: 60})
    assert jobs.patience() is None
    load, store = job_of(True, 1, number=1), job_of(False, 1, number=2)
    for job in (load, store):
        queued(jobs, job).submitted = now
    assert jobs.patience() == 5
    assert jobs.give_up() == []
    now += 6
    assert jobs.patience() == 0
    assert jobs.give_up() == [load]
    assert jobs.give_up() == []
    assert jobs.patience() == 54
    now += 60
    assert jobs.give_up() == [store]
    assert jobs.patience() is None


def test_every_load_is_told_what_is_spoiled_and_no_store() -> None:
    jobs = UnderWay(100, {True: 60, False: 60})
    loads = [queued(jobs, job_of(True, 1, number=n)) for n in range(3)]
    store = queued(jobs, job_of(False, 1, number=3))
    jobs.spoil([7, 8])
    assert [load.spoiled for load in loads] == [{7, 8}] * 3
    assert not store.spoiled
    jobs.end(loads[0])
    jobs.spoil([9])
    assert loads[0].spoiled == {7, 8}


def test_after_closing_nothing_is_queued() -> None:
    jobs = UnderWay(100, {True: 60, False: 60})
    jobs.close()
    job = job_of(True, 1)
    job.chosen = [0]
    assert not jobs.begin(job, lambda _: pytest.fail("queued"))
    assert not jobs.wait_idle(0.0)  # until it is handed back
    jobs.end(job)
    assert jobs.wait_idle(0.0)
