"""Bytes that a device does not give any more: the block that has them is dropped, and no process
dies of it but a worker that meets them through a mapping, once."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from light_mem import CacheTask, State, maintenance
from light_mem.engine import mapped_writes, page_cache, slot_calls
from light_mem.engine.base import Outcome
from light_mem.engine.reading import Reader
from light_mem.index import keys as keymath
from tests.begun import Begun
from tests.between_rig import NEW, OLD, Between, between
from tests.children import child, line
from tests.engine_helpers import COPIED_AND_STORED, Block, Rig, open_local
from tests.service_rig import rig

__all__ = ["between"]  # a fixture

PAGE = 4096


def losing(lost: Callable[[int], bool], error: int = errno.EIO) -> Callable[[int, int, int], bytes]:
    """`os.pread` of a file whose bytes at some places the device has lost."""
    read = os.pread

    def pread(descriptor: int, nbytes: int, at: int) -> bytes:
        if lost(at):
            raise OSError(error, os.strerror(error))
        return read(descriptor, nbytes, at)

    return pread


# --- views ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [errno.EIO, errno.ENODATA, errno.EILSEQ, errno.ENOMEM])
def test_a_view_of_a_block_that_the_device_has_lost_is_a_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    with rig(tmp_path) as r:
        r.write(["a", "b"], [0, 1])
        with monkeypatch.context() as patch:
            patch.setattr(slot_calls.os, "pread", losing(lambda _: True, error))
            if error == errno.ENOMEM:
                with pytest.raises(OSError, match=os.strerror(error)):
                    r.service.view("a")
            else:
                assert r.service.view("a") is None
        gone = error != errno.ENOMEM
        assert r.service.query(["a", "b"]) == [not gone, True]
        assert r.service._engine.stats()["damaged"] == gone
        assert r.service._engine.leases.open == 0
        if gone:
            r.write(["a"], [0])


def test_the_copy_of_a_block_in_several_runs_is_made_by_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rig(tmp_path, slots=66) as r:  # a full block has 64 pages
        for n in range(66):
            r.write([n], [n % 32])
        r.service.delete(range(0, 66, 2))
        pages = list(range(3))
        r.fill("long", pages)
        regions = [[(0, 3 * PAGE)]]
        assert r.service.create_regions("write", ["long"], regions).wait(20)
        view = r.service.view("long")
        assert view is not None
        assert view.copied
        assert (view.tensor == r.kv[:3]).all()
        view.close()
        reads = iter([False, False, False, True])  # to verify it, then to copy it
        monkeypatch.setattr(slot_calls.os, "pread", losing(lambda _: next(reads)))
        assert r.service.view("long") is None
        monkeypatch.undo()
        assert r.service._engine.leases.open == 0
        del view


# --- what a dead worker had in hand ---------------------------------------------------------------

CUT_AND_READ = """
from tests.engine_helpers import Block, Rig, open_local
from light_mem.engine.base import Outcome
from tests.begun import Begun
engine = open_local(path / "store", 64, page_bytes=4096, block_pages=4)
rig = Rig(engine, 4096)
blocks = [Block(n, 4) for n in range(3)]
rig.write(*blocks)
os.truncate(path / "store" / "shard-000.data", 4096 + 11 * 4096)
first = Begun(rig, blocks if FIRST else [], fill=False)
cold = iter([True] + [False] * 9)
from light_mem.engine import page_cache
page_cache.hold_each = lambda addresses: [not next(cold) for _ in addresses]
engine.begin_read(first.io, first.report)  # its first block waits for the device, and so do all
begun = Begun(rig, [] if FIRST else blocks, fill=False)
engine.begin_read(begun.io, begun.report, by_calls=True)
engine.finish_reads()
told = first if FIRST else begun
say([outcome.name for [outcome] in told.told])
say([told.holds(at) for at in range(3)])
say(rig.find(*blocks))
say(rig.write(blocks[2])[0][-1].name)
say(rig.read(*blocks)[2].name)
engine.close()
"""


@pytest.mark.parametrize("first", [True, False])
def test_reads_by_calls_do_not_die_of_pages_that_are_lost(tmp_path: Path, first: bool) -> None:
    """Nor does what was begun before them (`first`), with them in hand."""
    with child(CUT_AND_READ.replace("FIRST", str(first)), tmp_path) as process:
        assert line(process) == "['LOADED', 'LOADED', 'DAMAGED']"
        assert line(process) == "[True, True, False]"
        assert line(process) == "[True, True, False]"
        assert line(process) == "STORED"
        assert line(process) == "LOADED"


def by_calls(between: Between, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Which batches are begun from now on: of which mode, and whether by calls."""
    seen: list[tuple[str, bool]] = []
    for name, at in (("begin_read", 4), ("begin_write", 4)):

        def begin(*arguments: Any, name: str = name, at: int = at, call: Any) -> None:
            seen.append((name, arguments[at]))
            call(*arguments)

        call = getattr(between.engine, name)
        monkeypatch.setattr(
            between.engine, name, lambda *a, begin=begin, call=call: begin(*a, call=call)
        )
    return seen


@pytest.mark.parametrize("handed_over", [False, True])
def test_what_a_dead_worker_had_in_hand_goes_by_calls_and_so_does_what_is_read_beside_it(
    between: Between, monkeypatch: pytest.MonkeyPatch, handed_over: bool
) -> None:
    seen = by_calls(between, monkeypatch)
    queue = between.worker._queue
    sinks: list[bool] = []
    sink = mapped_writes.MappedWrites.sink

    def spy(self: Any, start: int, length: int, by_calls: bool = False) -> Any:
        sinks.append(by_calls)
        return sink(self, start, length, by_calls)

    monkeypatch.setattr(mapped_writes.MappedWrites, "sink", spy)

    def die(task: CacheTask) -> CacheTask:
        if handed_over:
            queue.claim(1)
            queue.recover(1, lambda *_: False, again=True)
        return task

    read = die(between.read_old())
    between.do_next()
    assert read.state() == [State.Finished] * len(OLD)
    assert between.has_old()
    writes = die(between.write_new())
    reads = [between.read_old()]  # fresh, in the middle of the writes
    while not (writes.ready() and reads[0].ready()):
        between.do_next()
    monkeypatch.undo()
    assert between.is_stored(writes)
    assert {name for name, _ in seen} == {"begin_read", "begin_write"}
    assert {calls for name, calls in seen if name == "begin_write"} == {handed_over}
    assert seen[0] == ("begin_read", handed_over)
    assert sinks == [handed_over] * len(NEW)


@pytest.mark.parametrize("by_calls", [False, True])
def test_so_does_what_was_begun_before_writes_that_a_dead_worker_had_in_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_calls: bool
) -> None:
    engine = open_local(tmp_path / "store", 64, page_bytes=PAGE, block_pages=4)
    rig = Rig(engine, PAGE)
    rig.write(Block(1, 4))
    monkeypatch.setattr(page_cache, "hold_each", lambda addresses: [False] * len(addresses))
    read = Begun(rig, [Block(1, 4)], fill=False)
    engine.begin_read(read.io, read.report)
    assert engine.has_begun_reads
    seen: list[bool] = []
    finish = Reader.finish

    def spy(self: Any) -> bool:
        seen.extend([] if self._last is None else [self._last.by_calls])
        return finish(self)

    monkeypatch.setattr(Reader, "finish", spy)
    write = Begun(rig, [Block(2, 4)], fill=True)
    engine.begin_write(write.io, write.report, by_calls=by_calls)
    engine.finish_writes()
    assert seen == [by_calls]
    assert read.holds(0)
    engine.close()


# --- tools ----------------------------------------------------------------------------------------


def with_room_in_front(store: Path) -> tuple[Rig, list[Block]]:
    """A store whose first slots are free, and the blocks behind them: a smaller one moves these."""
    rig = Rig(open_local(store, 16))
    blocks = [Block(key) for key in range(1, 13)]
    rig.write(*blocks)
    rig.delete(*blocks[:6])
    return rig, blocks[6:]


@pytest.mark.usefixtures("short_blocks")
def test_a_block_that_cannot_be_read_is_dropped_where_a_store_gets_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, blocks = with_room_in_front(tmp_path / "store")
    where = rig.engine.lookup.find_one(*keymath.as_key(12))  # type: ignore[attr-defined]
    rig.engine.close()
    lost_at = 4096 + where * 64
    with monkeypatch.context() as patch:
        patch.setattr(slot_calls.os, "pread", losing(lambda at: at == lost_at))
        maintenance.resize(tmp_path / "store", 8 * 64)
    assert maintenance.verify(tmp_path / "store").sound
    rig = Rig(open_local(tmp_path / "store", 8))
    assert rig.read(*blocks) == [Outcome.LOADED] * 5 + [Outcome.MISSING]
    assert rig.engine.stats()["used_slots"] == 5
    assert rig.write(Block(12)) == [COPIED_AND_STORED]
    rig.engine.close()


@pytest.mark.usefixtures("short_blocks")
def test_slots_that_cannot_be_written_cost_no_block_where_a_store_gets_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, blocks = with_room_in_front(tmp_path / "store")
    rig.engine.close()

    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", refuse)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            maintenance.resize(tmp_path / "store", 8 * 64)
    rig = Rig(open_local(tmp_path / "store", 16))
    assert rig.read(*blocks) == [Outcome.LOADED] * 6
    rig.engine.close()
