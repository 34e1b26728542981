"""A store that is moved away while it is in use, and another one made at its path."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from pathlib import Path

import pytest

from light_mem import State, StoreFormatError, WorkerStartError
from light_mem.engine.base import Outcome
from light_mem.engine.shard_header import data_path, slots_path
from tests.conftest import wait_until
from tests.engine_helpers import Block, Rig, let_go, open_local
from tests.service_rig import WAIT, rig

SHARDS, SLOTS = 2, 16
OURS = [Block(key) for key in range(8)]
THEIRS = [Block(key) for key in range(100, 108)]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def stored_there(store: Path) -> Rig:
    """Another store, with blocks."""
    other = Rig(open_local(store, SLOTS, shards=SHARDS))
    other.write(*THEIRS)
    return other


def stored_and_opened_anew(store: Path) -> Rig:
    """A store with blocks, opened by a process that has used no shard of it yet."""
    first = Rig(open_local(store, SLOTS, shards=SHARDS))
    first.write(*OURS)
    first.engine.close()
    let_go(first)
    return Rig(open_local(store, SLOTS, shards=SHARDS))


def test_no_shard_of_another_store_is_opened(store: Path) -> None:
    ours = stored_and_opened_anew(store)
    store.rename(store.with_name("moved"))
    theirs = stored_there(store)
    assert ours.find(*OURS) == [True] * len(OURS)
    outcomes = ours.read(*OURS)
    assert Outcome.LOADED not in outcomes
    with pytest.raises(StoreFormatError, match="belongs to another store") as caught:
        ours.delete(*OURS)
    assert caught.value.expected == ours.engine.geometry.store_id  # type: ignore[attr-defined]
    ours.write(*map(Block, range(200, 208)))
    assert theirs.read(*THEIRS) == [Outcome.LOADED] * len(THEIRS)
    assert theirs.engine.stats()["blocks"] == len(THEIRS)
    assert theirs.engine.stats()["damaged"] == 0
    for each in (ours, theirs):
        each.engine.close()


def test_nor_of_a_copy_in_its_place(store: Path) -> None:
    """A copy has the same number and the same headers."""
    ours = stored_and_opened_anew(store)
    store.rename(store.with_name("moved"))
    shutil.copytree(store.with_name("moved"), store)
    for shard in range(SHARDS):
        with pytest.raises(StoreFormatError, match="is another store by now"):
            ours.engine.file(shard)
    shutil.rmtree(store)
    with pytest.raises(FileNotFoundError):
        ours.engine.file(0)
    store.with_name("moved").rename(store)  # back again
    assert ours.read(*OURS) == [Outcome.LOADED] * len(OURS)
    ours.engine.close()


@pytest.mark.parametrize("path_of", [data_path, slots_path])
def test_a_damaged_header_is_nobody_elses(store: Path, path_of) -> None:  # type: ignore[no-untyped-def]
    ours = stored_and_opened_anew(store)
    for shard in range(SHARDS):
        with path_of(store, shard).open("r+b") as file:
            file.write(b"x")
    assert ours.read(*OURS) == [Outcome.LOADED] * len(OURS)
    ours.engine.close()


@pytest.mark.parametrize("page_bytes", [4096, 8192])
def test_no_worker_joins_another_store(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, page_bytes: int
) -> None:
    store = tmp_path / "store"
    with rig(tmp_path, workers=1, shards=SHARDS, small_write_bytes=0, small_read_bytes=0) as r:
        r.write(["a"], [0])
        store.rename(tmp_path / "moved")
        other = open_local(store, SLOTS, page_bytes=page_bytes, shards=SHARDS)
        with caplog.at_level(logging.ERROR, "light_mem"):
            os.kill(r.service.worker_pids[0], signal.SIGSTOP)
            task = r.service.create("w", ["b"], [1])
            os.kill(r.service.worker_pids[0], signal.SIGKILL)
            assert task.wait(WAIT)
            wait_until(lambda: r.service._pool.failure)
        assert task.state() == [State.Aborted]
        with pytest.raises(WorkerStartError, match="is another store by now"):
            r.service.create("r", ["a"], [0])
        assert sum("the service stops" in line for line in caplog.messages) == 1
        assert other.stats()["inserts"] == 0
        assert [o.kind for o in other.owners()] == []
        other.close()


def test_no_client_joins_another_store(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        client = r.service.client()
        (tmp_path / "store").rename(tmp_path / "moved")
        open_local(tmp_path / "store", SLOTS, page_bytes=4096).close()
        with pytest.raises(StoreFormatError, match="is another store by now"):
            client.query("a")
        shutil.rmtree(tmp_path / "store")
        (tmp_path / "moved").rename(tmp_path / "store")
        r.write(["a"], [0])
        assert client.query("a")
        client.close()
