"""A service whose workers are stopped, for the reads and writes that `create` makes itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import light_mem
from light_mem import State
from light_mem.engine import small_writes
from tests.engine_helpers import assert_consistent, let_go
from tests.service_rig import WAIT, Rig, rig

PAGE = 4096
LIMIT = 4 * PAGE


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[Rig]:
    """A service with blocks 0 to 15 stored, whose only worker is then stopped: it reads nothing."""
    with rig(tmp_path, page_bytes=PAGE, small_read_bytes=LIMIT) as r:
        r.write(range(16), range(16))
        (worker,) = r.service.worker_pids
        os.kill(worker, signal.SIGSTOP)
        yield r
        with suppress(ProcessLookupError):  # the test has ended it
            os.kill(worker, signal.SIGCONT)
    let_go(r)


@pytest.fixture(autouse=True)
def at_any_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loaded machine is no reason to pause."""
    monkeypatch.setattr(small_writes, "SLOW_NS", 60_000_000_000)


def prepared(r: Rig) -> Rig:
    """Once the shards are open, which a thread sees to."""
    r.service._engine.prepare()
    return r


@pytest.fixture
def stopped(tmp_path: Path) -> Iterator[Rig]:
    """A service whose only worker is stopped: it writes nothing."""
    options = {"small_write_bytes": LIMIT, "small_read_bytes": LIMIT}
    with rig(tmp_path, page_bytes=PAGE, slots=64, **options) as r:
        prepared(r)
        (worker,) = r.service.worker_pids
        os.kill(worker, signal.SIGSTOP)
        yield r
        with suppress(ProcessLookupError, IndexError):  # the test has ended it
            go_on(r)
        engine = r.service._engine
        if not r.service._closed:
            assert r.service.check().clean
            assert_consistent(engine._index)
    let_go(r)


def go_on(r: Rig) -> None:
    os.kill(r.service.worker_pids[0], signal.SIGCONT)


def data_file(r: Rig) -> Path:
    return Path(r.service._engine.directory) / "shard-000.data"


def create(r: Rig, key: int, pages: list[int]) -> light_mem.CacheTask:
    """Create a write of one block that fills these pages."""
    r.fill(key, pages)
    regions = [[(page * PAGE, PAGE) for page in pages]]
    return r.service.create_regions("write", [key], regions)


def held(r: Rig, key: int, pages: list[int]) -> bool:
    """Whether the block is stored with its bytes."""
    r.blank(pages)
    regions = [[(page * PAGE, PAGE) for page in pages]]
    task = r.service.create_regions("read", [key], regions)
    return task.wait(WAIT) and task.state() == [State.Finished] and r.holds(key, pages)
