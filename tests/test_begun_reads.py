"""Reads that are begun before the last one has ended: the device has them, each is told once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from light_mem.engine import read_ahead
from light_mem.engine.base import Outcome
from light_mem.engine.device_threads import DeviceThreads
from light_mem.engine.read_ahead import Span
from tests.begun import PAGE, Begun, Gate, begin_read
from tests.cached import forget_all
from tests.cold_rig import DATA, cache_that_forgets, make, opened
from tests.engine_helpers import Block

__all__ = ["cache_that_forgets"]  # fixtures


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
