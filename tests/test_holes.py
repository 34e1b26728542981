"""A store restored with holes in its files (`tar -S`, `rsync -S`) has its room again once it is
open: a store to a mapped hole on a full disk would be the end of the server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from light_mem import maintenance
from light_mem.engine import opening
from light_mem.index import format as fmt
from light_mem.index.file import IndexFile
from light_mem.index.room import fill_holes, lacking
from tests.maintenance_helpers import (
    BLOCKS,
    assert_holds,
    files,
    make_store,
    opened,
    place_of,
    records_of,
)
from tests.service_child import Child
from tests.small_disk import FILL, small_disk

NAMES = ("index", "owners", "shard-000.data", "shard-001.slots")
LARGE = 1024  # slots a shard: the files have pages of zeros


def make_holes(path: Path) -> None:
    """Copy a file to where it is without its pages of zeros."""
    raw = path.read_bytes()
    path.unlink()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    for at in range(0, len(raw), 4096):
        if raw[at : at + 4096].strip(b"\0"):
            os.pwrite(descriptor, raw[at : at + 4096], at)
    os.ftruncate(descriptor, len(raw))
    os.close(descriptor)


def lacks(path: Path) -> int:
    return lacking(path, path.stat().st_size)


@pytest.fixture
def holes(tmp_path: Path) -> Path:
    """A store whose files have holes."""
    store = make_store(tmp_path / "large", slots=LARGE)
    for name in NAMES:
        make_holes(store / name)
    if not lacks(store / "owners"):
        pytest.skip("this file system has no holes")
    return store


def test_an_open_allocates_what_the_files_lack(holes: Path) -> None:
    assert all(lacks(holes / name) for name in NAMES)
    assert_holds(holes, *BLOCKS, slots=LARGE)
    assert [name for name in NAMES if lacks(holes / name)] == []


@pytest.mark.parametrize("lost", ["shard-001.data", "shard-001.slots"])
def test_an_index_of_another_size_is_allocated_before_it_is_told_what_was_lost(
    holes: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    (holes / lost).unlink()
    told: list[int] = []
    real = IndexFile.mark_open

    def mark_open(file: IndexFile) -> None:
        told.append(lacks(file.path))
        real(file)

    monkeypatch.setattr(IndexFile, "mark_open", mark_open)
    opened(holes, slots=2 * LARGE).engine.close()
    assert told == [0, 0]  # and as the store is opened


def test_who_only_looks_allocates_nothing(holes: Path) -> None:
    before = {name: lacks(holes / name) for name in NAMES}, files(holes)
    maintenance.inspect(holes)
    assert maintenance.verify(holes).clean
    assert ({name: lacks(holes / name) for name in NAMES}, files(holes)) == before


def test_a_rebuild_that_writes_records_allocates_them_first(holes: Path) -> None:
    records = {(shard, slot) for shard, slot in (place_of(holes, block) for block in BLOCKS)}
    for shard, slot in records:
        records_of(holes, shard)["tag"][slot] = fmt.FREE
    make_holes(holes / "shard-001.slots")
    assert lacks(holes / "shard-001.slots")
    assert maintenance.rebuild(holes).adopted == len(BLOCKS)
    assert lacks(holes / "shard-001.slots") == 0


def test_what_others_have_open_is_not_allocated_again(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = opened(store)
    asked: list[Path] = []
    monkeypatch.setattr(opening, "fill_holes", lambda path, size: asked.append(path))
    opened(store).engine.close()
    assert asked == []
    rig.engine.close()
    opened(store).engine.close()
    assert [path.name for path in asked] == ["owners", "index"]


def test_a_file_that_has_its_room_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 64)
    with path.open("rb") as file:
        os.fsync(file.fileno())  # till then it may have no blocks
    monkeypatch.delattr(os, "posix_fallocate")
    fill_holes(path, 256 * 64)
    assert path.read_bytes() == bytes(range(256)) * 64


def test_a_full_disk_is_an_error_at_the_open_and_not_the_end_of_the_server(
    disk: Path, holes: Path
) -> None:
    script = f"""{FILL}
import shutil
from pathlib import Path
from light_mem import maintenance
from light_mem.errors import StoreFullError
from tests.maintenance_helpers import BLOCKS, assert_holds, files, opened
from tests.test_holes import LARGE, NAMES, make_holes
source, disk = map(Path, sys.argv[1:])
store = disk / "store"
for names in ([], NAMES[:1], NAMES[1:2], NAMES):
    shutil.copytree(source, store)
    opened(store, LARGE).engine.close()  # allocates what the copy lacks
    for name in names: make_holes(store / name)
    fill(str(disk))
    before = files(store)
    try:
        opened(store, LARGE).engine.close()
        say("opened")
    except StoreFullError as e:
        say("full", files(store) == before)
    except BaseException as e:
        say(repr(e))
    unfill(str(disk))
    assert_holds(store, *BLOCKS, slots=LARGE)
    say(maintenance.verify(store).clean)
    shutil.rmtree(store)
"""
    with Child(script, holes, disk, through=small_disk(disk)) as child:
        assert child.hear() == ["opened"]
        assert child.hear() == [True]
        for _ in range(3):
            assert child.hear() == ["full", True]
            assert child.hear() == [True]
        assert child.end() == 0
