"""Warnings at a bounded rate, and the line at start."""

from __future__ import annotations

import logging
import platform
import threading
from pathlib import Path

import numpy
import pytest
import torch

import light_mem
from light_mem import allocate_kvcache
from light_mem.engine.base import Outcome
from light_mem.logs import Limited
from light_mem.maintenance import inspect
from tests.maintenance_helpers import BLOCKS, flip, make_store, opened
from tests.service_rig import rig


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_so_many_of_a_kind_in_an_interval(caplog: pytest.LogCaptureFixture, clock: Clock) -> None:
    limited = Limited(each=3, seconds=10, clock=clock)
    for n in range(8):
        limited.warning("block %d is bad", n)
    limited.warning("something else")
    assert caplog.messages == [
        "block 0 is bad", "block 1 is bad", "block 2 is bad", "something else"
    ]  # fmt: skip
    clock.now += 9.9
    limited.warning("block %d is bad", 8)
    assert len(caplog.messages) == 4
    clock.now += 0.2
    for n in range(9, 20):
        limited.warning("block %d is bad", n)
    assert caplog.messages[4:] == [
        "block 9 is bad (suppressed 6 similar)", "block 10 is bad", "block 11 is bad"
    ]  # fmt: skip


def test_what_was_left_out_is_told_in_the_end(
    caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    limited = Limited(each=1, seconds=10, clock=clock)
    for n in range(5):
        limited.warning("block %d is bad", n)
    limited.flush()
    limited.flush()
    assert caplog.messages == ["block 0 is bad", "suppressed 4 similar to: block 4 is bad"]


def test_a_handler_may_flush_while_its_thread_warns(caplog: pytest.LogCaptureFixture) -> None:
    def clock() -> float:  # asked in the middle of a warning
        limited.flush()
        return 1000.0

    limited = Limited(each=1, clock=clock)
    for n in range(3):
        limited.warning("block %d is bad", n)
    assert caplog.messages == ["block 0 is bad", "suppressed 1 similar to: block 1 is bad"]


def test_the_line_names_the_place_that_warned(
    caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    Limited(clock=clock).warning("here")
    assert caplog.records[0].funcName == "test_the_line_names_the_place_that_warned"
    assert caplog.records[0].name == "light_mem"


def test_threads_together_say_no_more_and_lose_none(
    caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    limited = Limited(each=10, seconds=10, clock=clock)
    start = threading.Barrier(8)

    def warn() -> None:
        start.wait()
        for _ in range(500):
            limited.warning("bad")

    threads = [threading.Thread(target=warn) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert caplog.messages == ["bad"] * 10
    clock.now += 11
    limited.warning("bad")
    assert caplog.messages[-1] == f"bad (suppressed {8 * 500 - 10} similar)"


def test_a_store_full_of_damage_does_not_fill_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(tmp_path / "store")
    for block in BLOCKS:
        flip(store, block)
    reader = opened(store)
    assert reader.read(*BLOCKS) == [Outcome.DAMAGED] * len(BLOCKS)
    said = [message for message in caplog.messages if "is damaged" in message]
    assert len(said) == 5
    reader.engine.close()
    assert [m for m in caplog.messages if m.startswith(f"suppressed {len(BLOCKS) - 5} similar")]


def test_the_line_at_start_has_what_a_bug_report_needs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "light_mem")
    with rig(tmp_path, run=False, workers=3, verify=False, shards=2, durability="flush") as r:
        lines = [message for message in caplog.messages if message.startswith("LightMem ")]
        assert len(lines) == 1
        [line] = lines
        assert "\n" not in line
        for part in (
            light_mem.__version__, str(tmp_path / "store"), "format 2", "2 shards of 128 slots",
            "32 pages of 4096 bytes", "64 pages a block", "3 workers on any CPU",
            "durability flush", "page_cache keep", "verify False", "time_to_live None",
            "max_blocks 65536", "memfd", f"Python {platform.python_version()}",
            f"numpy {numpy.__version__}", f"torch {torch.__version__}", platform.release(),
        ):  # fmt: skip
            assert part in line
        assert f"id {inspect(tmp_path / 'store').store_id}" in line
        assert r.service.worker_pids == []


def test_without_info_the_line_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise AssertionError("the line was made")

    monkeypatch.setattr("light_mem.local_service.start_line", refuse)
    logging.getLogger("light_mem").setLevel(logging.WARNING)
    try:
        kv = allocate_kvcache(2, 4096)
        light_mem.LocalCacheService(tmp_path / "s", 1 << 20, 1, kv, 1).close()
    finally:
        logging.getLogger("light_mem").setLevel(logging.NOTSET)
