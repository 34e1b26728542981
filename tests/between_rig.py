"""A service whose only worker is the test's own thread, and reads that come in the middle of its
writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from light_mem import CacheTask, State
from light_mem.engine import page_cache
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.read_ahead import ReadAhead
from light_mem.engine.worker import Worker
from tests.engine_helpers import let_go
from tests.service_rig import Rig, rig

MIB = 1 << 20
OLD = ["old 0", "old 1"]
OLD_PAGES = [30, 31]
NEW = [f"new {n}" for n in range(16)]  # four looks, one each 4 MiB
NEW_PAGES = list(range(16))
NEW_BYTES = len(NEW) * MIB


@dataclass
class Between:
    """A service whose only worker is this very thread."""

    rig: Rig
    engine: LocalStorageEngine
    worker: Worker

    def do_next(self) -> None:
        self.worker.do(self.worker._queue.claim(1))

    def read_old(self) -> CacheTask:
        self.rig.blank(OLD_PAGES)
        return self.rig.service.create("read", OLD, OLD_PAGES)

    def write_new(self) -> CacheTask:
        for key, page in zip(NEW, NEW_PAGES, strict=True):
            self.rig.fill(key, [page])
        return self.rig.service.create("write", NEW, NEW_PAGES)

    def has_old(self) -> bool:
        return all(self.rig.holds(*one) for one in zip(OLD, ([p] for p in OLD_PAGES), strict=True))

    def is_stored(self, task: CacheTask) -> bool:
        """Whether all of NEW is Finished, and there."""
        if task.state() != [State.Finished] * len(NEW):
            return False
        self.rig.blank(NEW_PAGES)
        back = self.rig.service.create("read", NEW, NEW_PAGES)
        while not back.ready():
            self.do_next()
        return all(self.rig.holds(key, [page]) for key, page in zip(NEW, NEW_PAGES, strict=True))


@pytest.fixture(params=[1])
def between(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Between]:
    """Parameter: how many shards the store has."""
    shards: int = request.param
    with rig(tmp_path, pages=32, page_bytes=MIB, slots=64 * shards, shards=shards, run=False) as r:
        engine = LocalStorageEngine(tmp_path / "store", kind="worker")
        session = r.service._session
        one = Between(r, engine, Worker(1, session.table, session.queue, r.kv.numpy(), engine))
        for key, page in zip(OLD, OLD_PAGES, strict=True):
            r.fill(key, [page])
        task = r.service.create("write", OLD, OLD_PAGES)
        one.do_next()
        assert task.ready()
        yield one
        engine.close()
        let_go(engine)
        vars(one).clear()


def at_each_look(
    between: Between, monkeypatch: pytest.MonkeyPatch, before: Callable[[], object]
) -> None:
    """Call `before` whenever the worker looks for reads in the middle of a batch of writes."""
    queue = between.worker._queue
    look = queue.claim_between

    def claim_between(worker: int, timeout: float | None = None) -> list[int]:
        before()
        return look(worker, timeout)

    monkeypatch.setattr(queue, "claim_between", claim_between)


def wait_for_the_device(patch: pytest.MonkeyPatch, has_landed: Callable[[], bool]) -> None:
    """All blocks that are read wait for a device, which has given them when `has_landed` says."""
    patch.setattr(page_cache, "hold_each", lambda addresses: [False] * len(addresses))
    patch.setattr(ReadAhead, "has_landed", property(lambda _: has_landed()))
