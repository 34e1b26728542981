"""A directory that is no store, with files of others under the names that a store's have."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from light_mem import maintenance
from light_mem.engine.base import Outcome
from light_mem.errors import StoreFormatError
from light_mem.index import description, owners
from light_mem.index import format as fmt
from tests.engine_helpers import COPIED_AND_STORED, PAGE, Block, Rig, new_index, open_local

FOREIGN = {
    "index": b"DIRC" + bytes(8) + b"git's own" * 1000,
    "store.json": b'{"name": "my shop", "items": [1, 2, 3]}\n',
    "owners": b"alice\nbob\n",
    "shard-000.data": b"somebody's data",
    "shard-000.slots": b"somebody's data" * 1000,
    "shard-007.data": b"more" * 1000,
}


def contents(directory: Path) -> dict[str, object]:
    """All that is there, with the time of its last change."""
    return {
        path.name: (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in directory.iterdir()
    }


def assert_refused(directory: Path, name: str) -> None:
    before = contents(directory)
    with pytest.raises(StoreFormatError, match="nothing was changed") as caught:
        open_local(directory, 8)
    assert repr(name) in str(caught.value)
    assert caught.value.path == str(directory)  # type: ignore[attr-defined]
    assert caught.value.found == [name]  # type: ignore[attr-defined]
    assert contents(directory) == before


def assert_opens(directory: Path) -> None:
    rig = Rig(open_local(directory, 8))
    assert rig.write(Block(1)) == [COPIED_AND_STORED]
    assert rig.read(Block(1)) == [Outcome.LOADED]
    rig.engine.close()


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_others_is_refused_before_anything_is_made(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FOREIGN[name])
    (tmp_path / "index.html.tmp").write_text("and this")
    assert_refused(tmp_path, name)


@pytest.mark.parametrize(
    "name", ["index", "store.json", "owners", "shard-000.data", "shard-000.slots"]
)
@pytest.mark.parametrize("what", ["directory", "pipe", "link to nothing", "link to an empty file"])
def test_what_is_no_file_is_refused_as_well(tmp_path: Path, name: str, what: str) -> None:
    if what == "directory":
        (tmp_path / name).mkdir()
    elif what == "pipe":
        os.mkfifo(tmp_path / name)
    elif what == "link to nothing":
        (tmp_path / name).symlink_to(tmp_path / "nothing")
    else:
        (tmp_path / "empty").touch()
        (tmp_path / name).symlink_to(tmp_path / "empty")
    assert_refused(tmp_path, name)


def test_all_that_is_in_the_way_is_named(tmp_path: Path) -> None:
    for name, content in FOREIGN.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(StoreFormatError) as caught:
        open_local(tmp_path, 8)
    assert caught.value.found == list(FOREIGN)  # type: ignore[attr-defined]


def test_owners_of_another_form_are_refused(tmp_path: Path) -> None:
    """As long as ours, and yet nobody's list of processes."""
    (tmp_path / "owners").write_bytes(
        np.random.default_rng(0).bytes(fmt.MAX_OWNERS * fmt.OWNER.itemsize)
    )
    assert_refused(tmp_path, "owners")


def test_an_import_makes_no_store_over_files_of_others(tmp_path: Path, exported: Path) -> None:
    there = tmp_path / "git"
    there.mkdir()
    (there / "index").write_bytes(FOREIGN["index"])
    before = contents(there)
    with pytest.raises(StoreFormatError, match="index"):
        maintenance.import_store(there, exported, storage_size=1 << 20)
    assert contents(there) == before


# --- what our own leave without a description and without shards ----------------------------------


@pytest.mark.parametrize("size", [0, 100, fmt.MAX_OWNERS * fmt.OWNER.itemsize])
def test_room_for_owners_is_ours(tmp_path: Path, size: int) -> None:
    """Killed before, or while, the room was allocated."""
    (tmp_path / "owners").write_bytes(bytes(size))
    assert_opens(tmp_path)


@pytest.mark.parametrize("name", ["index", "store.json"])
@pytest.mark.parametrize("size", [0, 20480])
def test_a_file_whose_content_a_power_cut_took_is_in_nobodys_way(
    tmp_path: Path, name: str, size: int
) -> None:
    (tmp_path / name).write_bytes(bytes(size))
    assert_opens(tmp_path)


def test_an_index_of_ours_alone_is_in_nobodys_way(tmp_path: Path) -> None:
    """Left by whoever could not write the description: shards are removed then, it is not."""
    new_index(tmp_path, 8)
    assert_opens(tmp_path)


@pytest.mark.parametrize("also", [(), ("index",), ("store.json",)])
def test_owners_are_ours_when_all_else_was_removed(tmp_path: Path, also: tuple[str, ...]) -> None:
    store = tmp_path / "store"
    rig = Rig(open_local(store, 8))  # its record stays: nobody has left
    kept = {name: (store / name).read_bytes() for name in (owners.NAME, *also)}
    rig.engine.close()
    for path in store.iterdir():
        path.unlink()
    for name, content in kept.items():
        (store / name).write_bytes(content)
    assert np.frombuffer(kept[owners.NAME], fmt.OWNER)["pid"].any()
    assert_opens(store)


def test_a_damaged_description_of_ours_is_in_nobodys_way(tmp_path: Path) -> None:
    open_local(tmp_path / "store", 8).close()
    (tmp_path / "alone").mkdir()
    text = (tmp_path / "store" / description.NAME).read_text()
    (tmp_path / "alone" / description.NAME).write_text(text.replace(f": {PAGE}", ": 65"))
    assert description.load(tmp_path / "alone") is None
    assert_opens(tmp_path / "alone")


@pytest.mark.parametrize("name", ["index", "owners", "store.json"])
def test_files_of_a_store_may_be_garbage(tmp_path: Path, name: str) -> None:
    """Its shards say whose they are."""
    store = tmp_path / "store"
    rig = Rig(open_local(store, 8))
    rig.write(Block(1))
    rig.engine.close()
    (store / "store.json").unlink()
    (store / name).write_bytes(FOREIGN[name])
    if name == "owners":
        (store / name).write_bytes(bytes(fmt.MAX_OWNERS * fmt.OWNER.itemsize))
    rig = Rig(open_local(store, 8))
    assert rig.read(Block(1)) == [Outcome.LOADED]
    rig.engine.close()
