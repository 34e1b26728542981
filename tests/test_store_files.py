"""Whose the files are that root makes in a store of another user's; files that are symlinks."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from light_mem import maintenance
from light_mem.engine import shard_header
from light_mem.engine.reindex import clear_records
from light_mem.errors import StoreFormatError
from light_mem.index import description, store_files
from light_mem.index import file as index_file
from light_mem.index.locks import PathLock
from light_mem.index.owners import Owners
from tests.maintenance_helpers import (
    BLOCKS,
    PAGE,
    Command,
    assert_holds,
    geometry_of,
    index_of,
    opened,
    stored,
)

USER, GROUP = 64321, 64322
TOOLS: dict[str, Callable[[Path], object]] = {
    "rebuild": maintenance.rebuild,
    "repair": lambda path: maintenance.verify(path, repair=True),
    "resize": lambda path: maintenance.resize(path, 96 * 2 * PAGE),
    "evict": lambda path: maintenance.evict(path, 10**9),
}
OPENERS: dict[str, Callable[[Path], object]] = {
    **TOOLS,
    "rebuild --dry-run": lambda path: maintenance.rebuild(path, dry_run=True),
    "verify": maintenance.verify,
    "inspect": maintenance.inspect,
    "server": opened,
}


def give(*paths: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    for path in paths:
        os.chown(path, USER, GROUP)


@pytest.fixture
def theirs(store: Path) -> Path:
    """A store of another user's."""
    give(store, *store.iterdir())
    return store


def owners_of(directory: Path) -> set[tuple[int, int, int]]:
    found = [path.stat() for path in directory.iterdir()]
    return {(f.st_uid, f.st_gid, f.st_mode & 0o777) for f in found}


@pytest.mark.parametrize("without", [(), ("O_TMPFILE",)], ids=["", "no O_TMPFILE"])
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    "missing", ["", "index", "store.json", "owners", "*.lock", "*.slots", "shard-001.data"]
)
def test_what_a_tool_of_root_makes_is_the_directorys_owners(
    theirs: Path, monkeypatch: pytest.MonkeyPatch, tool: str, missing: str, without: tuple[str, ...]
) -> None:
    for name in without:
        monkeypatch.delattr(os, name)
    for path in theirs.glob(missing) if missing else ():
        path.unlink()
    TOOLS[tool](theirs)
    assert owners_of(theirs) == {(USER, GROUP, 0o600)}


def test_a_store_that_root_makes_for_another_user_is_theirs(tmp_path: Path, exported: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    give(there)
    maintenance.import_store(there, exported, storage_size=64 * 2 * PAGE, shards=2)
    assert owners_of(there) == {(USER, GROUP, 0o600)}
    assert len(stored(there)) == len(BLOCKS)


def test_roots_own_store_stays_roots(store: Path) -> None:
    (store / "owners").unlink()
    maintenance.rebuild(store)
    assert owners_of(store) == {(os.geteuid(), os.getegid(), 0o600)}
    assert_holds(store, *BLOCKS)


def test_a_file_is_the_owners_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(tmp_path)
    given, chown = [], os.fchown

    def seen(descriptor: int, user: int, group: int) -> None:
        given.append((tmp_path / "owners").exists())
        chown(descriptor, user, group)

    monkeypatch.setattr(os, "fchown", seen)
    descriptor = store_files.open_or_make(tmp_path / "owners")
    os.write(descriptor, b"here")
    os.close(descriptor)
    assert given == [False]
    assert (tmp_path / "owners").read_bytes() == b"here"
    os.close(store_files.open_or_make(tmp_path / "owners"))
    assert (tmp_path / "owners").read_bytes() == b"here"
    assert [path.name for path in tmp_path.iterdir()] == ["owners"]


def test_a_file_that_another_process_makes_meanwhile_is_the_one_that_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(tmp_path)
    link = os.link

    def later(*args: object, **options: object) -> None:
        (tmp_path / "owners").write_bytes(b"theirs")
        link(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "link", later)
    descriptor = store_files.open_or_make(tmp_path / "owners")
    assert os.pread(descriptor, 10, 0) == b"theirs"
    os.close(descriptor)


@pytest.mark.parametrize("name", ["link", "fchown"])
def test_where_root_cannot_do_that_the_file_is_made_all_the_same(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    """Without /proc, or without the right to give files away."""
    give(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, name, fail)
    os.close(store_files.open_or_make(tmp_path / "owners"))
    assert (tmp_path / "owners").stat().st_uid == (USER if name == "link" else 0)
    assert (f"may shut user {USER} out" in caplog.text) == (name == "fchown")


def test_what_a_dead_process_left_under_a_temporary_name_is_not_used(tmp_path: Path) -> None:
    temporary = tmp_path / "index.7.tmp"
    temporary.write_bytes(b"another's")
    kept = tmp_path / "kept"
    os.link(temporary, kept)
    descriptor = store_files.make(temporary)
    os.write(descriptor, b"new")
    os.close(descriptor)
    assert kept.read_bytes() == b"another's"
    assert temporary.read_bytes() == b"new"


# --- symlinks -------------------------------------------------------------------------------------

DIARY = b"".join(b"day %d: nothing happened\n" % n for n in range(2000))
NAMES = ["index", "store.json", "owners", "open.lock", "shard-001.lock"]
NAMES += ["shard-000.data", "shard-000.slots"]


@pytest.fixture
def diary(tmp_path: Path) -> Path:
    path = tmp_path / "diary"
    path.write_bytes(DIARY)
    return path


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_a_store_that_is_a_symlink_is_refused(
    store: Path, diary: Path, opener: str, name: str
) -> None:
    (store / name).unlink()
    (store / name).symlink_to(diary)
    before = sorted(store.iterdir())
    with pytest.raises(StoreFormatError, match="symlink") as caught:
        OPENERS[opener](store)
    assert str(store / name) in str(caught.value)
    assert caught.value.path == str(store / name)  # type: ignore[attr-defined]
    assert diary.read_bytes() == DIARY
    assert sorted(store.iterdir()) == before


def test_a_symlink_to_the_very_file_is_refused_as_well(store: Path, command: Command) -> None:
    (store / "shard-000.data").rename(store.parent / "elsewhere")
    (store / "shard-000.data").symlink_to(store.parent / "elsewhere")
    assert command("verify", store, "--repair") == 2
    assert f"{store / 'shard-000.data'} is a symlink" in command.err


def test_the_directory_may_be_a_symlink_and_other_names_too(store: Path, diary: Path) -> None:
    for name in ("notes", "shard-000.data.old", "shard-7.data"):
        (store / name).symlink_to(diary)
    link = store.parent / "link"
    link.symlink_to(store)
    for tool in (maintenance.verify, maintenance.rebuild, maintenance.inspect):
        tool(link)
    assert_holds(link, *BLOCKS)
    assert diary.read_bytes() == DIARY


USES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "map data": (
        "shard-000.data",
        lambda path: shard_header.map_whole(shard_header.data_path(path, 0), 1, b""),
    ),
    "clear records": ("shard-000.slots", lambda path: clear_records(path, 0, np.array([1]))),
    "map index": ("index", index_of),
    "owners": ("owners", Owners),
    "lock": ("shard-000.lock", lambda path: PathLock(path / "shard-000.lock").acquire("me")),
}


@pytest.mark.parametrize("use", USES)
def test_one_that_becomes_a_symlink_after_the_look_is_not_followed(
    store: Path, diary: Path, use: str
) -> None:
    name, call = USES[use]
    (store / name).unlink(missing_ok=True)
    (store / name).symlink_to(diary)
    with pytest.raises(StoreFormatError, match=f"{name} is a symlink"):
        call(store)
    assert diary.read_bytes() == DIARY


@pytest.mark.parametrize("name", ["index", "store.json"])
def test_a_symlink_in_the_place_of_a_temporary_file_is_replaced(
    store: Path, diary: Path, name: str
) -> None:
    temporary = store / f"{name}.{os.getpid()}.tmp"
    temporary.symlink_to(diary)
    if name == "index":
        index_file.create(store, geometry_of(store))
    else:
        description.save(store, geometry_of(store))
    assert diary.read_bytes() == DIARY
    assert not temporary.is_symlink()
