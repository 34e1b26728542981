"""Abort: when it returns, every block is final and no worker touches the task's pages."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from light_mem import InvalidArgumentError, LockTimeoutError, State
from light_mem.engine.queue import QUEUE_BYTE
from light_mem.index.locks import RangeLock
from tests.conftest import wait_until
from tests.service_rig import UNTOUCHED, WAIT, Rig, rig

FINAL = {State.Finished, State.Aborted}
PAGE = 64 << 10
BLOCK = 64  # pages: 4 MiB, several pieces of a copy


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    directory = tmp_path_factory.mktemp("abort")
    with rig(directory, pages=8 * BLOCK, page_bytes=PAGE, slots=16 * BLOCK) as r:
        r.service.clear()
        yield r


def blocks_of(first: int, count: int) -> tuple[list[str], list[int]]:
    """Names of `count` full blocks and the pages from block `first` on."""
    return [f"block {n}" for n in range(count)], list(range(first * BLOCK, (first + count) * BLOCK))


def test_before_the_service_runs_all_blocks_are_aborted_at_once(tmp_path: Path) -> None:
    with rig(tmp_path, run=False) as r:
        r.write_later = r.service.create("w", ["kept"], [5])  # type: ignore[attr-defined]
        task = r.service.create("w", ["a", "b"], [0, 1])
        r.service.abort(task)
        assert task.state() == [State.Aborted] * 2
        assert task.ready()
        assert task.data_safe()
        assert r.service.active_create_count("write") == 1
        r.service.run()
        assert r.write_later.wait(WAIT)  # type: ignore[attr-defined]
        assert r.service.query(["a", "b", "kept"]) == [False, False, True]


def test_an_abort_without_patience_waits_for_who_has_the_queue_in_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters give up what takes too long so, once: a worker may be claiming at that moment."""
    monkeypatch.setattr("light_mem.task.SHORT_SECONDS", WAIT)  # however busy this machine is
    with rig(tmp_path, run=False) as r:
        task = r.service.create("w", ["a", "b"], [0, 1])
        lock = RangeLock(r.service._session.table.lock_path())
        lock.lock(QUEUE_BYTE)
        claiming = threading.Timer(0.02, lock.close)
        claiming.start()
        r.service.abort(task, timeout=0)
        claiming.join()
        assert task.state() == [State.Aborted] * 2


@pytest.mark.parametrize("timeout", [threading.TIMEOUT_MAX * 2, 1e300])
def test_an_abort_may_have_any_time(tmp_path: Path, timeout: float) -> None:
    with rig(tmp_path, run=False) as r:
        task = r.service.create("w", ["a"], [0])
        r.service.abort(task, timeout)
        assert task.state() == [State.Aborted]


def test_after_the_end_nothing_changes(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        task = r.write(["a"], [0])
        missing = r.read(["no"], [1])
        for done in (task, missing, task):
            before = done.state()
            r.service.abort(done)
            assert done.state() == before
        assert r.service.query("a") is True


def test_an_aborted_write_is_stored_whole_or_not_at_all(running: Rig) -> None:
    r = running
    outcomes = set()
    for n in range(24):
        r.service.clear()
        keys, pages = blocks_of(0, 4)
        for at in range(4):
            r.kv[pages[at * BLOCK]] = 100 + at  # one page that tells the block
        task = r.service.create("w", keys, pages)
        wait_until(lambda: State.Initial not in task.state() or n % 2)  # noqa: B023
        r.service.abort(task)
        states = task.state()
        assert set(states) <= FINAL
        r.kv[pages] = UNTOUCHED  # ours again: none of this may be stored
        outcomes.update(states)
        assert r.service.query(keys) == [state is State.Finished for state in states]
        assert r.service.stats()["used_slots"] == BLOCK * states.count(State.Finished)
        for at, key in enumerate(keys):
            if states[at] is State.Finished:
                assert r.service.create("r", [key], pages[:BLOCK]).wait(WAIT)
                assert bool((r.kv[pages[0]] == 100 + at).all())
    assert State.Aborted in outcomes


def test_no_worker_touches_the_pages_of_an_aborted_read(running: Rig) -> None:
    r = running
    keys, pages = blocks_of(0, 4)
    r.kv[pages] = 1
    assert r.service.create("w", keys, pages).wait(WAIT)
    target = [page + 4 * BLOCK for page in pages]
    outcomes = set()
    for n in range(30):
        task = r.service.create("r", keys, target)
        if n % 3:
            wait_until(lambda: task.state()[0] is not State.Initial)  # noqa: B023
        r.service.abort(task)
        r.kv[target] = UNTOUCHED
        states = task.state()
        assert set(states) <= FINAL
        outcomes.update(states)
        # The next task is behind whatever the worker still had in hand.
        assert r.service.create("r", keys[:1], pages[:BLOCK]).wait(WAIT)
        assert bool((r.kv[target] == UNTOUCHED).all())
        assert task.state() == states
    assert State.Aborted in outcomes


def test_threads_that_abort_one_task_all_see_it_final(running: Rig) -> None:
    r = running
    keys, pages = blocks_of(0, 8)
    for _ in range(10):
        r.service.clear()
        task = r.service.create("w", keys, pages)
        seen: list[bool] = []

        def abort() -> None:
            r.service.abort(task)  # noqa: B023
            seen.append(task.ready())  # noqa: B023

        threads = [threading.Thread(target=abort) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == [True] * 4


def test_a_stopped_worker_makes_abort_say_that_the_pages_are_not_safe(running: Rig) -> None:
    r = running
    r.service.clear()
    (worker,) = r.service.worker_pids
    keys, pages = blocks_of(0, 8)
    for _ in range(50):  # until it is stopped in the middle
        r.service.clear()
        task = r.service.create("w", keys, pages)
        wait_until(lambda: task.state()[0] is not State.Initial)  # noqa: B023
        os.kill(worker, signal.SIGSTOP)
        try:
            if State.Working not in task.state():
                continue
            with pytest.raises(LockTimeoutError, match="did not let go") as caught:
                r.service.abort(task, timeout=0.2)
            assert caught.value.values == {"what": "task", "timeout": 0.2}
            assert not task.ready()
            break
        finally:
            os.kill(worker, signal.SIGCONT)
            assert task.wait(WAIT)
    else:
        pytest.fail("the worker was never caught at work")
    assert State.Aborted in task.state()


def test_a_task_of_another_service_is_refused_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with rig(tmp_path / "a", run=False) as one, rig(tmp_path / "b", run=False) as other:
        mine = one.service.create("w", ["a"], [0])
        others = other.service.create("w", ["a"], [0])
        with pytest.raises(InvalidArgumentError, match="another service"):
            one.service.abort(others)
        assert mine.state() == others.state() == [State.Initial]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_task_that_is_queued_after_a_long_one_was_aborted_is_done(
    tmp_path: Path, workers: int
) -> None:
    with rig(tmp_path, pages=1004, page_bytes=4096, slots=8192, shards=4, workers=workers) as r:
        for turn in range(8):
            long = r.service.create("w", [f"{turn} {n}" for n in range(1000)], range(1000))
            r.service.abort(long)
            short = r.service.create(
                "w", [f"{turn} short {n}" for n in range(4)], range(1000, 1004)
            )
            assert short.wait(WAIT)
            assert short.state() == [State.Finished] * 4
