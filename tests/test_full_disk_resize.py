"""Another size on a full disk: it is had, or the store is as it was."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from light_mem import maintenance
from light_mem.errors import StoreFullError
from light_mem.index import description
from light_mem.index import file as index_file
from light_mem.index import format as fmt
from tests.maintenance_helpers import (
    BLOCKS,
    PAGE,
    SHARDS,
    SLOTS,
    assert_holds,
    files,
    geometry_of,
    key_of,
    opened,
    stored,
)
from tests.service_child import Child
from tests.small_disk import FILL, small_disk

STEPS = [index_file.NAME, "shard-000.data", "shard-000.slots", "shard-001.slots", description.NAME]


def full_at(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The disk is full for the file of that name, under its temporary name too."""

    def refuse(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name.startswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def before(real: Callable[..., object]) -> Callable[..., object]:
        def call(descriptor: int, *arguments: object) -> object:
            refuse(descriptor)
            return real(descriptor, *arguments)

        return call

    for function in ("posix_fallocate", "write"):
        monkeypatch.setattr(os, function, before(getattr(os, function)))


# --- larger ---------------------------------------------------------------------------------------


def by_a_server(store: Path, slots: int) -> None:
    opened(store, slots).engine.close()


def by_the_tool(store: Path, slots: int) -> None:
    maintenance.resize(store, slots * SHARDS * PAGE)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("grow", [by_a_server, by_the_tool])
def test_a_store_that_cannot_grow_is_as_it_was(
    store: Path, monkeypatch: pytest.MonkeyPatch, name: str, grow: Callable[[Path, int], None]
) -> None:
    before = files(store)
    with monkeypatch.context() as patch:
        full_at(patch, name)
        with pytest.raises(StoreFullError):
            grow(store, 3 * SLOTS)
    assert files(store) == before
    assert maintenance.verify(store).clean
    assert_holds(store, *BLOCKS)


def test_a_lost_file_for_which_there_is_no_room_is_lost_still(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store / "shard-001.slots").unlink()
    with monkeypatch.context() as patch:
        full_at(patch, description.NAME)
        with pytest.raises(StoreFullError):
            opened(store, slots=3 * SLOTS)
    assert not (store / "shard-001.slots").exists()
    assert_holds(store, *BLOCKS, slots=3 * SLOTS)
    (store / "index").unlink()
    assert maintenance.rebuild(store).blocks == len(BLOCKS)


def test_the_room_for_a_new_index_is_asked_for_before_a_file_grows(disk: Path, store: Path) -> None:
    script = f"""{FILL}
import shutil
from pathlib import Path
from light_mem import maintenance
from light_mem.errors import StoreFullError
from tests.maintenance_helpers import BLOCKS, PAGE, SHARDS, assert_holds, files, opened
source, disk = map(Path, sys.argv[1:])
store = disk / "store"
shutil.copytree(source, store)
opened(store).engine.close()
before, room = files(store), free(str(disk))
slots = (room - (64 << 10)) // SHARDS // (PAGE + 64)  # the shards' files alone would fit
try:
    maintenance.resize(store, slots * SHARDS * PAGE)
except StoreFullError as error:
    say(error.needed > room, error.available == room)
say(files(store) == before, room - free(str(disk)))
say(maintenance.verify(store).clean, maintenance.rebuild(store).blocks)
assert_holds(store, *BLOCKS)
say("holds")
"""
    with Child(script, store, disk, through=small_disk(disk)) as child:
        said = [child.hear() for _ in range(4)]
        assert child.end() == 0
    assert said == [[True, True], [True, 0], [True, len(BLOCKS)], ["holds"]]


# --- smaller --------------------------------------------------------------------------------------


@pytest.fixture
def full(store: Path) -> Path:
    """A store whose blocks behind were used last: when they move, others must go."""
    rig = opened(store)
    rig.find(*BLOCKS[len(BLOCKS) // 2 :], touch=True)
    rig.engine.close()
    return store


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize(
    ("by", "name"),
    [
        (by_a_server, index_file.NAME),
        (by_a_server, description.NAME),
        (by_the_tool, index_file.NAME),  # room for both is taken under that name
    ],
)
def test_a_store_that_cannot_shrink_keeps_its_size_and_its_blocks(
    full: Path, monkeypatch: pytest.MonkeyPatch, by: Callable[[Path, int], None], name: str
) -> None:
    before = files(full)
    with monkeypatch.context() as patch:
        full_at(patch, name)
        with pytest.raises(StoreFullError):
            by(full, 10)
    assert set(files(full)) == set(before)
    assert geometry_of(full).slots == SLOTS
    assert maintenance.verify(full).clean
    assert stored(full) == {key_of(block) for block in BLOCKS}


def test_a_store_shrinks_on_a_full_disk_with_room_for_its_new_index_alone(
    disk: Path, full: Path
) -> None:
    script = f"""{FILL}
import shutil
from pathlib import Path
from light_mem import blocks, maintenance
from light_mem.errors import StoreFullError
from light_mem.index import format as fmt
from tests.maintenance_helpers import PAGE, SHARDS, geometry_of, opened
blocks.MAX_PAGES_PER_BLOCK = 1
source, disk = map(Path, sys.argv[1:])
store = disk / "store"
shutil.copytree(source, store)
opened(store).engine.close()
for spare in (0, fmt.index_layout(SHARDS, 10).size, fmt.index_layout(SHARDS, 10).size + 4096):
    fill(str(disk), spare)
    try:
        report = maintenance.resize(store, 10 * SHARDS * PAGE)
        say("resized", report.removed > 0, report.blocks)
    except StoreFullError as error:
        say("full", error.needed, geometry_of(store).slots, maintenance.verify(store).blocks)
    unfill(str(disk))
say(maintenance.verify(store).clean, maintenance.verify(store).blocks)
"""
    needed = fmt.index_layout(SHARDS, 10).size + 4096
    with Child(script, full, disk, through=small_disk(disk)) as child:
        assert child.hear() == ["full", needed, SLOTS, len(BLOCKS)]
        assert child.hear() == ["full", needed, SLOTS, len(BLOCKS)]
        said, some_went, left = child.hear()
        assert (said, some_went) == ("resized", True)
        assert child.hear() == [True, left]
        assert child.end() == 0
