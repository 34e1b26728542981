"""Making and opening a store: what is refused, what a failure or a kill leaves."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from light_mem.engine import opening, shard_making
from light_mem.engine.base import Outcome
from light_mem.engine.local import LocalStorageEngine
from light_mem.errors import StoreBusyError, StoreFormatError, StoreFullError
from light_mem.index import description, room
from light_mem.index import format as fmt
from light_mem.index.file import IndexFile
from light_mem.index.owners import Owners
from tests.engine_helpers import COPIED_AND_STORED, PAGE, Block, Rig, open_local

LOADED = Outcome.LOADED


def snapshot(directory: Path) -> dict[str, bytes]:
    """Contents of a store but for what opening itself may touch."""
    return {
        path.name: path.read_bytes()
        for path in directory.iterdir()
        if path.name != "owners" and not path.name.endswith(".lock")
    }


class Killed(BaseException):
    """Stands for a kill: nothing that catches errors sees it."""


# --- making ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", range(6))
def test_a_store_killed_while_it_was_made_can_be_made_by_the_next(
    tmp_path: Path, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = calls
    real = room.allocate

    def allocate(descriptor: int, path: Path, size: int) -> None:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        real(descriptor, path, size)

    with monkeypatch.context() as patch:
        patch.setattr(shard_making, "allocate", allocate)  # of shard files: two a shard
        patch.setattr("light_mem.index.file.allocate", allocate)  # of the index
        patch.setattr(opening, "remove_shards", lambda *_: None)  # a dead process removes nothing
        if calls < 5:
            with pytest.raises(Killed):
                open_local(tmp_path / "store", 8, shards=2)
        else:
            patch.setattr(description, "save", lambda *_: (_ for _ in ()).throw(Killed))
            with pytest.raises(Killed):
                open_local(tmp_path / "store", 8, shards=2)
    assert not (tmp_path / "store" / "store.json").exists()
    rig = Rig(open_local(tmp_path / "store", 8, shards=2))
    assert rig.write(Block(1), Block(2)) == [COPIED_AND_STORED] * 2
    assert rig.engine.stats()["slots"] == 16
    rig.engine.close()


def test_shard_files_without_any_content_are_not_taken_for_anothers(tmp_path: Path) -> None:
    """A power cut can leave the room and lose the header."""
    (tmp_path / "store").mkdir()
    with (tmp_path / "store" / "shard-000.data").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 10_000)
    rig = Rig(open_local(tmp_path / "store", 8))
    assert rig.write(Block(1)) == [COPIED_AND_STORED]
    rig.engine.close()


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    with pytest.raises(StoreFormatError):
        open_local(tmp_path / "store", 8)
    assert (tmp_path / "store").read_text() == "a file"


@pytest.mark.parametrize("fails_at", range(5))
def test_a_store_that_did_not_fit_can_be_made_smaller_and_otherwise(
    tmp_path: Path, fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.posix_fallocate, 0

    def full(descriptor: int, at: int, size: int) -> None:
        nonlocal calls
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("owners"):
            return real(descriptor, at, size)
        if calls == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        calls += 1
        return real(descriptor, at, size)

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(StoreFullError) as caught:
            open_local(tmp_path / "store", 8, shards=2)
    assert caught.value.errno == errno.ENOSPC
    rig = Rig(open_local(tmp_path / "store", 6, shards=3))  # nothing reminds of the first try
    assert rig.write(Block(1)) == [COPIED_AND_STORED]
    rig.engine.close()


def test_room_is_allocated_and_not_only_promised(tmp_path: Path) -> None:
    open_local(tmp_path / "store", 100, page_bytes=4096).close()
    for path in (tmp_path / "store").glob("[ios]*"):  # index, owners, shard files
        assert path.stat().st_blocks * 512 >= path.stat().st_size, path


def test_without_fallocate_room_is_made_by_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate")  # macOS
    monkeypatch.delattr(os, "fdatasync")
    rig = Rig(open_local(tmp_path / "store", 100, page_bytes=4096, durability="flush"), 4096)
    assert rig.write(Block(1)) == [COPIED_AND_STORED]
    rig.engine.close()
    rig = Rig(open_local(tmp_path / "store", 800, page_bytes=4096), 4096)
    assert rig.read(Block(1)) == [LOADED]
    data = (tmp_path / "store" / "shard-000.data").stat()
    assert data.st_size == 4096 + 800 * 4096
    rig.engine.close()


# --- opening --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "field"),
    [({"page_bytes": PAGE * 2}, "page_bytes"), ({"shards": 3}, "num_of_shard")],
)
def test_another_geometry_is_an_error_that_changes_nothing(
    tmp_path: Path, change: dict[str, int], field: str
) -> None:
    rig = Rig(open_local(tmp_path / "store", 8))
    rig.write(Block(1))
    rig.engine.close()
    before = snapshot(tmp_path / "store")
    with pytest.raises(StoreFormatError) as caught:
        open_local(tmp_path / "store", 8, **change)  # type: ignore[arg-type]
    assert caught.value.field == field  # type: ignore[attr-defined]
    assert snapshot(tmp_path / "store") == before


def of_another_version(directory: Path) -> None:
    fields = json.loads((directory / "store.json").read_text())
    del fields["crc"]
    fields["version"] = fmt.FORMAT_VERSION + 1
    fields["crc"] = description._crc({k: v for k, v in fields.items() if k != "crc"})
    (directory / "store.json").write_text(json.dumps(fields))


def shards_of_another_version(directory: Path) -> None:
    (directory / "store.json").unlink()
    raw = bytearray((directory / "shard-000.data").read_bytes())
    header = np.frombuffer(raw, fmt.SHARD_HEADER, 1)
    header["version"] = fmt.FORMAT_VERSION + 1
    header["crc"] = fmt.header_crc(header, fmt.SHARD_HEADER_CRC)
    (directory / "shard-000.data").write_bytes(raw)


def with_a_shard_of_another_store(directory: Path) -> None:
    open_local(directory.parent / "other", 8).close()
    shutil.copy(directory.parent / "other" / "shard-000.slots", directory)


@pytest.mark.parametrize(
    "spoil", [of_another_version, shards_of_another_version, with_a_shard_of_another_store]
)
def test_what_is_not_this_store_is_an_error_that_changes_nothing(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    open_local(tmp_path / "store", 8).close()
    spoil(tmp_path / "store")
    before = snapshot(tmp_path / "store")
    with pytest.raises(StoreFormatError):
        open_local(tmp_path / "store", 8)
    assert snapshot(tmp_path / "store") == before


@pytest.mark.parametrize("content", [None, b"", b"{}", b"garbage", b'{"format": "lightmem"}'])
def test_a_lost_description_is_made_anew_from_the_shards(
    tmp_path: Path, content: bytes | None
) -> None:
    rig = Rig(open_local(tmp_path / "store", 8, shards=2))
    rig.write(Block(1), Block(2), Block(3))
    rig.engine.close()
    before = description.load(tmp_path / "store")
    (tmp_path / "store" / "store.json").unlink()
    if content is not None:
        (tmp_path / "store" / "store.json").write_bytes(content)
    rig = Rig(open_local(tmp_path / "store", 8, shards=2))
    assert rig.read(Block(1), Block(2), Block(3)) == [LOADED] * 3
    rig.engine.close()
    assert description.load(tmp_path / "store") == before


def test_the_id_of_a_store_may_end_in_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    monkeypatch.setattr(os, "urandom", lambda n: bytes(range(1, n)) + b"\0")
    rig = Rig(open_local(one, 8))
    rig.write(Block(1))
    rig.engine.close()
    store_id = description.load(one).store_id
    assert store_id.endswith("0f00")
    (one / "store.json").unlink()
    rig = Rig(open_local(one, 8))
    assert rig.read(Block(1)) == [LOADED]
    rig.engine.close()
    assert description.load(one).store_id == store_id
    monkeypatch.undo()
    open_local(other, 8).close()
    (one / "shard-000.slots").replace(other / "shard-000.slots")
    with pytest.raises(StoreFormatError, match="another store") as caught:
        open_local(other, 8)
    assert caught.value.found == store_id  # type: ignore[attr-defined]


def test_what_a_killed_process_was_about_to_rename_is_removed(tmp_path: Path) -> None:
    open_local(tmp_path / "store", 8).close()
    for name in ("index.12345.tmp", "store.json.99.tmp", "my.tmp"):
        (tmp_path / "store" / name).write_bytes(bytes(10))
    open_local(tmp_path / "store", 8).close()
    assert [p.name for p in (tmp_path / "store").glob("*.tmp")] == ["my.tmp"]


def test_an_index_is_not_made_anew_under_others(tmp_path: Path) -> None:
    rig = Rig(open_local(tmp_path / "store", 8))
    rig.write(Block(1))
    (tmp_path / "store" / "index").rename(tmp_path / "index")
    with pytest.raises(StoreBusyError) as caught:
        open_local(tmp_path / "store", 8)
    said = str(caught.value)
    assert f"is open in: server {os.getpid()}. " in said
    assert f"light-mem rebuild {tmp_path / 'store'} --force" in said
    assert [o.pid for o in caught.value.owners] == [os.getpid()]  # type: ignore[attr-defined]
    (tmp_path / "index").rename(tmp_path / "store" / "index")
    other = Rig(open_local(tmp_path / "store", 8))
    assert other.read(Block(1)) == [LOADED]
    other.engine.close()
    rig.engine.close()


def test_opening_what_is_no_store_leaves_no_descriptor(tmp_path: Path) -> None:
    with pytest.raises(StoreFormatError):
        LocalStorageEngine(tmp_path, kind="tool")
    open_local(tmp_path / "store", 8).close()
    (tmp_path / "store" / "index").unlink()
    with pytest.raises(OSError, match="index"):
        LocalStorageEngine(tmp_path / "store", kind="tool")


def test_the_last_one_to_leave_syncs_the_owners_before_the_index_is_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    for cls, name in ((Owners, "flush"), (IndexFile, "mark_clean")):
        real = getattr(cls, name)
        monkeypatch.setattr(cls, name, lambda it, n=name, r=real: (steps.append(n), r(it)))
    open_local(tmp_path / "store", 8).close()
    assert steps == ["flush", "mark_clean"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_opening_that_breaks_off_as_it_marks_the_index_leaves_no_member(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def fail(_: IndexFile) -> None:
        raise error(errno.EIO, "device")

    open_local(tmp_path / "store", 8).close()
    with monkeypatch.context() as patch:
        patch.setattr(IndexFile, "mark_open", fail)
        with pytest.raises(error):
            open_local(tmp_path / "store", 8)
    owners = Owners(tmp_path / "store")
    assert not owners.others()
    assert owners.alive() == []
    owners.close()


def test_a_refused_opening_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(open_local(tmp_path / "store", 8))
    rig.write(Block(1))
    rig.engine.close()
    (tmp_path / "store" / "store.json").unlink()
    before = snapshot(tmp_path / "store")
    monkeypatch.setattr(opening, "describe", lambda _: None)
    with pytest.raises(StoreFormatError, match="nothing was changed"):
        open_local(tmp_path / "store", 8)
    after = snapshot(tmp_path / "store")
    assert {name: after[name] for name in before} == before
