"""`page_cache="drop"`: what was moved leaves the page cache, and the bytes are right."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from light_mem import State
from light_mem.engine import page_cache, read_ahead
from light_mem.engine.base import BlockIO, Outcome
from light_mem.engine.device_threads import DeviceThreads
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.places import Regions, Rows
from light_mem.engine.read_ahead import Span
from light_mem.engine.settings import EngineSettings
from light_mem.index import keys as keymath
from tests.conftest import wait_until
from tests.dropping_rig import SHARD, cache_that_drops, in_cache, open_dropping
from tests.engine_helpers import COPIED_AND_STORED, Block, Rig
from tests.service_rig import WAIT, rig

__all__ = ["cache_that_drops"]  # fixtures

MIB = 1 << 20
BLOCK = 64  # pages


@pytest.mark.parametrize(("policy", "durability"), [("drop", "kernel"), ("drop", "flush")])
def test_written_blocks_leave_the_page_cache(tmp_path: Path, policy: str, durability: str) -> None:
    store = tmp_path / "store"
    with rig(tmp_path, pages=4 * BLOCK, slots=8 * BLOCK, workers=2, page_cache=policy,
             durability=durability) as r:  # fmt: skip
        hashes = [f"block {n}" for n in range(4 * BLOCK)]
        r.write(hashes, range(4 * BLOCK))
        wait_until(lambda: in_cache(store) == 0)
        assert r.read(hashes, range(4 * BLOCK)).state() == [State.Finished] * 4 * BLOCK
        assert all(r.holds(key, [page]) for page, key in enumerate(hashes))
        assert in_cache(store) == 0
        assert not r.service.check().damaged


def test_by_default_blocks_stay_in_the_page_cache(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with rig(tmp_path, pages=4 * BLOCK, slots=8 * BLOCK, workers=2) as r:
        hashes = [f"block {n}" for n in range(4 * BLOCK)]
        r.write(hashes, range(4 * BLOCK))
        r.read(hashes, range(4 * BLOCK))
        assert in_cache(store) == 4 * BLOCK


def test_blocks_of_a_service_that_keeps_leave_the_cache_when_one_that_drops_reads_them(
    tmp_path: Path,
) -> None:
    store = tmp_path / "store"
    hashes = [f"block {n}" for n in range(BLOCK)]
    with rig(tmp_path, pages=BLOCK, slots=2 * BLOCK) as r:
        r.write(hashes, range(BLOCK))
    with (store / SHARD).open("rb") as file:
        os.fsync(file.fileno())
    assert in_cache(store) == BLOCK
    with rig(tmp_path, pages=BLOCK, slots=2 * BLOCK, page_cache="drop") as r:
        assert r.read(hashes, range(BLOCK)).state() == [State.Finished] * BLOCK
        assert all(r.holds(key, [page]) for page, key in enumerate(hashes))
    assert in_cache(store) == 0


@pytest.mark.parametrize("page_bytes", [64, 3840, 4096, 61440, 3 * MIB // 2 + 100])
@pytest.mark.parametrize("verify", [True, False])
def test_pages_of_any_size_come_back_right(tmp_path: Path, page_bytes: int, verify: bool) -> None:
    r = open_dropping(tmp_path / "store", 24, page_bytes, verify=verify)
    blocks = [Block(n, 1 + n % 4) for n in range(8)]
    for _ in range(2):  # 20 of 24 slots: the second time most are evicted and written over
        assert r.write(*blocks) == [COPIED_AND_STORED] * len(blocks)
        assert r.read(*blocks) == [Outcome.LOADED] * len(blocks)
        assert r.read(*reversed(blocks)) == [Outcome.LOADED] * len(blocks)
        blocks = [Block(block.key + 100, block.pages) for block in blocks]
    r.engine.close()
    # A block's last page of the kernel may be its neighbour's first, and that one may be older.
    assert in_cache(tmp_path / "store") <= len(blocks) * 2 * bool(page_bytes % mmap.PAGESIZE)


def test_a_block_in_several_runs_comes_back_right(tmp_path: Path) -> None:
    r = open_dropping(tmp_path / "store", 16, 3840)
    r.write(*[Block(n) for n in range(16)])
    r.delete(*[Block(n) for n in range(0, 12, 2)])  # holes of one slot
    large = Block(99, 6)
    assert r.write(large) == [COPIED_AND_STORED]
    assert r.read(large, Block(1), Block(15)) == [Outcome.LOADED] * 3
    r.engine.close()


def test_regions_come_back_right(tmp_path: Path) -> None:
    r = open_dropping(tmp_path / "store", 16, 64 << 10)
    rng = np.random.default_rng(0)
    memory = rng.integers(0, 256, 2 * MIB, np.uint8)
    wanted = memory.copy()
    place = Regions(memory, [(1000, 700_001), (900_000, 77), (1_000_000, 200_000)])
    block = BlockIO(*keymath.as_key("regions"), place)
    outcomes: list[Outcome] = []
    r.engine.write([block], lambda _, outcome: outcomes.append(outcome))
    for offset, length in place.regions:
        memory[offset : offset + length] = 0
    r.engine.read([block], lambda _, outcome: outcomes.append(outcome))
    assert outcomes == [*COPIED_AND_STORED, Outcome.LOADED]
    assert np.array_equal(memory, wanted)
    r.engine.close()


def test_a_read_past_the_page_cache_stops_between_two_pieces(tmp_path: Path) -> None:
    r = open_dropping(tmp_path / "store", 8, MIB)
    r.write(Block(1, 4))
    asked = 0

    def stop(_: int) -> bool:
        nonlocal asked
        asked += 1
        return asked == 3

    assert r.read(Block(1, 4), stop=stop) == [Outcome.STOPPED]
    assert asked == 3
    assert r.read(Block(1, 4)) == [Outcome.LOADED]  # what had been read ahead is not mistaken
    r.engine.close()


def test_the_blocks_of_a_batch_are_read_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = open_dropping(tmp_path / "store", 48, 4096)
    r.write(*[Block(n) for n in range(48)])
    submitted: list[Span] = []
    submit = DeviceThreads.submit

    def note(self: DeviceThreads, call: Any, span: Span, *rest: Any) -> Any:
        submitted.append(span)
        return submit(self, call, span, *rest)

    monkeypatch.setattr(DeviceThreads, "submit", note)
    so_far: list[int] = []
    memory = np.zeros((24, 4096), np.uint8)
    # Every second one: none follows the one before it.
    batch = [BlockIO(*keymath.as_key(2 * n), Rows(memory, np.array([n]))) for n in range(24)]
    r.engine.read(batch, lambda at, outcome: so_far.append(len(submitted)))
    assert so_far == [min(24, read_ahead.DEPTH + 1 + n) for n in range(24)]
    r.engine.close()


def test_blocks_that_follow_each_other_come_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = open_dropping(tmp_path / "store", 600, 4096)
    blocks = [Block(n, 2) for n in range(300)]
    r.write(*blocks)
    read, calls = os.preadv, 0

    def preadv(fd: int, buffers: Any, at: int, flags: int = 0) -> int:
        nonlocal calls
        calls += 1
        return read(fd, buffers, at, flags)

    r.engine.file(0).past_cache((0, 1), 1)  # asks the file system for O_DIRECT, by reading
    monkeypatch.setattr(read_ahead.os, "preadv", preadv)
    assert r.read(*blocks[::-1]) == [Outcome.LOADED] * 300  # in whatever order they are asked for
    assert calls == -(-600 * 4096 // read_ahead.PIECE_BYTES)
    r.engine.close()


def test_without_memory_to_read_into_blocks_fail_and_are_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = open_dropping(tmp_path / "store", 8, 4096)
    r.write(Block(1, 2), Block(2, 2))

    def refuse(count: int, nbytes: int) -> list[np.ndarray]:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with monkeypatch.context() as m:
        m.setattr(read_ahead, "private_buffers", refuse)
        assert r.read(Block(1, 2), Block(2, 2)) == [Outcome.FAILED] * 2
    assert r.read(Block(1, 2), Block(2, 2)) == [Outcome.LOADED] * 2
    r.engine.close()


def test_damage_is_found(tmp_path: Path) -> None:
    r = open_dropping(tmp_path / "store", 8, 4096)
    r.write(Block(1, 2), Block(2, 2))
    r.engine.rest()
    with (tmp_path / "store" / SHARD).open("r+b") as file:
        file.seek(4096 + 100)
        [byte] = file.read(1)
        file.seek(4096 + 100)
        file.write(bytes([byte ^ 1]))
    assert sorted(r.read(Block(1, 2), Block(2, 2))) == [Outcome.LOADED, Outcome.DAMAGED]
    r.engine.close()


def test_a_kill_while_pages_wait_to_be_dropped_costs_nothing(tmp_path: Path) -> None:
    with rig(tmp_path, pages=128, page_bytes=64 << 10, slots=256, workers=2,
             page_cache="drop") as r:  # fmt: skip
        hashes = [f"block {n}" for n in range(128)]
        for page, key in enumerate(hashes):
            r.fill(key, [page])
        first = r.service.worker_pids
        task = r.service.create("write", hashes, range(128))
        wait_until(lambda: task.count(State.Finished) > 20)
        for pid in first:
            os.kill(pid, signal.SIGKILL)
        assert task.wait(WAIT)
        finished = [n for n, state in enumerate(task.state()) if state is State.Finished]
        assert len(finished) >= 20
        wait_until(lambda: len(set(r.service.worker_pids) - set(first)) == 2)
        read = r.read([hashes[n] for n in finished], finished)
        assert read.state() == [State.Finished] * len(finished)
        assert all(r.holds(hashes[n], [n]) for n in finished)
        assert not r.service.check().damaged


def test_a_write_out_that_fails_is_logged_and_the_blocks_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    r = open_dropping(tmp_path / "store", 8, 4096)

    def fail(*_: int) -> None:
        raise OSError(errno.EIO, "no disk")

    monkeypatch.setattr(page_cache, "finish_write_out", fail)
    with caplog.at_level(logging.WARNING, "light_mem"):
        assert r.write(Block(1), Block(2)) == [COPIED_AND_STORED] * 2
        assert r.engine.rest()
        r.engine.close()
    assert "writing out failed" in caplog.text
    monkeypatch.undo()
    r = Rig(
        LocalStorageEngine(
            tmp_path / "store", kind="worker", settings=EngineSettings(page_cache="drop")
        ),
        4096,
    )
    assert r.read(Block(1), Block(2)) == [Outcome.LOADED] * 2
    r.engine.close()


def test_a_system_that_cannot_drop_keeps_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(page_cache, "_sync_file_range", None)
    with caplog.at_level(logging.WARNING, "light_mem"):
        assert page_cache.choose("drop") == "keep"
        assert "lacks" in caplog.text
        with rig(tmp_path, page_cache="drop") as r:
            r.write(["a"], [0])
            assert in_cache(tmp_path / "store") == 1
