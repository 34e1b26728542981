"""An idle worker maps what is in the KV memory, and makes nothing that is not."""

from __future__ import annotations

import mmap
import os
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from light_mem.engine import map_ahead, page_cache
from light_mem.engine.map_ahead import MapAhead
from light_mem.engine.queue import TaskQueue
from light_mem.engine.worker import Worker
from tests.conftest import wait_until
from tests.service_rig import rig

PAGE = mmap.PAGESIZE
MIB = 1 << 20
NBYTES = 16 * MIB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="of Linux's page faults")


def mapped(descriptor: int, begin: int = 0) -> npt.NDArray[np.uint8]:
    return np.frombuffer(mmap.mmap(descriptor, NBYTES), np.uint8)[begin:].reshape(1, -1)


def faults_of_stores(memory: npt.NDArray[np.uint8]) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory[:, ::PAGE] = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.parametrize("begin", [0, 5 * PAGE + 100])
def test_what_is_there_is_mapped_for_stores_too(begin: int) -> None:
    descriptor = os.memfd_create("test")
    try:
        for _ in range(NBYTES // MIB):
            os.write(descriptor, bytes(MIB))
        ahead = MapAhead(memory := mapped(descriptor, begin))
        steps = 0
        while ahead.step():
            steps += 1
        assert NBYTES // (2 * MIB) <= steps <= NBYTES // (2 * MIB) + 1
        assert faults_of_stores(memory) < 20
        assert faults_of_stores(mapped(descriptor, begin)) >= NBYTES // PAGE - 20  # without
        assert not ahead.step()
    finally:
        os.close(descriptor)


def test_memory_that_nobody_has_used_is_left_alone() -> None:
    descriptor = os.memfd_create("test")
    try:
        os.ftruncate(descriptor, NBYTES)
        os.pwrite(descriptor, bytes(6 * MIB), 2 * MIB)  # pieces need not begin there
        os.pwrite(descriptor, bytes(PAGE), 12 * MIB)  # a piece with holes
        before = os.fstat(descriptor).st_blocks
        ahead = MapAhead(memory := mapped(descriptor))
        while ahead.step():
            pass
        assert os.fstat(descriptor).st_blocks == before
        assert faults_of_stores(memory[:, 4 * MIB : 6 * MIB]) < 10
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("mincore", [None, lambda *_: -1])  # none, and a filter of system calls
def test_where_nothing_tells_what_is_there_nothing_is_mapped(
    monkeypatch: pytest.MonkeyPatch, mincore: Any
) -> None:
    monkeypatch.setattr(page_cache, "_mincore", mincore)
    descriptor = os.memfd_create("test")
    try:
        os.ftruncate(descriptor, NBYTES)
        ahead = MapAhead(mapped(descriptor))
        while ahead.step():
            pass
        assert os.fstat(descriptor).st_blocks == 0
    finally:
        os.close(descriptor)


def test_no_more_than_the_limit_is_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_ahead, "MOST_BYTES", 4 * MIB)
    descriptor = os.memfd_create("test")
    try:
        os.write(descriptor, bytes(NBYTES))
        ahead = MapAhead(memory := mapped(descriptor))
        while ahead.step():
            pass
        assert faults_of_stores(memory[:, : 4 * MIB]) < 10
        assert faults_of_stores(memory[:, 4 * MIB :]) >= (NBYTES - 4 * MIB) // PAGE - 40
    finally:
        os.close(descriptor)


def test_work_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    class Engine:
        has_later = has_begun_reads = has_begun_writes = False

        def finish_reads(self) -> bool:
            return False

        finish_writes = finish_reads

        def rest(self) -> bool:
            steps.append("rest")
            return steps.count("rest") < 2

    class Ahead:
        def __init__(self, memory: object) -> None:
            pass

        def step(self) -> bool:
            steps.append("map")
            return steps.count("map") < 3

    def claim(self: TaskQueue, worker: int, timeout: float | None) -> list[int]:
        steps.append("claim")
        return []

    with rig(tmp_path, run=False) as r:
        table = r.service._session.table

        def wait(*_: Any) -> None:
            steps.append("wait")
            table.header["shutdown"] = 1

        monkeypatch.setattr("light_mem.engine.worker.MapAhead", Ahead)
        monkeypatch.setattr(TaskQueue, "claim", claim)
        monkeypatch.setattr(table.futex, "wait", wait)
        engine: Any = Engine()
        Worker(1, table, r.service._session.queue, np.zeros((1, 1), np.uint8), engine).run()
    assert steps == [
        *("claim", "rest"),
        *("claim", "rest", "map"),
        *("claim", "rest", "map"),
        *("claim", "rest", "map", "wait"),
        "claim",
    ]


def test_the_workers_of_a_service_do_so(tmp_path: Path) -> None:
    with rig(tmp_path, pages=512, page_bytes=64 << 10, slots=64, workers=2, run=False) as r:
        r.kv.fill_(1)
        r.service.run()
        nbytes = r.kv.numel()

        def mapped_bytes(pid: int) -> int:
            status = Path(f"/proc/{pid}/status").read_text()
            return int(status.split("RssShmem:")[1].split()[0]) * 1024

        wait_until(lambda: all(mapped_bytes(pid) >= nbytes for pid in r.service.worker_pids))
