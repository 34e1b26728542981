"""Up to which length `create` itself reads and writes, where nothing else is asked for."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from light_mem import State
from light_mem.engine import small_writes
from tests.service_rig import WAIT, Rig, rig

MIB = 1 << 20


@pytest.fixture(autouse=True)
def as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite's own setting leaves all to the workers."""
    monkeypatch.delenv("LIGHTMEM_SMALL_READ_BYTES")
    monkeypatch.delenv("LIGHTMEM_SMALL_WRITE_BYTES")
    monkeypatch.setattr(small_writes, "SLOW_NS", 60_000_000_000)  # a loaded machine


def _is_at_once(r: Rig, mode: str, key: str, pages: list[int]) -> bool:
    """Whether a task of one block is ready while the only worker is stopped; its bytes are looked
    at in any case."""
    (worker,) = r.service.worker_pids
    if mode == "read":
        r.blank(pages)
    os.kill(worker, signal.SIGSTOP)
    task = r.service.create(mode, [key], pages)
    at_once = task.ready()
    os.kill(worker, signal.SIGCONT)
    assert task.wait(WAIT)
    assert task.state() == [State.Finished]
    assert r.holds(key, pages)
    return at_once


# Rows of less than 16 KiB are read by way of private memory, in pieces of 256 KiB, others straight.
@pytest.mark.parametrize(
    ("page_bytes", "pages"), [(16000, 64), (16384, 64), (4 * 16384, 16), (983040, 1), (MIB, 1)]
)
def test_a_block_of_up_to_1_mib_is_read_and_written_at_once(
    tmp_path: Path, page_bytes: int, pages: int
) -> None:
    slots = max(64, 2 * pages)
    with rig(tmp_path, pages=pages, page_bytes=page_bytes, slots=slots) as r:
        r.service._engine.prepare()
        row = list(range(pages))[::-1]
        for key in ("one", "two", "three", "four"):
            r.fill(key, row)
            assert _is_at_once(r, "write", key, row)
        for key in ("three", "four"):
            assert _is_at_once(r, "read", key, row)
        assert r.service.check().clean


def test_a_longer_block_is_left_to_the_workers(tmp_path: Path) -> None:
    with rig(tmp_path, pages=1, page_bytes=MIB + 4096, slots=64) as r:
        r.service._engine.prepare()
        r.fill("long", [0])
        assert not _is_at_once(r, "write", "long", [0])
        assert not _is_at_once(r, "read", "long", [0])


@pytest.mark.parametrize(("pages", "at_once"), [(256, True), (257, False)])
def test_a_read_of_many_pages_is_left_to_the_workers(
    tmp_path: Path, pages: int, at_once: bool
) -> None:
    names = list(range(-(-pages // 64)))
    with rig(tmp_path, pages=320, page_bytes=64, slots=512) as r:
        for name in names:
            r.fill(name, range(64 * name, min(64 * name + 64, pages)))
        assert r.service.create("write", names, range(pages)).wait(WAIT)
        r.blank(range(pages))
        (worker,) = r.service.worker_pids
        os.kill(worker, signal.SIGSTOP)
        task = r.service.create("read", names, range(pages))
        assert task.ready() is at_once
        os.kill(worker, signal.SIGCONT)
        assert task.wait(WAIT)
        assert task.state() == [State.Finished] * len(names)
        for name in names:
            assert r.holds(name, range(64 * name, min(64 * name + 64, pages)))
