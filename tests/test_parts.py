"""A batch for several shards: each step is made for all of its parts before the next one, and what
is wrong with one shard is no other's concern."""

from __future__ import annotations

import errno
import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from light_mem.engine import copy_loops, direct_writes, page_cache, writing
from light_mem.engine.base import BlockIO, Outcome
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.mapped_writes import MappedWrites
from light_mem.engine.pieces import PIECE_BYTES
from light_mem.engine.places import Rows
from light_mem.engine.shard_file import ShardFile
from light_mem.errors import LockTimeoutError
from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.index.recovery import states_of
from tests.deaths import moments, restore
from tests.engine_helpers import (
    COPIED_AND_STORED,
    PAGE,
    Block,
    Rig,
    assert_consistent,
    assert_whole_after_death,
    blocks_of_shard,
    lent,
    let_go,
    open_local,
)

SHARDS = 3
SLOTS = 6  # of each shard


def of_shard(shard: int, count: int, first: int = 0) -> list[Block]:
    return blocks_of_shard(shard, SHARDS, count, first)


def opened(directory: Path, policy: str = "keep") -> LocalStorageEngine:
    if not directory.exists():
        open_local(directory, SLOTS, shards=SHARDS).close()
    return LocalStorageEngine(directory, kind="worker", page_cache=policy)


@pytest.fixture(params=["keep", "drop"])
def engine(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[LocalStorageEngine]:
    yield from lent(opened(tmp_path / "store", request.param))


@pytest.fixture
def keeping(tmp_path: Path) -> Iterator[LocalStorageEngine]:
    yield from lent(opened(tmp_path / "store"))


Change = Callable[[int, float], AbstractContextManager[Any]]


def around_changes(
    engine: LocalStorageEngine, patch: pytest.MonkeyPatch, before: Callable[[int, float], None]
) -> None:
    """Call `before` with the shard and the timeout of each change."""
    change: Change = engine._open.change

    def changed(shard: int, timeout: float) -> AbstractContextManager[Any]:
        before(shard, timeout)
        return change(shard, timeout)

    patch.setattr(engine._open, "change", changed)


def is_clean(engine: LocalStorageEngine) -> bool:
    """Whether nothing is marked or announced any more."""
    assert_consistent(engine._index)
    announced = engine._owners.records["intents"][engine._owner.number].any()
    return not announced and fmt.WRITING not in states_of(engine._index.entries)


def test_all_get_room_then_all_are_copied_then_all_are_published(
    keeping: LocalStorageEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[object] = []
    around_changes(keeping, monkeypatch, lambda shard, _: steps.append(shard))
    plan, loop = ShardFile.plan, copy_loops.gather_whole

    def planned(file: ShardFile, *args: Any, **named: Any) -> Any:
        steps.append("plan")
        return plan(file, *args, **named)

    def copied(made: copy_loops.Steps) -> None:
        steps.append("copy")
        loop(made)

    monkeypatch.setattr(ShardFile, "plan", planned)
    monkeypatch.setattr(copy_loops, "gather_whole", copied)
    blocks = [block for shard in range(SHARDS) for block in of_shard(shard, 2)]
    assert Rig(keeping).write(*blocks) == [COPIED_AND_STORED] * 6
    assert steps == [0, 1, 2, *["plan"] * 3, *["copy"] * 3, 0, 1, 2]
    assert is_clean(keeping)


def test_what_writes_cost_is_learned_from_each_shards_own_copies(
    keeping: LocalStorageEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page faults are counted from when a shard's copies begin until they were made."""
    steps: list[object] = []
    loop, start, was_put = copy_loops.gather_whole, MappedWrites.start, MappedWrites.was_put
    files = [keeping.file(shard)._writes for shard in range(2)]

    def copied(made: copy_loops.Steps) -> None:
        steps.append("copy")
        loop(made)

    def started(writes: MappedWrites) -> None:
        steps.append(("start", files.index(writes)))
        start(writes)

    def put(writes: MappedWrites, *args: Any) -> None:
        steps.append(("put", files.index(writes)))
        was_put(writes, *args)

    monkeypatch.setattr(copy_loops, "gather_whole", copied)
    monkeypatch.setattr(MappedWrites, "start", started)
    monkeypatch.setattr(MappedWrites, "was_put", put)
    blocks = [of_shard(shard, 1)[0] for shard in range(2)]
    assert Rig(keeping).write(*blocks) == [COPIED_AND_STORED] * 2
    assert steps == [
        step for shard in range(2) for step in (("start", shard), "copy", ("put", shard))
    ]


def test_a_device_that_fails_one_shard_costs_only_its_blocks(
    engine: LocalStorageEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of the second shard; in a group with the others, which are copied before and after."""
    bad = {os.fstat(engine.file(1)._data_fd).st_ino}

    def failing(call: Callable[..., int]) -> Callable[..., int]:
        def write(descriptor: int, *rest: Any) -> int:
            if os.fstat(descriptor).st_ino in bad:
                raise OSError(errno.EIO, "no device")
            return call(descriptor, *rest)

        return write

    blocks = [block for shard in range(SHARDS) for block in of_shard(shard, 2)]
    rig = Rig(engine)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", failing(os.pwritev))
        patch.setattr(os, "pwrite", failing(os.pwrite))
        told = rig.write(*blocks)
    good = [0, 1, 4, 5]
    assert [told[at] for at in good] == [COPIED_AND_STORED] * 4
    assert [told[at][-1] for at in (2, 3)] == [Outcome.FAILED] * 2
    assert all(len(each) == len(set(each)) for each in told)
    assert is_clean(engine)
    assert rig.read(*(blocks[at] for at in good)) == [Outcome.LOADED] * 4
    assert rig.find(*blocks[2:4]) == [False, False]
    assert rig.write(*blocks[2:4]) == [COPIED_AND_STORED] * 2


def test_what_failed_keeps_no_memory(
    keeping: LocalStorageEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "no device")

    memory = np.zeros((2, PAGE), np.uint8)
    kept = weakref.ref(memory)
    batch = [
        BlockIO(
            *keymath.as_key(of_shard(shard, 1)[0].key), Rows(memory, np.array([shard], np.intp))
        )
        for shard in range(2)
    ]
    told: list[Outcome] = []
    gc.collect()
    gc.disable()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", fail)
            keeping.write(batch, lambda _, outcome: told.append(outcome))
        keeping._gatherer.forget()
        del batch, memory
        assert kept() is None
    finally:
        gc.enable()
    assert told == [Outcome.FAILED] * 2


@pytest.mark.parametrize("busy", range(SHARDS))
def test_who_has_a_lock_holds_up_only_its_blocks(
    engine: LocalStorageEngine, monkeypatch: pytest.MonkeyPatch, busy: int
) -> None:
    """It is given back once the other shards' blocks are stored, which do not wait for it. (The
    first shard's lock is waited for while nothing is in hand.)"""
    rig = Rig(engine)
    blocks = [block for shard in range(SHARDS) for block in of_shard(shard, 2)]
    others = [block for at, block in enumerate(blocks) if at // 2 != busy]
    waits: list[float] = []

    def refuse(shard: int, timeout: float) -> None:
        if shard != busy or all(rig.find(*others)):
            return
        waits.append(timeout)
        if timeout < writing.LOCK_TIMEOUT_SECONDS:
            raise LockTimeoutError("held", path=str(shard), timeout=timeout)
        assert busy == 0  # what was given room before does not wait as long

    around_changes(engine, monkeypatch, refuse)
    assert rig.write(*blocks) == [COPIED_AND_STORED] * 6
    assert waits
    assert is_clean(engine)


def test_a_lock_that_stays_taken_fails_its_blocks_when_the_others_are_stored(
    engine: LocalStorageEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(engine)
    blocks = [block for shard in range(SHARDS) for block in of_shard(shard, 2)]
    timeouts: list[float] = []

    def refuse(shard: int, timeout: float) -> None:
        if shard:
            timeouts.append(timeout)
            raise LockTimeoutError("held", path=str(shard), timeout=timeout)

    with monkeypatch.context() as patch:
        around_changes(engine, patch, refuse)
        told = rig.write(*blocks)
    assert told == [COPIED_AND_STORED] * 2 + [(Outcome.FAILED,)] * 4
    # Once in vain for the first, not at all for the second; then, with nothing in hand, for both.
    brief = [timeout for timeout in timeouts if timeout < writing.LOCK_TIMEOUT_SECONDS]
    assert brief[:2] == [writing.SHORT_SECONDS, 0]
    assert timeouts[-2:] == [writing.LOCK_TIMEOUT_SECONDS] * 2
    assert is_clean(engine)


def test_what_finds_no_room_comes_after_what_is_in_its_way(engine: LocalStorageEngine) -> None:
    """More blocks of one shard than it has slots, between others' of shards that are full."""
    rig = Rig(engine)
    for shard in range(SHARDS):
        assert rig.write(*of_shard(shard, SLOTS, 20_000)) == [COPIED_AND_STORED] * SLOTS
    many = of_shard(1, 2 * SLOTS + 1)
    blocks = [*of_shard(0, 2), *many, *of_shard(2, 2)]
    assert rig.write(*blocks) == [COPIED_AND_STORED] * len(blocks)
    assert rig.find(*many) == [False] * (SLOTS + 1) + [True] * SLOTS
    assert rig.read(*many[-SLOTS:], *of_shard(0, 2), *of_shard(2, 2)) == [Outcome.LOADED] * 10
    assert is_clean(engine)


def test_an_abort_in_the_middle_leaves_the_others_of_all_shards(
    keeping: LocalStorageEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen while the second shard's blocks are copied: the first's are copied again."""
    gone: set[int] = set()
    loop, calls = copy_loops.gather_whole, 0

    def copied(made: copy_loops.Steps) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            gone.add(3)
        loop(made)

    monkeypatch.setattr(copy_loops, "gather_whole", copied)
    blocks = [block for shard in range(SHARDS) for block in of_shard(shard, 2)]
    rig = Rig(keeping)
    told = rig.write(*blocks, stop=gone.__contains__)
    assert told[3] == (Outcome.STOPPED,)
    assert [each for at, each in enumerate(told) if at != 3] == [COPIED_AND_STORED] * 5
    assert calls == 1 + SHARDS
    assert rig.find(*blocks) == [True, True, True, False, True, True]
    assert is_clean(keeping)


@pytest.mark.parametrize("without", ["", "index"])
def test_a_kill_at_any_store_of_a_batch_costs_what_it_was_to_evict(
    tmp_path: Path, without: str
) -> None:
    rig = Rig(open_local(tmp_path / "store", SLOTS, shards=SHARDS))
    before = [block for shard in range(SHARDS) for block in of_shard(shard, SLOTS, 20_000)]
    rig.write(*before)
    kept = {block.key for at, block in enumerate(before) if at % SLOTS >= 2}
    blocks = [block for shard in range(SHARDS) for block in of_shard(shard, 2)]
    seen = moments(tmp_path / "store", lambda: rig.write(*blocks))
    rig.engine.close()
    assert len(seen) > 60
    for at, files in enumerate(seen):
        files = {name: content for name, content in files.items() if name != without}
        directory = restore(files, tmp_path / "store", tmp_path / str(at))
        rig = Rig(open_local(directory, SLOTS, shards=SHARDS))
        assert_whole_after_death(rig, [*before, *blocks], kept)
        rig.engine.close()


class Slow:
    """Requests past the page cache that take a while."""

    def __init__(self, patch: pytest.MonkeyPatch, error: OSError | None = None) -> None:
        self.begun = self.ended = 0
        self._store = direct_writes._store
        self._error = error
        self._count = threading.Lock()
        self.has_begun = threading.Event()
        patch.setattr(direct_writes, "_store", self)

    def __call__(self, *args: Any) -> bool:
        with self._count:
            self.begun += 1
        self.has_begun.set()
        threading.Event().wait(0.2)
        result = self._store(*args)
        with self._count:
            self.ended += 1
        if self._error is not None:
            raise OSError(self._error.errno, "of a request")
        return result


LONG = 2 * PIECE_BYTES  # a page of more than a buffer


def opened_past(directory: Path) -> LocalStorageEngine:
    open_local(directory, SLOTS, shards=SHARDS, page_bytes=LONG).close()
    return LocalStorageEngine(directory, kind="worker", page_cache="drop")


@pytest.mark.parametrize("error", [None, OSError(errno.EIO, "no device")])
def test_whatever_breaks_a_part_past_the_page_cache_waits_for_the_requests_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError | None
) -> None:
    """Their slots are given back then, and must not be written over; requests may fail as well."""
    engine = opened_past(tmp_path / "store")
    blocks = [of_shard(shard, 1)[0] for shard in range(SHARDS)]
    rig = Rig(engine, LONG)
    with monkeypatch.context() as patch:
        slow = Slow(patch, error)

        def broken(*_: object) -> None:
            assert slow.has_begun.wait(20)
            raise RuntimeError("not an OSError")

        patch.setattr(engine.file(2), "plan", broken)
        with pytest.raises(RuntimeError, match="not an OSError"):
            rig.write(*blocks)
        assert slow.begun == slow.ended >= 2
    assert rig.write(*blocks) == [COPIED_AND_STORED] * SHARDS
    assert rig.read(*blocks) == [Outcome.LOADED] * SHARDS
    engine.close()
    let_go(engine, rig)


def test_what_fails_past_the_page_cache_is_given_back_when_nothing_of_it_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first block of a part is on its way to the device when the second one fails."""
    engine = opened_past(tmp_path / "store")
    first, second = of_shard(1, 2)
    blocks = [*of_shard(0, 1), first._replace(pages=3), second]
    rig = Rig(engine, LONG)
    with monkeypatch.context() as patch:
        slow, sink, sinks = Slow(patch), direct_writes.DirectWrites.sink, 0

        def second_fails(writes: direct_writes.DirectWrites, *args: Any) -> Any:
            nonlocal sinks
            sinks += 1
            if sinks == 3:
                assert slow.has_begun.wait(20)
                raise OSError(errno.ENOMEM, "no memory")
            return sink(writes, *args)

        def given_back(shard: int, _: float) -> None:
            if shard == 1 and sinks >= 3:
                looks.append(slow.begun - slow.ended)

        looks: list[int] = []
        patch.setattr(direct_writes.DirectWrites, "sink", second_fails)
        around_changes(engine, patch, given_back)
        told = rig.write(*blocks)
    assert [each[-1] for each in told] == [Outcome.STORED] + [Outcome.FAILED] * 2
    assert looks
    assert looks[0] == 0
    assert is_clean(engine)
    engine.close()
    let_go(engine, rig)


def test_a_hint_that_fails_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = opened(tmp_path / "store", "drop")
    hints = 0

    def fail(*_: object) -> None:
        nonlocal hints
        hints += 1
        raise OSError(errno.EIO, "no device")

    monkeypatch.setattr(page_cache, "read_edges", fail)
    assert Rig(engine).write(*of_shard(0, 2)) == [COPIED_AND_STORED] * 2
    assert hints
    engine.close()
    let_go(engine)
