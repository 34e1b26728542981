"""Every change can be killed at any line and run again: nothing is lost, nothing is left over."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from light_mem.engine.base import Outcome
from light_mem.index import format as fmt
from light_mem.maintenance import (
    clear,
    evict,
    export_store,
    import_store,
    rebuild,
    resize,
    verify,
)
from tests.engine_helpers import Block
from tests.maintenance_helpers import (
    BLOCKS,
    PAGE,
    assert_holds,
    files,
    flip,
    in_child,
    index_of,
    key_of,
    kill_points,
    make_store,
    opened,
    place_of,
    records_of,
    stored,
)

KILLS = 30
KEYS = {key_of(b) for b in BLOCKS}


def killed(
    store: Path, tmp_path: Path, call: Callable[[Path], object], count: int = KILLS
) -> list[Path]:
    """Copies of a store, each as a call left it that was killed at some line."""
    whole = tmp_path / "whole"
    shutil.copytree(store, whole)
    _, lines = in_child(lambda: call(whole))
    left = []
    for at in kill_points(lines, count):
        copy = tmp_path / f"killed-{at}"
        shutil.copytree(store, copy)
        was_killed, _ = in_child(lambda copy=copy: call(copy), at)  # type: ignore[misc]
        assert was_killed
        left.append(copy)
    return left


def reads(store: Path, **sizes: int) -> set[str]:
    """What a server that opens the store can read, right to the last byte."""
    rig = opened(store, **sizes)
    found = {
        key_of(block)
        for block, outcome in zip(BLOCKS, rig.read(*BLOCKS), strict=True)
        if outcome is Outcome.LOADED
    }
    rig.engine.close()
    return found


@pytest.mark.parametrize("how", ["as it is", "garbage", "missing"])
def test_a_killed_rebuild(tmp_path: Path, how: str) -> None:
    store = make_store(tmp_path / "store")
    if how == "garbage":
        (store / "index").write_bytes(np.random.default_rng(0).bytes(20000))
    elif how == "missing":
        (store / "index").unlink()
    for copy in killed(store, tmp_path, rebuild):
        again = rebuild(copy)
        assert (again.blocks, again.lost) == (len(BLOCKS), 0)
        assert verify(copy).clean
        assert not list(copy.glob("*.tmp"))
        assert_holds(copy, *(BLOCKS if how == "as it is" else reversed(BLOCKS)))


def test_a_killed_rebuild_is_no_hindrance_to_a_server(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    (store / "index").unlink()
    for copy in killed(store, tmp_path, rebuild):
        assert reads(copy) == KEYS


def test_a_killed_rebuild_that_adopts_blocks(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    for block in BLOCKS[3:6]:
        shard, slot = place_of(store, block)
        records_of(store, shard)["tag"][slot] = fmt.FREE
    for copy in killed(store, tmp_path, rebuild):
        assert rebuild(copy).blocks == len(BLOCKS)
        verify(copy, repair=True)
        assert verify(copy).clean
        assert_holds(copy, *BLOCKS)


def test_a_killed_repair(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    flip(store, BLOCKS[4])
    flip(store, BLOCKS[11])
    for block in BLOCKS[6:8]:
        shard, slot = place_of(store, block)
        records_of(store, shard)["tag"][slot] = fmt.FREE
    index_of(store).heads[:] = 0
    sound = [b for b in BLOCKS if b not in (BLOCKS[4], BLOCKS[11])]
    for copy in killed(store, tmp_path, lambda copy: verify(copy, repair=True), 40):
        assert verify(copy, repair=True).sound
        assert verify(copy).clean
        assert_holds(copy, *sound)


def test_a_killed_clear(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    for copy in killed(store, tmp_path, clear):
        report = verify(copy)
        assert report.clean, report.findings
        assert reads(copy) == stored(copy)
        clear(copy)
        assert stored(copy) == set()
        assert verify(copy).clean


def test_a_killed_evict(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    file = index_of(store)
    young = BLOCKS[:6]
    for block in young:
        shard, slot = place_of(store, block)
        file.uses[shard * file.slots + slot] = time.time_ns()
    for copy in killed(store, tmp_path, lambda copy: evict(copy, 3600)):
        report = verify(copy)
        assert report.clean, report.findings
        assert {key_of(b) for b in young} <= stored(copy)
        evict(copy, 3600)
        assert stored(copy) == {key_of(b) for b in young}
        assert verify(copy).clean


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("slots", [20, 100])
def test_a_killed_resize(tmp_path: Path, slots: int) -> None:
    store = make_store(tmp_path / "store")
    size = slots * 2 * PAGE
    for copy in killed(store, tmp_path, lambda copy: resize(copy, size), 40):
        # A block may be there twice when it was on its way; it is never there less than once.
        kinds = {finding.kind for finding in verify(copy).findings}
        assert kinds <= {"twin", "file", "index", "record", "stale"}, kinds
        resize(copy, size)
        assert verify(copy).clean
        left = [b for b in BLOCKS if key_of(b) in stored(copy)]
        pages = sum(b.pages for b in BLOCKS)
        assert left == BLOCKS or pages > 2 * slots
        assert len(left) >= (len(BLOCKS) if slots == 100 else 14)
        assert_holds(copy, *left, slots=slots)


@pytest.mark.usefixtures("short_blocks")
def test_a_server_opens_what_a_killed_resize_left(tmp_path: Path) -> None:
    store = tmp_path / "store"
    rig = opened(store)
    filler = [Block(n) for n in range(60)]
    rig.write(*filler)
    rig.write(*BLOCKS)
    rig.delete(*filler)
    rig.engine.close()
    for copy in killed(store, tmp_path, lambda copy: resize(copy, 2 * 32 * PAGE), 40):
        assert reads(copy, slots=64) == KEYS


def test_a_killed_export_leaves_no_file_of_its_name(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    before = files(store)
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "x"
    _, lines = in_child(lambda: export_store(store, path))
    path.unlink()
    target = make_store(tmp_path / "target", [])
    for at in kill_points(lines, KILLS):
        assert in_child(lambda: export_store(store, path), at)[0]
        assert files(store) == before
        if path.exists():  # killed after it had got its name: then it is whole
            assert import_store(target, path, dry_run=True).complete
            path.unlink()
        export_store(store, path)
        assert import_store(target, path, dry_run=True).blocks == len(BLOCKS)
        path.unlink()
        assert list(path.parent.iterdir()) == []


def test_a_killed_import_is_run_again(tmp_path: Path) -> None:
    source = make_store(tmp_path / "source")
    export_store(source, tmp_path / "x")
    target = make_store(tmp_path / "store", BLOCKS[10:12])
    for copy in killed(target, tmp_path, lambda copy: import_store(copy, tmp_path / "x"), 40):
        report = verify(copy)
        assert report.clean, report.findings
        assert reads(copy) == stored(copy)
        again = import_store(copy, tmp_path / "x")
        assert again.complete
        assert stored(copy) == KEYS
        assert verify(copy).clean
