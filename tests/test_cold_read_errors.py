"""What goes wrong while a block comes from the device costs that block alone, and no wrong byte is
believed."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from light_mem.engine import copy_loops, page_cache, read_ahead
from light_mem.engine.base import BlockIO, Outcome
from light_mem.engine.direct_reads import DirectReads
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.places import Rows
from light_mem.engine.read_ahead import Span
from light_mem.engine.settings import EngineSettings
from light_mem.index import keys as keymath
from tests.cached import forget_all
from tests.cold_rig import DATA, all_cold, bring_in, cache_that_forgets, direct, make, opened, reads
from tests.engine_helpers import COPIED_AND_STORED, Block, Rig, collect, open_local

__all__ = ["all_cold", "cache_that_forgets", "direct", "reads"]  # fixtures


@pytest.mark.usefixtures("direct")
def test_a_flipped_bit_on_the_device_is_damage(tmp_path: Path, reads: list[int]) -> None:
    make(tmp_path / "s", [Block(1, 4), Block(2, 4)], 4096)
    with (tmp_path / "s" / DATA).open("r+b") as file:
        file.seek(4096 + 5000)
        byte = file.read(1)[0]
        file.seek(4096 + 5000)
        file.write(bytes([byte ^ 4]))
    forget_all(tmp_path / "s" / DATA)
    with opened(tmp_path / "s", 4096) as r:
        outcomes = {r.read(block)[0] for block in (Block(1, 4), Block(2, 4))}
        assert outcomes == {Outcome.DAMAGED, Outcome.LOADED}
        assert sum(r.find(Block(1), Block(2))) == 1
    assert reads


@pytest.mark.usefixtures("all_cold")
def test_who_writes_to_the_pages_meanwhile_makes_no_block_look_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "s", [Block(1, 4)], 4096)
    memory, calls = np.zeros((8, 4096), np.uint8), 0

    def scribble(steps: copy_loops.Steps) -> None:
        nonlocal calls
        for _, put, rows, elements, piece, update in steps:
            put(rows, elements)
            memory[rows[0], 7] ^= 1
            update(piece)
            calls += 1

    for loop in ("scatter_small_rows", "scatter_rows"):  # which, the processor decides
        monkeypatch.setattr(copy_loops, loop, scribble)
    outcomes: list[Outcome] = []
    with opened(tmp_path / "s", 4096) as r:
        place = Rows(memory, np.arange(0, 8, 2))
        r.engine.read([BlockIO(*keymath.as_key(1), place)], collect(outcomes))
        assert calls
        assert outcomes == [Outcome.LOADED]
        assert r.find(Block(1)) == [True]


@pytest.mark.parametrize("policy", ["keep", "drop"])
@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (errno.EIO, Outcome.DAMAGED),
        (errno.ENODATA, Outcome.DAMAGED),
        (errno.ENOMEM, Outcome.FAILED),
    ],
)
def test_a_block_that_the_device_has_lost_is_dropped_and_can_be_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, error: int, outcome: Outcome
) -> None:
    make(tmp_path / "s", [Block(1, 4), Block(2, 4)], 4096)
    engine = LocalStorageEngine(
        tmp_path / "s", kind="worker", settings=EngineSettings(page_cache=policy)
    )
    engine.file(0).past_cache((0, 1), 1)  # asks the file system for O_DIRECT, by reading
    read = os.preadv
    lost = engine.lookup.locate(engine.lookup.find_one(1, 0), 1, 0)
    assert lost is not None
    lost_at = engine.file(0).span(lost.runs[0], 1).at

    def preadv(fd: int, buffers: Any, at: int, flags: int = 0) -> int:
        if at == lost_at:
            raise OSError(error, os.strerror(error))
        return read(fd, buffers, at, flags)

    with monkeypatch.context() as m:
        m.setattr(read_ahead.os, "preadv", preadv)
        m.setattr(page_cache, "hold_each", lambda addresses: [False] * len(addresses))
        r = Rig(engine, 4096)
        assert r.read(Block(1, 4), Block(2, 4)) == [outcome, Outcome.LOADED]
        bring_in(engine)  # what cannot be brought in harms nothing
    dropped = outcome is Outcome.DAMAGED
    assert r.find(Block(1), Block(2)) == [not dropped, True]
    assert engine.stats()["damaged"] == dropped
    assert r.write(Block(1, 4)) == [COPIED_AND_STORED if dropped else (Outcome.PRESENT,)]
    assert r.read(Block(1, 4)) == [Outcome.LOADED]
    engine.close()


@pytest.mark.usefixtures("all_cold")
@pytest.mark.parametrize("verify", [True, False])
def test_a_block_whose_slots_another_gets_while_it_is_on_its_way_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    make(tmp_path / "s", [Block(1, 4)], 4096)
    other = Rig(open_local(tmp_path / "s", 4, page_bytes=4096), 4096)
    read, late = os.preadv, [False, True]

    def preadv(fd: int, buffers: Any, at: int, flags: int = 0) -> int:
        took_over = other.write(Block(2, 4)) if late.pop() else None
        done = read(fd, buffers, at, flags)
        if took_over is None:
            took_over = other.write(Block(1, 4))
        assert took_over == [COPIED_AND_STORED]
        return done

    with opened(tmp_path / "s", 4096, verify) as r:
        r.engine.file(0).past_cache((0, 1), 1)  # type: ignore[attr-defined]
        monkeypatch.setattr(read_ahead.os, "preadv", preadv)
        assert r.read(Block(1, 4)) == [Outcome.LOST]  # its slots were taken before the bytes came
        assert r.read(Block(2, 4)) == [Outcome.LOST]  # ... and after
    other.engine.close()
    assert not late


@pytest.mark.usefixtures("all_cold")
def test_an_error_for_slots_that_another_has_by_now_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "s", [Block(1, 4)], 4096)
    other = Rig(open_local(tmp_path / "s", 4, page_bytes=4096), 4096)

    def preadv(fd: int, buffers: Any, at: int, flags: int = 0) -> int:
        if other.find(Block(1)) == [True]:
            assert other.write(Block(2, 4)) == [COPIED_AND_STORED]
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with opened(tmp_path / "s", 4096) as r:
        r.engine.file(0).past_cache((0, 1), 1)  # type: ignore[attr-defined]
        with monkeypatch.context() as m:
            m.setattr(read_ahead.os, "preadv", preadv)
            assert r.read(Block(1, 4)) == [Outcome.LOST]
        assert r.engine.stats()["damaged"] == 0
        assert r.read(Block(2, 4)) == [Outcome.LOADED]
    other.engine.close()


def test_a_block_that_a_file_cut_short_has_lost_is_dropped_and_can_be_written_again(
    tmp_path: Path, reads: list[int]
) -> None:
    make(tmp_path / "s", [Block(1, 4)], 4096)
    with opened(tmp_path / "s", 4096) as r:
        r.engine.file(0)  # type: ignore[attr-defined]  # mapped while it was whole
        os.truncate(tmp_path / "s" / DATA, 3 * 4096)
        assert r.read(Block(1, 4)) == [Outcome.DAMAGED]
        assert r.find(Block(1)) == [False]
        assert r.engine.stats()["damaged"] == 1
        assert r.write(Block(1, 4)) == [COPIED_AND_STORED]
        assert r.read(Block(1, 4)) == [Outcome.LOADED]
    assert reads == [4 * 4096]


def test_a_shard_that_cannot_be_opened_spoils_no_block_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_local(tmp_path / "s", 24, page_bytes=4096, shards=2)
    blocks = [Block(n, 2) for n in range(12)]
    assert Rig(engine, 4096).write(*blocks) == [COPIED_AND_STORED] * 12
    shard = {b: engine.lookup.find_one(b.key, 0) // engine.geometry.slots for b in blocks}
    engine.close()
    del engine
    (tmp_path / "s" / "shard-001.data").rename(tmp_path / "elsewhere")
    (tmp_path / "s" / "shard-001.data").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(page_cache, "hold_each", lambda addresses: [False] * len(addresses))
    wanted = [Outcome.FAILED if shard[b] else Outcome.LOADED for b in blocks]
    assert wanted.count(Outcome.LOADED) > 2
    assert Outcome.FAILED in wanted
    with opened(tmp_path / "s", 4096) as r:
        assert r.read(*blocks) == wanted


@pytest.mark.usefixtures("all_cold")
def test_a_plan_that_fails_fails_no_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [Block(n, 2) for n in range(8)]
    make(tmp_path / "s", blocks, 4096)
    plan, failed = DirectReads.plan, []

    def refuse(self: DirectReads, spans: list[Span], more: bool) -> None:
        if not failed:
            failed.append(spans)
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        plan(self, spans)

    monkeypatch.setattr(DirectReads, "plan", refuse)
    with opened(tmp_path / "s", 4096) as r:
        assert r.read(*blocks[::2]) == [Outcome.LOADED] * 4
    assert failed
