"""Blocks that are copied together: which they are, and what of them is told and aborted."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest

from light_mem.engine import copy, copy_loops, groups, reading
from light_mem.engine.base import Outcome
from light_mem.engine.groups import stop_of
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.mapped_writes import LEAST_BYTES
from light_mem.engine.settings import EngineSettings
from light_mem.engine.worker import Aborted
from light_mem.errors import ServiceClosedError
from light_mem.index import keys as keymath
from tests.engine_helpers import blocks_of, collect, open_local

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
    engine = LocalStorageEngine(
        tmp_path / "s", kind="worker", settings=EngineSettings(page_cache="drop")
    )
    memory, told = np.zeros((4, PAGE), np.uint8), []
    engine.write(blocks_of(memory, 4), lambda at, outcome: told.append((list(at), outcome)))
    assert [at for at, outcome in told if outcome is Outcome.COPIED] == [[0], [1], [2], [3]]
    engine.close()
    assert groups.GROUP_BYTES > 4 * PAGE
