"""Blocks that are copied together: which they are, and what of them is told, aborted, learned."""

from __future__ import annotations

import errno
import gc
import os
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest

from light_mem.engine import copy, copy_loops, groups, reading
from light_mem.engine.base import BlockIO, Outcome
from light_mem.engine.groups import stop_of
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.mapped_writes import CALLS_BEFORE, CALLS_BEFORE_FAULTS, LEAST_BYTES
from light_mem.engine.places import Rows
from light_mem.engine.worker import Aborted
from light_mem.errors import ServiceClosedError
from light_mem.index import keys as keymath
from tests.engine_helpers import Block, Rig, collect, open_local

if TYPE_CHECKING:
    from light_mem.engine.task_table import TaskTable

PAGE = LEAST_BYTES


def cut(nbytes: list[int], least: int) -> list[list[int]]:
    return [list(group) for group in groups.groups(range(len(nbytes)), nbytes, least)]


def test_a_group_ends_once_it_is_long_enough() -> None:
    assert cut([1, 2, 3, 4, 5, 6, 1], 5) == [[0, 1, 2], [3, 4], [5], [6]]
    assert cut([1, 1], 5) == [[0, 1]]
    assert cut([9, 9], 5) == [[0], [1]]
    assert cut([], 5) == []


def test_a_group_is_stopped_when_any_of_its_blocks_is_aborted() -> None:
    gone: set[int] = set()
    stopped = stop_of([0, 1, 2], gone.__contains__)
    assert not stopped()
    gone.add(1)
    assert stopped()
    assert not stop_of([0, 2], gone.__contains__)()


def blocks_of(memory: np.ndarray, count: int) -> list[BlockIO]:
    return [BlockIO(*keymath.as_key(n), Rows(memory, np.array([n], np.intp))) for n in range(count)]


def aborted_after(monkeypatch: pytest.MonkeyPatch, loop: str, at: int, count: int) -> set[int]:
    """Blocks that are aborted once so many steps were made; a round is one step."""
    gone: set[int] = set()
    made, real = 0, getattr(copy_loops, loop)

    def step(steps: copy_loops.Steps) -> None:
        nonlocal made
        real(steps)
        made += len(steps)
        if made == count:
            gone.add(at)

    monkeypatch.setattr(copy, "_ROUND_STEPS", 1)
    monkeypatch.setattr(copy_loops, loop, step)
    return gone


@pytest.mark.parametrize("aborted", [1, 4, 6])
def test_what_is_aborted_in_the_middle_of_a_group_takes_no_other_block_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aborted: int
) -> None:
    """Neither of a write nor of a read: the others are copied again, and each is told once."""
    engine = open_local(tmp_path / "s", 16, page_bytes=PAGE)
    memory = np.random.default_rng(1).integers(0, 256, (8, PAGE), np.uint8)
    told: list[tuple[int, Outcome]] = []

    def report(positions: Sequence[int], outcome: Outcome) -> None:
        told.extend((at, outcome) for at in positions)

    with monkeypatch.context() as patch:
        gone = aborted_after(patch, "gather_rows", aborted, 4)
        engine.write(blocks_of(memory, 8), report, gone.__contains__)
    others = [n for n in range(8) if n != aborted]
    assert sorted(told) == sorted(
        [(n, outcome) for n in others for outcome in (Outcome.COPIED, Outcome.STORED)]
        + [(aborted, Outcome.STOPPED)]
    )
    found = np.zeros_like(memory)
    asked = blocks_of(found, 8)
    told.clear()
    engine.read(asked, report)
    assert sorted(told) == sorted(
        [(n, Outcome.LOADED) for n in others] + [(aborted, Outcome.MISSING)]
    )
    assert np.array_equal(found[others], memory[others])
    told.clear()
    found[:] = 0
    gone_too = others[3]
    gone = aborted_after(monkeypatch, "scatter_rows", gone_too, 4)
    engine.read(asked, report, gone.__contains__)
    left = [n for n in others if n != gone_too]
    assert sorted(told) == sorted(
        [(n, Outcome.LOADED) for n in left]
        + [(aborted, Outcome.MISSING), (gone_too, Outcome.STOPPED)]
    )
    assert np.array_equal(found[left], memory[left])
    engine.close()


def test_a_group_whose_task_is_aborted_stops_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_local(tmp_path / "s", 16, page_bytes=PAGE)
    memory = np.ones((8, PAGE), np.uint8)
    batch = blocks_of(memory, 8)
    made = 0

    def aborted(_: int) -> bool:
        return made >= 3

    for loop, move in (("gather_rows", engine.write), ("scatter_rows", engine.read)):
        made = 0
        outcomes: list[Outcome] = []
        real = getattr(copy_loops, loop)

        def step(steps: copy_loops.Steps, real: Callable[..., None] = real) -> None:
            nonlocal made
            real(steps)
            made += len(steps)

        with monkeypatch.context() as patch:
            patch.setattr(copy, "_ROUND_STEPS", 1)
            patch.setattr(copy_loops, loop, step)
            move(batch, collect(outcomes), aborted)
        assert made == 3
        assert outcomes == [Outcome.STOPPED] * 8
        engine.write(batch, lambda *_: None)
    engine.close()


def test_what_was_begun_when_the_engine_is_closed_goes_to_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`close` between two blocks of one group: a descriptor is another file's then."""
    engine = open_local(tmp_path / "s", 16, page_bytes=PAGE)
    memory = np.full((8, PAGE), 0xAB, np.uint8)
    others: list[int] = []
    write = os.pwritev

    def close_after_the_second(descriptor: int, pieces: Any, at: int) -> int:
        calls.append(at)
        done = write(descriptor, pieces, at)
        if len(calls) == 2:
            engine.close()
            others.extend(os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT) for _ in range(16))
        return done

    calls: list[int] = []
    monkeypatch.setattr(os, "pwritev", close_after_the_second)
    with suppress(ServiceClosedError):
        engine.write(blocks_of(memory, 8), lambda *_: None)
    assert others
    assert len(calls) > 2
    assert os.path.getsize(tmp_path / "other") == 0
    for descriptor in others:
        os.close(descriptor)


def test_each_block_of_a_group_goes_through_the_mapping_when_it_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_local(tmp_path / "s", 8, page_bytes=PAGE)
    rig, ways = Rig(engine, PAGE), []
    was_put = writing_of(engine).was_put

    def note(start: int, length: int, sink: Any) -> None:
        ways.append(sink.by_calls)
        was_put(start, length, sink)

    monkeypatch.setattr(writing_of(engine), "was_put", note)
    monkeypatch.setattr(writing_of(engine), "_learn", lambda: None)
    for n in range(CALLS_BEFORE + 2):
        rig.write(*[Block(8 * n + at) for at in range(8)])
    assert ways == [True] * 8 * CALLS_BEFORE + [False] * 8 * 2
    engine.close()


def writing_of(engine: LocalStorageEngine) -> Any:
    return engine.file(0)._writes


@pytest.mark.parametrize("beside", [0, 1, 30])
def test_faults_of_others_in_a_group_say_nothing_of_those_taken_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: int
) -> None:
    """`beside`: blocks that fault anyhow, with a run of 16 slots that was taken out."""
    engine = open_local(tmp_path / "s", 64, page_bytes=PAGE, block_pages=16)
    writes = writing_of(engine)
    faults = iter([0, 16 * PAGE // 4096 + beside])  # a fault a page, and those of the others
    writes.begin(1.0)
    writes.was_put(0, 16, writes.sink(0, 16))
    monkeypatch.setattr("light_mem.engine.mapped_writes.DirtyPages._are_dirty", lambda *_: True)
    monkeypatch.setattr(
        "light_mem.engine.mapped_writes.resource.getrusage",
        lambda _: type("Usage", (), {"ru_minflt": next(faults)}),
    )
    writes.begin(1.5)
    sinks = {run: writes.sink(*run) for run in [(0, 16), *((20 + n, 1) for n in range(beside))]}
    assert not sinks[0, 16].by_calls
    writes.start()
    for run, sink in sinks.items():
        writes.was_put(*run, sink)
    # One block more is little beside sixteen.
    learned = beside <= 1
    assert writes.calls_before == (CALLS_BEFORE_FAULTS if learned else CALLS_BEFORE)
    engine.close()


def test_all_that_was_taken_out_is_learned_from_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_local(tmp_path / "s", 64, page_bytes=PAGE, block_pages=16)
    writes, runs = writing_of(engine), [(0, 16), (20, 16)]
    writes.begin(1.0)
    for run in runs:
        writes.was_put(*run, writes.sink(*run))
    monkeypatch.setattr("light_mem.engine.mapped_writes.DirtyPages._are_dirty", lambda *_: True)
    faults = iter([0, 16 * PAGE // 4096])  # one for two pages
    monkeypatch.setattr(
        "light_mem.engine.mapped_writes.resource.getrusage",
        lambda _: type("Usage", (), {"ru_minflt": next(faults)}),
    )
    writes.begin(1.5)
    sinks = [writes.sink(*run) for run in runs]
    writes.calls_before = CALLS_BEFORE_FAULTS
    writes.start()
    for run, sink in zip(runs, sinks, strict=True):
        writes.was_put(*run, sink)
    assert writes.calls_before == CALLS_BEFORE
    engine.close()


def test_a_task_that_is_aborted_stops_the_groups_that_have_a_block_of_it() -> None:
    aborted: set[int] = set()

    class Table:
        def aborted(self, row: int) -> bool:
            return row in aborted

    stop = Aborted(cast("TaskTable", Table()), [5, 5, 7, 9])
    stopped = [stop_of(group, stop) for group in ([0, 1], [1, 2], [2, 3])]
    assert [each() for each in stopped] == [False, False, False]
    aborted.add(7)
    assert [each() for each in stopped] == [False, True, True]
    assert [stop(at) for at in range(4)] == [False, False, True, False]


def test_what_failed_is_not_learned_from(tmp_path: Path) -> None:
    engine = open_local(tmp_path / "s", 64, page_bytes=PAGE)
    writes = writing_of(engine)
    writes.begin(1.0)
    writes.was_put(0, 1, writes.sink(0, 1))
    writes.begin(1.1)
    assert not writes.sink(0, 1).by_calls  # ... and then the copy failed
    assert writes._taken_out == PAGE
    writes.begin(1.2)
    assert writes._taken_out == 0
    engine.close()


def test_a_closed_engine_has_let_go_of_the_memory(tmp_path: Path) -> None:
    engine = open_local(tmp_path / "s", 8, page_bytes=PAGE)
    memory = np.zeros((4, PAGE), np.uint8)
    outcomes: list[Outcome] = []
    engine.write(blocks_of(memory, 4), lambda *_: None)
    engine.read(blocks_of(memory, 4), collect(outcomes))
    assert outcomes == [Outcome.LOADED] * 4
    engine.close()
    gone = weakref.ref(memory)
    del memory
    assert gone() is None


def test_neither_does_a_write_keep_it_that_failed_past_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_local(tmp_path / "s", 8, page_bytes=PAGE).close()
    engine = LocalStorageEngine(tmp_path / "s", kind="worker", page_cache="drop")
    memory = np.zeros((4, PAGE), np.uint8)
    outcomes: list[Outcome] = []

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "no device")

    gc.disable()  # which would break a cycle sooner or later
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", fail)
            engine.write(blocks_of(memory, 4), collect(outcomes))
        assert outcomes[-1] is Outcome.FAILED
        engine.close()
        gone = weakref.ref(memory)
        del memory
        assert gone() is None
    finally:
        gc.enable()


def test_blocks_of_several_shards_wait_for_no_shard_but_their_own(tmp_path: Path) -> None:
    """What was copied is told of before another shard is opened, which may be waited for."""
    engine = open_local(tmp_path / "s", 64, page_bytes=PAGE, shards=4)
    memory = np.zeros((24, PAGE), np.uint8)
    batch = blocks_of(memory, 24)
    engine.write(batch, lambda *_: None)
    found = [engine.lookup.find_one(*block[:2]) // engine.geometry.slots for block in batch]
    engine.close()
    engine = LocalStorageEngine(tmp_path / "s", kind="worker")
    engine.file(0)
    told: list[int] = []
    opened: dict[int, int] = {}
    open_file = engine._open.file

    def note(shard: int) -> Any:
        opened[shard] = len(told)
        return open_file(shard)

    engine._reader._engine.file = note  # type: ignore[method-assign]
    engine._reader._device.begin = lambda *_, **__: {}  # type: ignore[method-assign]
    engine.read(batch, lambda positions, _: told.extend(positions))
    assert sorted(told) == list(range(24))
    expected, count = {}, found.count(0)
    for shard in opened:
        expected[shard] = count
        count += found.count(shard)
    assert opened == expected
    assert len(opened) == 3
    engine.close()


def test_where_a_device_is_waited_for_groups_are_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that wait for nothing first, each group's in turn, and the others one by one."""
    monkeypatch.setattr(reading, "ROUND_BYTES", 4 * PAGE)
    engine = open_local(tmp_path / "s", 16, page_bytes=PAGE)
    memory = np.random.default_rng(1).integers(0, 256, (8, PAGE), np.uint8)
    engine.write(blocks_of(memory, 8), lambda *_: None)
    order = sorted(range(8), key=lambda n: engine.lookup.find_one(*keymath.as_key(n)))
    cold = {order[1], order[2], order[6]}

    def held(addresses: list[int]) -> list[bool]:
        assert len(addresses) == 8
        return [n not in cold for n in order]

    monkeypatch.setattr("light_mem.engine.page_cache.hold_each", held)
    found, told = np.zeros_like(memory), []
    engine.read(blocks_of(found, 8), lambda positions, _: told.append(list(positions)))
    assert np.array_equal(found, memory)
    assert told == [
        [order[0], order[3]],
        [order[1]],
        [order[2]],
        [order[4], order[5], order[7]],
        [order[6]],
    ]
    engine.close()


def test_past_the_page_cache_each_block_is_a_group(tmp_path: Path) -> None:
    make = open_local(tmp_path / "s", 16, page_bytes=PAGE)
    make.close()
    engine = LocalStorageEngine(tmp_path / "s", kind="worker", page_cache="drop")
    memory, told = np.zeros((4, PAGE), np.uint8), []
    engine.write(blocks_of(memory, 4), lambda at, outcome: told.append((list(at), outcome)))
    assert [at for at, outcome in told if outcome is Outcome.COPIED] == [[0], [1], [2], [3]]
    engine.close()
    assert groups.GROUP_BYTES > 4 * PAGE
