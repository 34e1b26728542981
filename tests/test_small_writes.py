"""Writes of one short block: `create` makes them itself."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest

import light_mem
from light_mem import InvalidArgumentError, LocalCacheService, ServiceClosedError, State
from light_mem.engine import opening, small_writes
from light_mem.engine.base import BlockIO, Outcome
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.places import Regions
from light_mem.engine.shard_file import ShardFile
from light_mem.engine.sinks import MappedSink
from light_mem.index import retention
from tests.engine_helpers import Block, assert_consistent, let_go, open_local
from tests.engine_helpers import Rig as EngineRig
from tests.service_rig import WAIT, Rig, rig

PAGE = 4096
LIMIT = 4 * PAGE


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


@pytest.mark.parametrize("pages", [[3], [3, 4], [9, 2, 31, 16]])
def test_a_short_write_is_ready_when_create_returns(stopped: Rig, pages: list[int]) -> None:
    before = stopped.service.stats()
    task = create(stopped, 7, pages)
    assert task.ready()
    assert task.data_safe()
    assert task.state() == [State.Finished]
    assert task.get_page_already_list() == []
    assert pickle.loads(pickle.dumps(task)).state() == task.state()
    numbers = stopped.service.stats()
    change = {name: numbers[name] - before[name] for name in ("blocks_written", "write_tasks")}
    assert change == {"blocks_written": 1, "write_tasks": 1}
    assert numbers["bytes_written"] - before["bytes_written"] == len(pages) * PAGE
    assert numbers["write_latency"]["count"] - before["write_latency"]["count"] == 1
    assert numbers["write_ns"] > before["write_ns"]
    assert numbers["active_write_tasks"] == 0
    assert stopped.service.query(7)
    assert held(stopped, 7, pages)


def test_what_is_stored_already_is_not_written_again(stopped: Rig) -> None:
    stopped.fill(7, [3])
    assert stopped.service.create("write", [7], [3]).ready()
    before = stopped.service.stats()
    stopped.blank([4])
    task = stopped.service.create("write", [7], [4])
    assert task.state() == [State.Finished]
    assert task.get_page_already_list() == [4]
    numbers = stopped.service.stats()
    assert numbers["blocks_written"] == before["blocks_written"]
    assert numbers["present"] == before["present"] + 1
    assert held(stopped, 7, [5])


def test_a_full_store_gives_the_place_of_the_oldest_block(stopped: Rig) -> None:
    for key in range(64):
        assert create(stopped, key, [key % 32]).ready()
    assert stopped.service.query(0)  # used now
    for key in (64, 65):
        assert create(stopped, key, [key % 32]).ready()
    assert stopped.service.query(list(range(66))) == [True, False, False] + [True] * 63
    assert stopped.service.stats()["evictions"] == 2
    assert all(held(stopped, key, [1]) for key in (0, 3, 63, 64, 65))


@pytest.mark.parametrize("why", ["long", "several", "queued", "locked", "slow", "large shard"])
def test_what_create_should_not_wait_for_is_left_to_the_workers(
    stopped: Rig, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    others = []
    lock = filelock.FileLock(
        Path(stopped.service._engine.directory) / "shard-000.lock", thread_local=False
    )
    if why == "long":
        task = create(stopped, 7, [3, 4, 5, 6, 8])
    elif why == "several":
        stopped.fill(7, [3])
        stopped.fill(8, [4])
        task = stopped.service.create("write", [7, 8], [3, 4])
    elif why == "queued":
        others.append(create(stopped, 9, [10, 11, 12, 13, 14]))
        task = create(stopped, 7, [3])
    elif why == "locked":
        with lock:
            task = create(stopped, 7, [3])
            assert not task.ready()
    elif why == "slow":
        monkeypatch.setattr(small_writes, "SLOW_NS", 0)
        assert create(stopped, 6, [2]).ready()
        task = create(stopped, 7, [3])
    else:
        monkeypatch.setattr(small_writes, "MAX_SLOTS", 63)
        writes = small_writes.SmallWrites(
            stopped.service._engine, stopped.service._session.table, True
        )
        monkeypatch.setattr(stopped.service, "_small_writes", writes)
        task = create(stopped, 7, [3])
    assert not task.ready()
    go_on(stopped)
    assert all(t.wait(WAIT) for t in (task, *others))
    assert held(stopped, 7, [3, 4, 5, 6, 8] if why == "long" else [3])


@pytest.mark.parametrize(
    "options", [{"small_write_bytes": 0}, {"page_cache": "drop"}, {"durability": "flush"}]
)
def test_it_can_be_turned_off(tmp_path: Path, options: dict[str, Any]) -> None:
    with rig(tmp_path, page_bytes=PAGE, **{"small_write_bytes": LIMIT, **options}) as r:
        prepared(r)
        (worker,) = r.service.worker_pids
        os.kill(worker, signal.SIGSTOP)
        task = create(r, 1, [0])
        assert not task.ready()
        os.kill(worker, signal.SIGCONT)
        assert task.wait(WAIT)
        assert held(r, 1, [20])
    let_go(r)


def test_a_block_lives_as_long_as_the_service_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rig(tmp_path, page_bytes=PAGE, small_write_bytes=LIMIT, time_to_live=50.0) as r:
        prepared(r)
        assert create(r, 1, [0]).ready()
        assert r.service.query(1)
        later = retention.clock() + 100
        monkeypatch.setattr(retention, "clock", lambda: later)
        assert not r.service.query(1)
    let_go(r)


def test_before_run_and_through_a_client_the_workers_write(tmp_path: Path) -> None:
    with rig(tmp_path, page_bytes=PAGE, run=False) as r:
        prepared(r)
        task = create(r, 1, [0])
        assert not task.ready()
        r.service.run()
        assert task.wait(WAIT)
        client = r.service.client()
        (worker,) = r.service.worker_pids
        os.kill(worker, signal.SIGSTOP)
        r.fill(2, [4])
        task = client.create("write", [2], [4])  # it has no KV tensor
        assert not task.ready()
        os.kill(worker, signal.SIGCONT)
        assert task.wait(WAIT)
        client.close()
        assert held(r, 2, [20])
    let_go(r)


def test_the_environment_gives_the_limit_that_no_argument_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = light_mem.allocate_kvcache(8, PAGE)
    for wrong in (-1, 1.5, "much"):
        with pytest.raises(InvalidArgumentError, match="small_write_bytes"):
            LocalCacheService(tmp_path / "s", 1 << 20, 1, kv, 1, small_write_bytes=wrong)  # type: ignore[arg-type]
    monkeypatch.setenv("LIGHTMEM_SMALL_WRITE_BYTES", "much")
    with pytest.raises(InvalidArgumentError, match=r"LIGHTMEM_SMALL_WRITE_BYTES.*much"):
        LocalCacheService(tmp_path / "s", 1 << 20, 1, kv, 1)
    monkeypatch.setenv("LIGHTMEM_SMALL_WRITE_BYTES", str(PAGE))
    with rig(tmp_path, page_bytes=PAGE) as r:
        prepared(r)
        (worker,) = r.service.worker_pids
        os.kill(worker, signal.SIGSTOP)
        assert create(r, 1, [20]).ready()
        assert not (two := create(r, 2, [21, 22])).ready()
        os.kill(worker, signal.SIGCONT)
        assert two.wait(WAIT)
    let_go(r)


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


def test_to_write_what_is_stored_counts_as_use(tmp_path: Path) -> None:
    with rig(tmp_path, page_bytes=PAGE, slots=64, small_write_bytes=LIMIT) as r:
        prepared(r)
        for key in range(64):
            assert create(r, key, [key % 32]).ready()
        assert create(r, 0, [0]).get_page_already_list() == []  # regions have no pages
        assert create(r, 64, [1]).ready()
        assert r.service.query([0, 1, 2]) == [True, False, True]
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


def test_without_descriptors_to_spare_the_shards_are_not_opened_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rig(tmp_path, page_bytes=PAGE, small_write_bytes=LIMIT, run=False) as r:
        needed = opening.descriptors_for(1)
        for soft, opened in (2 * needed - 1, False), (2 * needed, True):
            monkeypatch.setattr(opening.resource, "getrlimit", lambda _, soft=soft: (soft, soft))
            r.service._small_writes.prepare()
            assert r.service._engine.is_at_hand(0) == opened
    let_go(r)


# --- the engine's part ----------------------------------------------------------------------------


def now(r: EngineRig, block: Block) -> Outcome | None:
    engine = r.engine
    assert isinstance(engine, LocalStorageEngine)
    return engine.write_now(r._batch([block], fill=True)[0])


def test_a_shard_that_is_not_open_yet_is_left_alone(tmp_path: Path) -> None:
    engine = open_local(tmp_path / "s", 8)
    r = EngineRig(engine)
    engine.close()
    engine = LocalStorageEngine(tmp_path / "s", kind="server")
    r = EngineRig(engine)
    assert now(r, Block(1)) is None
    engine.prepare()
    assert now(r, Block(1)) is Outcome.STORED
    assert now(r, Block(1)) is Outcome.PRESENT
    assert r.read(Block(1)) == [Outcome.LOADED]
    engine.close()


def test_no_store_goes_to_a_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could be SIGBUS, which ends the server."""
    r = EngineRig(open_local(tmp_path / "s", 8, block_pages=8))
    stored: list[int] = []
    storing = MappedSink.storing

    def note(sink: MappedSink, at: int, nbytes: int) -> Any:
        stored.append(nbytes)
        return storing(sink, at, nbytes)

    def fail(*_: object) -> None:
        pytest.fail("a store to a mapping")

    with monkeypatch.context() as patch:
        patch.setattr(MappedSink, "storing", note)
        while not stored:  # until these slots go through the mapping
            r.write(Block(0, 8))
            r.delete(Block(0))
    monkeypatch.setattr(MappedSink, "storing", fail)
    monkeypatch.setattr(MappedSink, "storing_rows", fail)
    assert now(r, Block(0, 8)) is Outcome.STORED
    r.delete(Block(0))
    assert now(r, Block(1, 3)) is Outcome.STORED
    assert now(r, Block(2)) is Outcome.STORED
    assert r.read(Block(1, 3), Block(2)) == [Outcome.LOADED] * 2
    r.engine.close()


def test_one_of_another_length_is_left_to_the_workers(tmp_path: Path) -> None:
    r = EngineRig(open_local(tmp_path / "s", 8, block_pages=2))
    r.write(Block(1, 2))
    assert now(r, Block(1, 1)) is None
    assert r.read(Block(1, 2)) == [Outcome.LOADED]
    r.engine.close()


def test_where_nothing_may_go_nothing_is_left_behind(tmp_path: Path) -> None:
    engine = open_local(tmp_path / "s", 4)
    r = EngineRig(engine)
    r.write(*[Block(n) for n in range(4)])
    with engine.change(0) as (index, file):  # as if a worker were filling three of the four slots
        for slot in (0, 1, 2):
            index.remove(slot)
        file.clear_records([0, 1, 2])
        taken = index.allocate(3, [])
        assert taken is not None
        index.mark(taken.runs, owner=9)
    assert now(r, Block(7, 2)) is None  # it has evicted the fourth for that
    records = engine.file(0).records
    assert not (records["tag"] == 2).any()
    assert engine.stats()["blocks"] == 0
    assert now(r, Block(8)) is Outcome.STORED
    assert r.read(Block(8)) == [Outcome.LOADED]
    engine.close()


def test_expired_blocks_are_taken_out_by_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_local(tmp_path / "s", 4)
    r = EngineRig(engine)
    engine.prepare()
    engine.time_to_live = 10.0
    assert [now(r, Block(n)) for n in range(3)] == [Outcome.STORED] * 3
    # The record says it as well: an index made anew lets it expire too.
    assert (engine.file(0).records["keep"][:3] == engine._index.entries["keep"][:3]).all()
    assert engine.file(0).records["keep"][:3].all()
    later = retention.clock() + 100
    monkeypatch.setattr(retention, "clock", lambda: later)
    assert now(r, Block(3)) is Outcome.STORED  # there is room
    assert now(r, Block(4)) is None
    assert now(r, Block(1)) is None
    assert r.write(*[Block(n) for n in range(5, 9)])[3][-1] is Outcome.STORED
    assert now(r, Block(9)) is Outcome.STORED
    engine.close()


def test_a_shard_that_is_to_be_put_in_order_is_left_to_the_workers(tmp_path: Path) -> None:
    r = EngineRig(open_local(tmp_path / "s", 8))
    engine = r.engine
    assert isinstance(engine, LocalStorageEngine)
    r.write(Block(1))
    engine._index.control["dirty"][0] = 1  # its holder has died
    assert now(r, Block(2)) is None
    r.write(Block(3))
    assert now(r, Block(2)) is Outcome.STORED
    engine.close()


def test_what_a_failed_batch_left_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object) -> int:
        raise Killed

    engine = open_local(tmp_path / "s", 8)
    r = EngineRig(engine)
    r.write(Block(1))
    with monkeypatch.context() as patch:
        patch.setattr(ShardFile, "plan", die)
        with pytest.raises(Killed):
            r.write(Block(2), Block(3))
    assert engine.stats()["used_slots"] == 3
    assert now(r, Block(4)) is Outcome.STORED
    assert engine.stats()["used_slots"] == 2
    assert not engine._owners.records["intents"][engine._owner.number].any()
    assert r.read(Block(1), Block(4)) == [Outcome.LOADED] * 2
    engine.close()


def test_a_block_of_regions_in_several_runs_comes_back(tmp_path: Path) -> None:
    engine = open_local(tmp_path / "s", 16, block_pages=16)
    r = EngineRig(engine)
    r.write(*[Block(n) for n in range(16)])
    r.delete(*[Block(n) for n in range(0, 16, 2)])
    memory = np.random.default_rng(3).integers(0, 256, 1 << 16, np.uint8)
    page = engine.geometry.page_bytes
    wanted = [(7, page + 3), (5 * page, 2 * page)]
    block = BlockIO(99, 0, Regions(memory, wanted))
    assert engine.write_now(block) is Outcome.STORED
    where = engine.lookup.locate(engine.lookup.find_one(99, 0), 99, 0)
    assert where is not None
    assert len(where.runs) > 1
    expected = [memory[a : a + n].copy() for a, n in wanted]
    memory[:] = 0
    outcomes: list[Outcome] = []
    engine.read([block], lambda _, outcome: outcomes.append(outcome))
    assert outcomes == [Outcome.LOADED]
    assert all(
        np.array_equal(memory[a : a + n], e) for (a, n), e in zip(wanted, expected, strict=True)
    )
    engine.close()
