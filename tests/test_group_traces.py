"""What a group of blocks leaves behind: the cost of its writes is learned, its memory let go of."""

from __future__ import annotations

import errno
import gc
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from light_mem.engine.base import Outcome
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.mapped_writes import CALLS_BEFORE, CALLS_BEFORE_FAULTS, LEAST_BYTES
from light_mem.engine.settings import EngineSettings
from tests.engine_helpers import Block, Rig, blocks_of, collect, open_local

PAGE = LEAST_BYTES


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
    engine = LocalStorageEngine(
        tmp_path / "s", kind="worker", settings=EngineSettings(page_cache="drop")
    )
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
