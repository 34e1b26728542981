"""Writes that `create` makes itself while devices fail, threads write, signals come in between."""

from __future__ import annotations

import errno
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from light_mem import ServiceClosedError, State
from light_mem.engine import small_writes
from light_mem.engine.base import BlockIO
from tests.engine_helpers import let_go
from tests.service_rig import WAIT, Rig, rig
from tests.small_rig import LIMIT, PAGE, at_any_speed, create, go_on, held, prepared, stopped

__all__ = ["at_any_speed", "stopped"]  # fixtures


def test_a_device_that_fails_costs_nothing_but_a_worker_s_try(
    stopped: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "a bad disk")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fail)
        task = create(stopped, 7, [3])
    assert not task.ready()
    engine = stopped.service._engine
    assert engine.stats()["used_slots"] == 0
    assert not engine._index.control["dirty"].any()
    assert not engine._owners.records["intents"][engine._owner.number].any()
    go_on(stopped)
    assert task.wait(WAIT)
    assert held(stopped, 7, [3])


def test_a_write_in_whose_middle_its_thread_closes_the_service_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the handler of a signal would. The descriptor that is being written to must not become
    another file's meanwhile."""
    outcome: list[bool] = []
    with rig(tmp_path, page_bytes=PAGE, small_write_bytes=LIMIT) as r:
        prepared(r)
        create(r, 1, [0])
        before = os.open(os.devnull, os.O_RDONLY)  # what closing frees first is known
        pwritev = os.pwritev
        opened: list[int] = []

        def closing(descriptor: int, *arguments: object) -> int:
            r.service.close()
            path = tmp_path / "somebody else's"
            opened.extend(os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(40))
            return pwritev(descriptor, *arguments)  # type: ignore[arg-type]

        def write() -> None:
            try:
                outcome.append(create(r, 2, [1]).state() == [State.Finished])
            except ServiceClosedError:
                outcome.append(False)

        monkeypatch.setattr(os, "pwritev", closing)
        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        thread.join(WAIT)
        monkeypatch.undo()
        assert not thread.is_alive()
        assert outcome
        assert (tmp_path / "somebody else's").stat().st_size == 0
        for descriptor in (*opened, before):
            os.close(descriptor)
    with rig(tmp_path, page_bytes=PAGE, small_write_bytes=LIMIT) as again:
        assert held(again, 1, [5])
        assert again.service.query(2) == outcome[0]
        assert held(again, 2, [5]) == outcome[0]
        assert again.service.check().clean
    let_go(again)


def test_threads_that_write_at_once_and_by_workers_store_every_byte(tmp_path: Path) -> None:
    writers, each = 4, 120
    with rig(
        tmp_path, pages=64, page_bytes=PAGE, slots=1024, workers=2, small_write_bytes=LIMIT
    ) as r:
        prepared(r)
        wrong: list[str] = []

        def write(mine: int) -> None:
            page = 8 * mine
            for n in range(each):
                key = mine * each + n
                count = 1 if n % 3 else 3  # the latter by the workers: more than one block
                keys = [key + 10_000 * k for k in range(count)]
                for k, name in enumerate(keys):
                    r.fill(name, [page + k])
                task = r.service.create("write", keys, list(range(page, page + count)))
                if not task.wait(WAIT) or task.state() != [State.Finished] * count:
                    wrong.append(f"{keys}: {task.state()}")

        threads = [threading.Thread(target=write, args=(n,)) for n in range(writers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        for mine in range(writers):
            for n in range(each):
                key = mine * each + n
                for k in range(1 if n % 3 else 3):
                    assert held(r, key + 10_000 * k, [40])
        assert r.service.check().clean
    let_go(r)


def test_a_write_that_failed_slowly_is_followed_by_a_pause(
    stopped: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def fail(*_: object) -> int:
        calls.append(1)
        raise OSError(errno.EIO, "a bad disk")

    monkeypatch.setattr(small_writes, "SLOW_NS", 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fail)
        first = create(stopped, 7, [3])
        os.kill(stopped.service.worker_pids[0], signal.SIGCONT)
        assert first.wait(WAIT)
        assert len(calls) == 1
        assert (
            stopped.service._small_writes.write(
                BlockIO(9, 0, first._layout.place_of(0, stopped.service._memory))
            )
            is None
        )
        assert len(calls) == 1


def test_a_write_in_the_middle_of_another_one_of_its_thread_is_left_to_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a signal's handler may do it: the two would share the piece of scratch memory."""
    with rig(tmp_path, page_bytes=PAGE, shards=4, small_write_bytes=LIMIT, pages=64) as r:
        prepared(r)
        pwritev, inner = os.pwritev, []

        def nesting(*arguments: Any) -> int:
            monkeypatch.setattr(os, "pwritev", pwritev)
            inner.append(r.service.create("write", [100 + len(inner)], [40]))
            return pwritev(*arguments)

        r.fill(100, [40])
        for key in range(8):
            r.fill(key, [key])
            monkeypatch.setattr(os, "pwritev", nesting)
            assert r.service.create("write", [key], [key]).ready()
            assert inner[-1].wait(WAIT)
            assert inner[-1].state() == [State.Finished]
            r.fill(101 + key, [40])
        for key in (*range(8), *range(100, 108)):
            assert held(r, key, [50]), key
        assert r.service.stats()["damaged"] == 0
    let_go(r)
