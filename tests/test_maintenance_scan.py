"""The check of small blocks by processes: what they find, and what becomes of them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import xxhash

from light_mem.index.recovery import crc_fits, record_crcs
from light_mem.maintenance import scan_process, verify
from light_mem.maintenance.data_file import DataFile
from light_mem.maintenance.scan_process import ScanProcess
from light_mem.maintenance.scanning import BATCH_BYTES, Batch, Scanner, Stretch
from tests.children import ROOT, child, line
from tests.conftest import wait_until
from tests.engine_helpers import Block
from tests.maintenance_helpers import (
    BLOCKS,
    PAGE,
    Command,
    flip,
    index_of,
    key_of,
    make_store,
    opened,
    records_of,
    reseal,
)

MANY = [Block(5000 + n) for n in range(1200)]  # more than are read at once
SPOILT = [MANY[0], MANY[495], MANY[496], MANY[1199]]


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[ScanProcess]:
    """Small stores are read by processes too; these are they."""
    started: list[ScanProcess] = []
    start = ScanProcess.__init__

    def noted(self: ScanProcess) -> None:
        start(self)
        started.append(self)

    monkeypatch.setattr("light_mem.maintenance.data.PROCESS_BLOCKS", 0)
    monkeypatch.setattr(ScanProcess, "__init__", noted)
    return started


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A store of many blocks of one page, four of them damaged."""
    store = make_store(tmp_path / "store", MANY, slots=len(MANY), shards=1)
    for block in SPOILT:
        flip(store, block, PAGE - 1)
    return store


def damaged(store: Path, jobs: int = 2) -> set[str]:
    report = verify(store, jobs=jobs)
    assert report.blocks == len(MANY)
    assert report.nbytes == len(MANY) * PAGE
    return {block.key for block in report.damaged}


# --- what is found --------------------------------------------------------------------------------


def test_processes_find_every_damaged_block_and_no_other(
    many: Path, processes: list[ScanProcess]
) -> None:
    assert damaged(many) == {key_of(block) for block in SPOILT}
    assert processes


def test_blocks_of_several_sizes_with_gaps_between_them(
    tmp_path: Path, processes: list[ScanProcess], command: Command
) -> None:
    store = tmp_path / "store"
    rig = opened(store)
    rig.write(*BLOCKS)
    rig.delete(*BLOCKS[1::5])
    rig.engine.close()
    assert verify(store, jobs=2).clean
    for block in (BLOCKS[0], BLOCKS[7]):
        flip(store, block)
    code, report = command.json("verify", store, "--jobs", 2)
    assert code == 1
    assert processes
    assert {d["key"] for d in report["damaged"]} == {key_of(BLOCKS[0]), key_of(BLOCKS[7])}


def test_a_file_cut_short_costs_the_blocks_behind_the_cut(
    many: Path, processes: list[ScanProcess]
) -> None:
    os.truncate(many / "shard-000.data", 4096 + 600 * PAGE + 10)
    report = verify(many, jobs=2)
    assert processes
    behind = [d for d in report.damaged if "the file ends" in d.problem]
    assert len(behind) == len(MANY) - 600
    assert {d.slot for d in behind} == set(range(600, len(MANY)))


def test_one_job_reads_without_a_process(many: Path, processes: list[ScanProcess]) -> None:
    assert damaged(many, jobs=1) == {key_of(block) for block in SPOILT}
    assert not processes


def test_few_blocks_are_not_worth_a_process(
    many: Path, processes: list[ScanProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("light_mem.maintenance.data.PROCESS_BLOCKS", len(MANY) + 1)
    assert damaged(many) == {key_of(block) for block in SPOILT}
    assert not processes


def test_a_block_replaced_while_it_is_read_is_no_damage(
    tmp_path: Path, processes: list[ScanProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = MANY[:64]
    store = make_store(tmp_path / "store", blocks, slots=len(blocks), shards=1)
    rig = opened(store, slots=len(blocks), shards=1)
    scan = ScanProcess.scan

    def after_a_change(self: ScanProcess, *arguments: object) -> list[int] | None:
        rig.delete(*blocks[10:14])
        rig.write(*[Block(9000 + n) for n in range(4)])
        return scan(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ScanProcess, "scan", after_a_change)
    report = verify(store, jobs=2)
    rig.engine.close()
    assert processes
    assert report.clean
    assert report.changed == 4
    assert report.blocks == len(blocks) - 4


@pytest.mark.parametrize("size", [1, 7, 8, 255, 4096, BATCH_BYTES, BATCH_BYTES + 1])
def test_the_scanner_computes_the_checksum_of_key_and_bytes(tmp_path: Path, size: int) -> None:
    count = 5 if size > 4096 else 1500
    rng = np.random.default_rng(size)
    keys = rng.integers(0, 2**64, (count, 2), np.uint64)
    data = rng.integers(0, 256, (count, size), np.uint8)
    sums = [
        xxhash.xxh3_64_intdigest(key.tobytes() + row.tobytes())
        for key, row in zip(keys, data, strict=True)
    ]
    data[2, size - 1] ^= 1
    (tmp_path / "file").write_bytes(b"front" + data.tobytes())
    batch = Batch(
        keys[:, 0].tobytes(),
        keys[:, 1].tobytes(),
        np.array(sums, ">u8").tobytes(),
        np.array(Stretch(0, count, 5, size), np.int64).tobytes(),
    )
    file, told = DataFile(tmp_path / "file"), []
    try:
        assert Scanner().scan(file, batch, told.append, lambda: False) == [2]
        assert sum(told) == count * size
        told.clear()
        assert Scanner().scan(file, batch, told.append, lambda: True) == []
        assert not told
    finally:
        file.close()


def test_crcs_of_many_records_at_once_are_those_of_each(many: Path) -> None:
    records = np.array(records_of(many, 0))
    wrong = [0, 1023, 1024, len(records) - 1]
    records["crc"][wrong] ^= 1
    records["low"][700] += 1
    expected = (records["crc"] == record_crcs(records)).tolist()
    assert crc_fits(records).tolist() == expected
    assert expected.count(False) == 5
    reseal(records, 700)
    assert crc_fits(records)[700]
    assert crc_fits(records[:0]).tolist() == []


# --- what becomes of the processes ----------------------------------------------------------------


def test_a_process_that_was_killed_loses_no_unit(
    many: Path,
    processes: list[ScanProcess],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    scan = ScanProcess.scan

    def dead(self: ScanProcess, *arguments: object) -> list[int] | None:
        self.kill()
        wait_until(lambda: psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE)
        return scan(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ScanProcess, "scan", dead)
    assert damaged(many) == {key_of(block) for block in SPOILT}
    assert processes
    assert "died; a thread goes on" in caplog.text


def test_a_process_killed_with_a_unit_in_hand_loses_it_not(
    many: Path, processes: list[ScanProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("light_mem.maintenance.data.UNIT_BLOCKS", 300)
    scan = ScanProcess.scan
    results: list[list[int] | None] = []

    def stopped(self: ScanProcess, *arguments: object) -> list[int] | None:
        os.kill(self.pid, signal.SIGSTOP)  # it cannot answer before it is killed
        killer = threading.Thread(target=self.kill)
        killer.start()
        results.append(scan(self, *arguments))  # type: ignore[arg-type]
        killer.join()
        return results[-1]

    monkeypatch.setattr(ScanProcess, "scan", stopped)
    told: list[tuple[int, int]] = []
    report = verify(many, jobs=2, progress=lambda done, total: told.append((done, total)))
    assert {d.key for d in report.damaged} == {key_of(block) for block in SPOILT}
    assert told[-1] == (report.nbytes, report.nbytes)
    assert results
    assert set(results) == {None}


def test_where_no_process_can_be_started_threads_read(
    many: Path, processes: list[ScanProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: object, **options: object) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(scan_process.subprocess, "Popen", failing)
    assert damaged(many) == {key_of(block) for block in SPOILT}
    assert not processes


def test_a_process_that_cannot_run_its_program_costs_nothing(
    many: Path, processes: list[ScanProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_process.child_start, "search_path", list)  # it finds no module
    assert damaged(many) == {key_of(block) for block in SPOILT}
    assert processes


def test_an_interruption_ends_the_processes_at_once(
    many: Path, processes: list[ScanProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = ScanProcess.scan

    def stopped(self: ScanProcess, *arguments: object) -> list[int] | None:
        os.kill(self.pid, signal.SIGSTOP)  # it would never end by itself
        return scan(self, *arguments)  # type: ignore[arg-type]

    def interrupt(done: int, total: int) -> None:
        if processes:
            raise KeyboardInterrupt

    monkeypatch.setattr(ScanProcess, "scan", stopped)
    with pytest.raises(KeyboardInterrupt):
        verify(many, jobs=2, progress=interrupt)
    assert processes
    assert not any(psutil.pid_exists(process.pid) for process in processes)


def test_an_error_between_two_shards_ends_them_too(
    tmp_path: Path, processes: list[ScanProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "store")
    index_of(store).control["dirty"][1] = 1

    def refuse(*arguments: object) -> None:
        wait_until(lambda: processes, what="a process for the first shard")
        raise TimeoutError("held")

    monkeypatch.setattr("light_mem.maintenance.store.Store.held", refuse)
    with pytest.raises(TimeoutError):
        verify(store, jobs=2)
    assert not any(psutil.pid_exists(process.pid) for process in processes)


def test_the_processes_die_with_a_parent_that_is_killed(many: Path) -> None:
    code = (
        "import psutil\n"
        "from light_mem.maintenance import data, verify\n"
        "data.PROCESS_BLOCKS = 0\n"
        "def told(done, total):\n"
        "    if done == total:\n"
        "        say(' '.join(str(p.pid) for p in psutil.Process().children()))\n"
        "        sys.stdin.read()\n"
        "verify(path, jobs=2, progress=told)\n"
    )
    with child(code, many) as process:
        pids = [int(pid) for pid in line(process).split()]
        assert pids
        assert all(psutil.pid_exists(pid) for pid in pids)
        process.kill()
        process.wait()
        wait_until(lambda: not any(map(_runs, pids)), what="the ends of the processes")


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_process_starts_without_what_it_does_not_need() -> None:
    code = (
        "import sys, light_mem.maintenance.scan_child\n"
        "sys.exit(' '.join({'numpy', 'torch', 'rich', 'psutil', 'subprocess'} & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == ""
