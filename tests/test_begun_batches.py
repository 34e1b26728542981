"""Batches that are begun before the last one has ended: nothing is told early, late or twice."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from light_mem.engine import direct_writes, page_cache, read_ahead, writing
from light_mem.engine.base import BlockIO, Outcome
from light_mem.engine.device_threads import DeviceThreads
from light_mem.engine.direct_writes import LEAST_BYTES
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.read_ahead import Span
from light_mem.errors import LockTimeoutError
from light_mem.index import keys as keymath
from light_mem.index.format import MAX_INTENTS
from light_mem.index.locks import LOCK_TIMEOUT_SECONDS
from tests.cached import can_forget, forget_all
from tests.deaths import moments, restore
from tests.engine_helpers import COPIED_AND_STORED, Block, Rig, let_go
from tests.payload import block_bytes_of
from tests.test_cold_reads import DATA, make, opened
from tests.test_deaths import FRESH, KEPT, check, prepared
from tests.test_page_cache import open_dropping

PAGE = LEAST_BYTES
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _cache_that_forgets(tmp_path: Path) -> None:
    if not can_forget(tmp_path):
        pytest.skip("this file system drops no pages")


class Begun:
    """A batch of a rig, and what was told of each block."""

    def __init__(self, rig: Rig, blocks: Sequence[Block], *, fill: bool) -> None:
        self.blocks = list(blocks)
        self.io: list[BlockIO] = rig._batch(self.blocks, fill)
        self.told: list[list[Outcome]] = [[] for _ in blocks]
        self.page_bytes = rig.page_bytes

    def report(self, positions: Sequence[int], outcome: Outcome) -> None:
        for at in positions:
            self.told[at].append(outcome)

    def holds(self, at: int) -> bool:
        block, io = self.blocks[at], self.io[at]
        wanted = block_bytes_of(block.key, block.pages, self.page_bytes)
        return bool(np.array_equal(io.place.memory[io.place.numbers], wanted))


def begin_write(rig: Rig, *blocks: Block) -> Begun:
    begun = Begun(rig, blocks, fill=True)
    rig.engine.begin_write(begun.io, begun.report)
    return begun


def begin_read(rig: Rig, *blocks: Block, stop: Any = lambda _: False) -> Begun:
    begun = Begun(rig, blocks, fill=False)
    rig.engine.begin_read(begun.io, begun.report, stop)
    return begun


class Gate:
    """Lets requests to the device pass when it is open; the test may fail some."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.open = threading.Event()
        self.open.set()
        self.bad: set[int] = set()  # places in the file
        self.begun: list[Span] = []

    def __call__(self, first: Any, second: Any, *rest: Any) -> Any:
        span = first if isinstance(first, Span) else second
        self.begun.append(span)
        assert self.open.wait(30)
        if span.at in self.bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self.call(first, second, *rest)


# --- writes ---------------------------------------------------------------------------------------


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate(direct_writes._store)
    monkeypatch.setattr(direct_writes, "_store", gate)
    return gate


@pytest.fixture
def dropping(tmp_path: Path) -> Iterator[Rig]:
    """Room for 16 pages."""
    rig = open_dropping(tmp_path / "store", 16, PAGE)
    yield rig
    rig.engine.close()
    let_go(rig.engine, rig)


def used(rig: Rig) -> int:
    return int(rig.engine.stats()["used_slots"])


def test_blocks_are_found_when_the_next_ones_were_copied_and_not_before_they_have_landed(
    dropping: Rig, stores: Gate
) -> None:
    stores.open.clear()
    first = begin_write(dropping, Block(1), Block(2))
    assert first.told == [[Outcome.COPIED]] * 2
    assert dropping.find(Block(1), Block(2)) == [False] * 2
    assert not dropping.engine.file(0).records["tag"].any()

    second = Begun(dropping, [Block(3)], fill=True)

    def report(positions: Sequence[int], outcome: Outcome) -> None:
        if outcome is Outcome.COPIED:
            assert first.told == [[Outcome.COPIED]] * 2
            stores.open.set()
        second.report(positions, outcome)

    dropping.engine.begin_write(second.io, report)
    assert first.told == [[*COPIED_AND_STORED]] * 2
    assert second.told == [[Outcome.COPIED]]
    assert dropping.find(Block(1), Block(2), Block(3)) == [True, True, False]
    assert dropping.engine.has_begun_writes
    assert dropping.engine.finish_writes()
    assert second.told == [[*COPIED_AND_STORED]]
    assert not dropping.engine.has_begun_writes
    assert not dropping.engine.finish_writes()
    assert dropping.read(Block(1), Block(2), Block(3)) == [Outcome.LOADED] * 3


def test_a_device_that_fails_fails_the_blocks_it_was_given_and_no_others(
    dropping: Rig, stores: Gate
) -> None:
    stores.bad = {4096}  # the first slots
    first = begin_write(dropping, Block(1, 4))
    second = begin_write(dropping, Block(2, 4))
    assert first.told == [[Outcome.COPIED, Outcome.FAILED]]
    dropping.engine.finish_writes()
    assert second.told == [[*COPIED_AND_STORED]]
    stores.bad = set()
    third = begin_write(dropping, Block(3, 4))  # gives back what failed
    dropping.engine.finish_writes()
    assert third.told == [[*COPIED_AND_STORED]]
    assert used(dropping) == 8
    assert dropping.read(Block(1, 4), Block(2, 4), Block(3, 4)) == [
        Outcome.MISSING, Outcome.LOADED, Outcome.LOADED,
    ]  # fmt: skip


def test_what_fails_beside_a_begun_batch_leaves_its_slots_alone(
    dropping: Rig, stores: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one shard: those of the failed batch go back, those on their way do not."""
    first = begin_write(dropping, Block(1, 4))
    with monkeypatch.context() as patch:
        broken = OSError(errno.ENOMEM, "no memory")
        patch.setattr(direct_writes.DirectWrites, "sink", _raise(broken))
        second = begin_write(dropping, Block(2, 4))
    assert second.told == [[Outcome.FAILED]]
    assert first.told == [[*COPIED_AND_STORED]]  # not left for later, where something failed
    third = begin_write(dropping, Block(3, 4))
    stores.open.clear()
    fourth = Begun(dropping, [Block(4, 4)], fill=True)
    with monkeypatch.context() as patch:
        failing = _raise(broken, stores.open)
        patch.setattr(dropping.engine.file(0), "plan", lambda *_: failing)
        dropping.engine.begin_write(fourth.io, fourth.report)
    assert fourth.told == [[Outcome.FAILED]]
    fifth = begin_write(dropping, Block(5, 4))
    dropping.engine.finish_writes()
    assert third.told == fifth.told == [[*COPIED_AND_STORED]]
    assert used(dropping) == 12
    assert dropping.read(Block(1, 4), Block(3, 4), Block(5, 4)) == [Outcome.LOADED] * 3


def _raise(error: Exception, first: threading.Event | None = None) -> Any:
    def call(*_: Any, **__: Any) -> Any:
        if first is not None:
            first.set()
        raise error

    return call


def test_the_same_block_in_two_batches_is_stored_once(dropping: Rig) -> None:
    first = begin_write(dropping, Block(1, 4), Block(2))
    second = begin_write(dropping, Block(3), Block(1, 4))
    dropping.engine.finish_writes()
    assert first.told == [[*COPIED_AND_STORED]] * 2
    assert second.told == [[*COPIED_AND_STORED], [Outcome.COPIED, Outcome.PRESENT]]
    assert used(dropping) == 6
    assert dropping.read(Block(1, 4), Block(2), Block(3)) == [Outcome.LOADED] * 3


def test_blocks_that_are_there_already_keep_nothing_waiting(dropping: Rig) -> None:
    begin_write(dropping, Block(1), Block(2))
    dropping.engine.finish_writes()
    begun = begin_write(dropping, Block(3, 4))
    there = begin_write(dropping, Block(1), Block(2), Block(99, 17))  # or are too long
    assert there.told == [[Outcome.PRESENT]] * 2 + [[Outcome.NO_ROOM]]
    assert begun.told == [[*COPIED_AND_STORED]]
    assert not dropping.engine.has_begun_writes


def test_where_a_batch_has_failed_the_next_ones_are_not_left_for_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slots are announced until its shard's lock is free: there is room for one more."""
    LocalStorageEngine.open_store(
        tmp_path / "s", page_bytes=PAGE, num_of_shard=2, storage_size=32 * PAGE, block_pages=1
    ).close()
    rig = Rig(LocalStorageEngine(tmp_path / "s", kind="worker", page_cache="drop"), PAGE)
    keys = np.arange(64, dtype=np.uint64)
    shards = keymath.shards_of(keymath.mix(keymath.as_keys(keys.tolist())), 2)
    of_0, of_1 = ([Block(int(key), 2) for key in keys[shards == n]] for n in (0, 1))
    opened = rig.engine._open  # type: ignore[attr-defined]
    change = opened.change

    def unless_free(shard: int, timeout: float) -> Any:
        if not timeout:
            raise LockTimeoutError("not free", path=str(shard), timeout=timeout)
        return change(shard, timeout)

    with monkeypatch.context() as patch:
        patch.setattr(opened, "change", unless_free)
        with monkeypatch.context() as broken:
            no_disk = _raise(OSError(errno.EIO, "no disk"))
            broken.setattr(direct_writes.DirectWrites, "sink", no_disk)
            assert begin_write(rig, of_1[0]).told == [[Outcome.FAILED]]
        assert begin_write(rig, of_0[0]).told == [[*COPIED_AND_STORED]]
    assert begin_write(rig, of_1[1]).told == [[Outcome.COPIED]]  # and what failed went back
    rig.engine.close()
    assert rig.engine.stats()["used_slots"] == 4


def test_for_want_of_room_the_batch_before_is_stored_and_evicted(
    dropping: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "ROOM_SECONDS", 0.0)  # nobody else gives any back
    first = begin_write(dropping, Block(1, 8), Block(2, 8))
    assert dropping.find(Block(1), Block(2)) == [False] * 2
    second = begin_write(dropping, Block(3, 16))
    dropping.engine.finish_writes()
    assert first.told == [[*COPIED_AND_STORED]] * 2
    assert second.told == [[*COPIED_AND_STORED]]
    assert dropping.read(Block(3, 16)) == [Outcome.LOADED]


def test_blocks_of_a_part_that_fails_in_the_middle_are_told_once(
    dropping: Rig, stores: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four find room and are copied; the lock is not to be had for the others."""
    change = dropping.engine._open.change
    timeouts: list[float] = []

    def fail_to_allocate_again(shard: int, timeout: float) -> Any:
        timeouts.append(timeout)
        if len(timeouts) in (2, 4):
            raise LockTimeoutError("not free", path="the shard", timeout=timeout)
        return change(shard, timeout)

    monkeypatch.setattr(dropping.engine._open, "change", fail_to_allocate_again)
    begun = begin_write(dropping, *[Block(n, 4) for n in range(6)])
    assert begun.told == [[*COPIED_AND_STORED]] * 4 + [[Outcome.FAILED]] * 2
    assert not dropping.engine.has_begun_writes
    # Room; room again, with what was copied in hand; that is published; and room again.
    assert timeouts[1] < 1
    assert [timeouts[n] for n in (0, 2, 3)] == [LOCK_TIMEOUT_SECONDS] * 3
    assert len(timeouts) == 4


def test_a_part_whose_shard_cannot_be_changed_any_more_tells_no_block_twice(
    dropping: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even of those that were copied before: a cell of theirs may be another task's."""
    change, calls = dropping.engine._open.change, 0

    def fail_second(shard: int, timeout: float) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return change(shard, timeout)

    monkeypatch.setattr(dropping.engine._open, "change", fail_second)
    begun = begin_write(dropping, *[Block(n, 4) for n in range(6)])
    assert begun.told == [[*COPIED_AND_STORED]] * 4 + [[Outcome.FAILED]] * 2


def test_a_device_error_while_the_lock_is_not_free_fails_no_block_twice(
    dropping: Rig, stores: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores.bad = {4096}
    change, calls = dropping.engine._open.change, 0

    def fail_second(shard: int, timeout: float) -> Any:
        nonlocal calls
        calls += 1
        if calls >= 2:
            raise LockTimeoutError("not free", path="the shard", timeout=timeout)
        return change(shard, timeout)

    with monkeypatch.context() as patch:
        patch.setattr(dropping.engine._open, "change", fail_second)
        begun = begin_write(dropping, *[Block(n, 4) for n in range(6)])
    assert begun.told == [[Outcome.COPIED, Outcome.FAILED]] * 4 + [[Outcome.FAILED]] * 2


def test_a_single_write_leaves_what_was_begun_alone(dropping: Rig, stores: Gate) -> None:
    stores.open.clear()
    begun = begin_write(dropping, Block(1, 4))
    dropping.engine.prepare()
    [block] = dropping._batch([Block(2)], fill=True)
    assert dropping.engine.write_now(block) is None
    assert used(dropping) == 4
    stores.open.set()
    dropping.engine.finish_writes()
    assert begun.told == [[*COPIED_AND_STORED]]


def test_both_batches_are_announced_and_fit(tmp_path: Path, stores: Gate) -> None:
    count = MAX_INTENTS // 2
    rig = open_dropping(tmp_path / "store", 2 * count, PAGE)
    stores.open.clear()
    one = begin_write(rig, *[Block(n) for n in range(count)])
    seen: list[list[int]] = []
    two = Begun(rig, [Block(n) for n in range(count, 2 * count)], fill=True)

    def report(positions: Sequence[int], outcome: Outcome) -> None:
        if outcome is Outcome.COPIED and not seen:
            owners = rig.engine._owners.records
            seen.append(sorted(i - 1 for i in owners["intents"].ravel().tolist() if i))
            stores.open.set()
        two.report(positions, outcome)

    rig.engine.begin_write(two.io, report)
    assert seen == [list(range(2 * count))]
    rig.engine.finish_writes()
    assert one.told + two.told == [[*COPIED_AND_STORED]] * 2 * count
    rig.engine.close()


def test_a_close_ends_what_was_begun(tmp_path: Path) -> None:
    rig = open_dropping(tmp_path / "store", 16, PAGE)
    begun = begin_write(rig, Block(1, 4))
    rig.engine.close()
    assert begun.told == [[*COPIED_AND_STORED]]
    let_go(rig.engine)
    rig = Rig(LocalStorageEngine(tmp_path / "store", kind="worker"), PAGE)
    assert rig.read(Block(1, 4)) == [Outcome.LOADED]
    rig.engine.close()


def test_with_keep_nothing_is_left_for_later(tmp_path: Path) -> None:
    open_dropping(tmp_path / "store", 16, PAGE).engine.close()
    rig = Rig(LocalStorageEngine(tmp_path / "store", kind="worker"), PAGE)
    assert begin_write(rig, Block(1, 4)).told == [[*COPIED_AND_STORED]]
    assert not rig.engine.finish_writes()
    assert begin_read(rig, Block(1, 4)).told == [[Outcome.LOADED]]
    assert not rig.engine.finish_reads()
    rig.engine.close()


@pytest.mark.parametrize("index", ["with", "without"])
def test_a_kill_with_two_batches_in_hand_costs_only_those(tmp_path: Path, index: str) -> None:
    prepared(tmp_path / "store").engine.close()
    rig = Rig(LocalStorageEngine(tmp_path / "store", kind="worker", page_cache="drop"))

    def write() -> None:
        begun = [begin_write(rig, FRESH[0]), begin_write(rig, FRESH[1], FRESH[2])]
        assert rig.engine.has_begun_writes
        rig.engine.finish_writes()
        assert begun[0].told + begun[1].told == [[*COPIED_AND_STORED]] * 3

    seen = moments(tmp_path / "store", write)
    rig.engine.close()
    assert len(seen) > 30
    for at, files in enumerate(seen):
        if index == "without":
            files = {name: content for name, content in files.items() if name != "index"}
        check(restore(files, tmp_path / "store", tmp_path / str(at)), KEPT - {2}, at % 2 == 0)


# --- reads ----------------------------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate(read_ahead._load)
    monkeypatch.setattr(read_ahead, "_load", gate)
    return gate


def test_the_device_has_the_next_batch_before_the_last_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[Span] = []  # as they are handed to the threads: when one begins is their affair
    submit = DeviceThreads.submit

    def note(self: DeviceThreads, call: Any, span: Span, *rest: Any) -> Any:
        requests.append(span)
        return submit(self, call, span, *rest)

    monkeypatch.setattr(DeviceThreads, "submit", note)
    blocks = [Block(n, 4) for n in range(6)]
    make(tmp_path / "s", blocks, PAGE)
    with opened(tmp_path / "s", PAGE) as r:
        first, second = (Begun(r, part, fill=False) for part in (blocks[:2], blocks[2:4]))
        asked: list[int] = []

        def report(positions: Sequence[int], outcome: Outcome) -> None:
            asked.append(sum(span.nbytes for span in requests))
            first.report(positions, outcome)

        r.engine.begin_read(first.io, report)
        assert first.told == [[], []]
        r.engine.begin_read(second.io, second.report)
        assert first.told == [[Outcome.LOADED]] * 2
        assert asked[0] == 4 * 4 * PAGE
        assert second.told == [[], []]
        assert r.engine.has_begun_reads
        assert r.engine.finish_reads()
        assert second.told == [[Outcome.LOADED]] * 2
        assert not r.engine.finish_reads()
        assert all(begun.holds(at) for begun in (first, second) for at in range(2))
        assert len(requests) == len(set(requests))  # nothing was asked for twice


def test_what_needs_no_device_is_not_left_for_later(tmp_path: Path) -> None:
    blocks = [Block(n, 4) for n in range(4)]
    make(tmp_path / "s", blocks, PAGE)
    with opened(tmp_path / "s", PAGE) as r:
        cold = begin_read(r, *blocks[:2], Block(99))
        assert cold.told == [[], [], []]
        absent = begin_read(r, Block(98), Block(97))
        assert cold.told == [[Outcome.LOADED], [Outcome.LOADED], [Outcome.MISSING]]
        assert absent.told == [[Outcome.MISSING]] * 2
        assert not r.engine.has_begun_reads


def test_what_ails_one_batch_is_not_the_others_fault(tmp_path: Path, loads: Gate) -> None:
    blocks = [Block(n, 4) for n in range(9)]
    make(tmp_path / "s", blocks, PAGE)
    data = tmp_path / "s" / DATA
    with data.open("r+b") as file:
        at = 4096 + 4 * PAGE * 1 + 7  # of block 1
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))
    forget_all(data)
    with opened(tmp_path / "s", PAGE) as r:
        stopped = False

        def stop(at: int) -> bool:
            return stopped and at == 2

        one = begin_read(r, *blocks[:3], stop=stop)
        stopped = True
        two = begin_read(r, *blocks[3:6])
        three = begin_read(r, *blocks[6:], blocks[6])  # one of them twice
        r.engine.finish_reads()
        assert one.told == [[Outcome.LOADED], [Outcome.DAMAGED], [Outcome.STOPPED]]
        assert two.told == [[Outcome.LOADED]] * 3
        assert three.told == [[Outcome.LOADED]] * 4
        assert all(begun.holds(at) for begun in (two, three) for at in range(3))


def test_a_block_that_goes_while_its_batch_waits_is_lost(tmp_path: Path) -> None:
    blocks = [Block(n, 4) for n in range(4)]
    make(tmp_path / "s", blocks, PAGE)
    with opened(tmp_path / "s", PAGE) as r:
        one = begin_read(r, *blocks[:2])
        assert r.delete(blocks[1]) == 1
        two = begin_read(r, *blocks[2:])
        r.engine.finish_reads()
        assert one.told == [[Outcome.LOADED], [Outcome.LOST]]
        assert two.told == [[Outcome.LOADED]] * 2


def test_a_closed_engine_has_told_of_every_read(tmp_path: Path) -> None:
    make(tmp_path / "s", [Block(1, 4)], PAGE)
    with opened(tmp_path / "s", PAGE) as r:
        begun = begin_read(r, Block(1, 4))
        assert begun.told == [[]]
    assert begun.told == [[Outcome.LOADED]]
    assert begun.holds(0)


# --- all at once ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["drop", "keep"])
@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_batches_gives_right_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, seed: int
) -> None:
    """Writes that evict and reads in turn, as a worker does them, of cold and other blocks."""
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(
        page_cache, "hold_each", lambda addresses: [rng.random() < 0.5 for _ in addresses]
    )
    page_bytes = int(rng.choice([3840, 4096, 61440]))
    open_dropping(tmp_path / "s", 96, page_bytes).engine.close()
    engine = LocalStorageEngine(tmp_path / "s", kind="worker", page_cache=policy)
    rig = Rig(engine, page_bytes)
    pages = {key: int(rng.integers(1, 25)) for key in range(24)}
    begun: list[Begun] = []
    for _ in range(60):
        keys = rng.choice(24, int(rng.integers(1, 6)), replace=False).tolist()
        blocks = [Block(key, pages[key]) for key in keys]
        if rng.random() < 0.5:
            engine.finish_reads()
            begun.append(begin_write(rig, *blocks))
        else:
            begun.append(begin_read(rig, *blocks))
            if rng.random() < 0.7:
                engine.finish_writes()
        if rng.random() < 0.2:
            engine.finish_reads()
            engine.finish_writes()
    engine.finish_reads()
    engine.finish_writes()
    final = {Outcome.STORED, Outcome.PRESENT, Outcome.LOADED, Outcome.MISSING, Outcome.LOST}
    loaded = 0
    for one in begun:
        for at, told in enumerate(one.told):
            assert told[-1] in final
            assert sum(outcome is not Outcome.COPIED for outcome in told) == 1
            if told == [Outcome.LOADED]:
                loaded += 1
                assert one.holds(at)
    assert loaded > 5
    assert engine.stats()["damaged"] == 0
    stored = [key for key in range(24) if rig.find(Block(key))[0]]
    assert rig.read(*[Block(k, pages[k]) for k in stored]) == [Outcome.LOADED] * len(stored)
    assert used(rig) == sum(pages[key] for key in stored)
    engine.close()
