"""`light-mem export` and `import`: what goes over is right, and what is damaged is named."""

from __future__ import annotations

import errno
import fcntl
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from light_mem import BlockNotStoredError, ExportExistsError, StoreBusyError, maintenance
from light_mem.index import keys as keymath
from light_mem.index.keys import as_key, key_text
from light_mem.index.shard import ShardIndex
from light_mem.maintenance import export_store, import_store
from tests.engine_helpers import Block, open_local
from tests.maintenance_helpers import (
    BLOCKS,
    PAGE,
    Command,
    assert_holds,
    files,
    flip,
    key_of,
    make_store,
    order_of_use,
    stored,
)


def test_a_store_goes_over_with_its_order_of_use(
    store: Path, tmp_path: Path, command: Command
) -> None:
    before = files(store)
    code, report = command.json("export", store, tmp_path / "x")
    assert code == 0
    assert report["blocks"] == len(BLOCKS)
    assert files(store) == before
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["x"]
    target = make_store(tmp_path / "target", [])
    code, report = command.json("import", target, tmp_path / "x")
    assert code == 0
    assert report["complete"]
    assert report["blocks"] == len(BLOCKS)
    assert report["nbytes"] == sum(b.pages for b in BLOCKS) * PAGE
    assert command("verify", target) == 0
    assert_holds(target, *BLOCKS)


@pytest.mark.parametrize(("shards", "slots"), [(1, 128), (5, 32)])
def test_another_number_of_shards_will_do(
    exported: Path, tmp_path: Path, command: Command, shards: int, slots: int
) -> None:
    target = make_store(tmp_path / "target", [], shards=shards, slots=slots)
    assert command("import", target, exported) == 0
    assert command("verify", target) == 0
    assert_holds(target, *BLOCKS, shards=shards, slots=slots)


def test_an_import_makes_the_store_when_told_its_size(
    exported: Path, tmp_path: Path, command: Command
) -> None:
    assert command("import", tmp_path / "new", exported) == 2
    assert not (tmp_path / "new").exists()
    size = 128 * PAGE
    assert command("import", tmp_path / "new", exported, "--storage-size", size) == 0
    assert_holds(tmp_path / "new", *BLOCKS, shards=1, slots=128)


def test_an_import_makes_no_store_that_no_server_could_open(
    exported: Path, tmp_path: Path, command: Command
) -> None:
    least = 2 * 64 * PAGE
    sizes = ["--storage-size", least - 1, "--shards", 2]
    for dry_run in ([], ["--dry-run"]):
        assert command("import", tmp_path / "new", exported, *sizes, *dry_run) == 2
        assert str(least) in command.err
        assert not (tmp_path / "new").exists()


def test_what_is_asked_of_a_store_that_is_there_is_not_ignored(
    exported: Path, tmp_path: Path, command: Command
) -> None:
    target, size = tmp_path / "new", 128 * PAGE
    asked = ["--storage-size", size, "--shards", 2]
    for _ in range(2):  # an import that was broken off is run again as it was
        assert command("import", target, exported, *asked) == 0
        assert command.err == ""
    assert command("import", target, exported, "--storage-size", 2 * size) == 0
    assert f"keeps its size of {size} bytes, not {2 * size}" in command.err
    before = files(target)
    for more in ([], ["--dry-run"]):
        assert command("import", target, exported, "--shards", 3, *more) == 2
        assert "has 2 shards and keeps them: it cannot have 3" in command.err
    assert files(target) == before


def test_a_file_of_hashes_is_utf8_in_any_locale(
    store: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = tmp_path / "hashes"
    hashes.write_bytes(b"\xff\xfe\n")
    assert command("export", store, tmp_path / "x", "--hashes", hashes) == 2
    assert f"light-mem export: {hashes} is no UTF-8 text" in command.err
    hashes.write_bytes(b"\n a b \r\na\rb\n")  # only the ends of lines are none of a hash
    assert command("export", store, tmp_path / "y", "--hashes", hashes, "--json") == 1
    assert json.loads(command.out)["missing"] == [key_text(*as_key(h)) for h in (" a b ", "a\rb")]
    hashes.write_bytes("größe\n".encode())
    # As for a program in the locale C.
    monkeypatch.setattr("io.text_encoding", lambda encoding, _=2: encoding or "ascii")
    assert command("export", store, tmp_path / "x", "--hashes", hashes) == 1
    assert "größe" in command.out


def test_pages_of_another_size_are_refused(
    exported: Path, tmp_path: Path, command: Command
) -> None:
    open_local(tmp_path / "target", 64, page_bytes=2 * PAGE).close()
    before = files(tmp_path / "target")
    for more in ([], ["--dry-run"]):
        assert command("import", tmp_path / "target", exported, *more) == 2
        assert "1024" in command.err
    assert files(tmp_path / "target") == before


def test_a_block_of_another_length_is_replaced(
    exported: Path, tmp_path: Path, command: Command
) -> None:
    others = [Block(b.key, b.pages % 4 + 1) for b in BLOCKS[:5]]
    target = make_store(tmp_path / "target", others)
    code, report = command.json("import", target, exported, "--dry-run")
    assert (code, report["present"], report["blocks"]) == (0, 0, len(BLOCKS))
    code, report = command.json("import", target, exported)
    assert (code, report["present"], report["blocks"]) == (0, 0, len(BLOCKS))
    assert_holds(target, *BLOCKS)


@pytest.mark.parametrize("dry_run", [False, True])
def test_an_export_of_an_index_that_was_replaced_meanwhile_fails(
    store: Path, tmp_path: Path, dry_run: bool
) -> None:
    once: list[None] = [None]

    def replace(done: int, total: int) -> None:
        if once and done < total // 2:
            once.clear()
            maintenance.rebuild(store)

    with pytest.raises(StoreBusyError, match="replaced meanwhile"):
        maintenance.export_store(store, tmp_path / "x", dry_run=dry_run, progress=replace)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == []


def test_chosen_hashes_go_over_and_missing_ones_are_named(
    store: Path, tmp_path: Path, command: Command
) -> None:
    chosen = f"\ufeffint:{BLOCKS[2].key}\n\n{key_of(BLOCKS[4])}\r\nnever\u2028stored\n"
    (tmp_path / "list").write_text(chosen, encoding="utf-8", newline="")
    code, report = command.json(
        "export", store, tmp_path / "x", f"int:{BLOCKS[0].key}", "--hashes", tmp_path / "list"
    )
    assert code == 1
    assert report["blocks"] == 3
    assert report["missing"] == [keymath.key_text(*keymath.as_key("never\u2028stored"))]
    target = make_store(tmp_path / "target", [])
    assert command("import", target, tmp_path / "x") == 0
    assert order_of_use(target) == [key_of(BLOCKS[n]) for n in (0, 2, 4)]


def test_a_damaged_block_is_left_out_of_the_export(
    store: Path, tmp_path: Path, command: Command
) -> None:
    flip(store, BLOCKS[6])
    code, report = command.json("export", store, tmp_path / "x")
    assert code == 1
    assert [d["key"] for d in report["damaged"]] == [key_of(BLOCKS[6])]
    target = make_store(tmp_path / "target", [])
    assert command("import", target, tmp_path / "x") == 0  # the file is whole
    assert_holds(target, *[b for b in BLOCKS if b is not BLOCKS[6]])


def test_a_file_that_is_there_stays_unless_told(
    store: Path, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "x").write_text("precious")
    assert command("export", store, tmp_path / "x") == 2
    assert (tmp_path / "x").read_text() == "precious"
    assert command("export", store, tmp_path / "x", "--dry-run", "--overwrite") == 0
    assert (tmp_path / "x").read_text() == "precious"
    assert command("export", store, tmp_path / "x", "--overwrite") == 0
    assert command("export", store, tmp_path) == 2


def test_an_export_without_its_index_reads_the_records(
    store: Path, tmp_path: Path, command: Command
) -> None:
    (store / "index").unlink()
    assert command("export", store, tmp_path / "x") == 0
    target = make_store(tmp_path / "target", [])
    import_store(target, tmp_path / "x")
    assert_holds(target, *reversed(BLOCKS))


def test_two_exports_to_one_file_do_not_mix(store: Path, tmp_path: Path, command: Command) -> None:
    part = tmp_path / ".x.light-mem-part"
    with part.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert command("export", store, tmp_path / "x") == 2
        assert not (tmp_path / "x").exists()
    assert command("export", store, tmp_path / "x") == 0  # what a killed one left is in no way
    assert not part.exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_export_that_ends_just_before_another_takes_its_file_over_stays_whole(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    target, whole = tmp_path / "x", tmp_path / "whole"
    flock = fcntl.flock

    def flock_late(descriptor: int, how: int) -> None:
        """The other export has opened the file of the first, which comes to its end now."""
        monkeypatch.undo()
        export_store(store, target)
        whole.write_bytes(target.read_bytes())
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock_late)
    if overwrite:
        export_store(store, target, overwrite=True)
    else:
        with pytest.raises(ExportExistsError) as caught:
            export_store(store, target)
        assert isinstance(caught.value, FileExistsError)
        assert caught.value.path == str(target)
        assert target.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["whole", "x"]
    left = make_store(tmp_path / "target", [])
    assert import_store(left, target).complete
    assert_holds(left, *BLOCKS)


# --- imports --------------------------------------------------------------------------------------


def test_an_import_again_stores_nothing_again(
    exported: Path, tmp_path: Path, command: Command
) -> None:
    target = make_store(tmp_path / "target", BLOCKS[:5])
    code, report = command.json("import", target, exported)
    assert code == 0
    assert (report["blocks"], report["present"]) == (len(BLOCKS) - 5, 5)
    code, report = command.json("import", target, exported)
    assert code == 0
    assert (report["blocks"], report["present"]) == (0, len(BLOCKS))
    assert stored(target) == {key_of(b) for b in BLOCKS}


def test_a_dry_run_checks_the_file_and_changes_nothing(
    exported: Path, tmp_path: Path, command: Command
) -> None:
    target = make_store(tmp_path / "target", BLOCKS[:5])
    before = files(target)
    code, report = command.json("import", target, exported, "--dry-run")
    assert code == 0
    assert (report["blocks"], report["present"]) == (len(BLOCKS) - 5, 5)
    assert files(target) == before
    assert command("import", tmp_path / "none", exported, "--dry-run") == 0
    assert not (tmp_path / "none").exists()


def test_nothing_is_evicted_for_an_import_and_the_last_used_come_in(
    exported: Path, tmp_path: Path, command: Command
) -> None:
    mine = [Block(1, 4), Block(2, 4), Block(3, 4)]
    target = make_store(tmp_path / "target", mine, slots=32, shards=1)
    code, report = command.json("import", target, exported)
    assert code == 1
    assert report["no_room"] == len(BLOCKS) - report["blocks"] > 0
    assert {key_of(b) for b in mine} <= stored(target)
    assert command("verify", target) == 0
    # 20 of 32 slots were free: blocks of 1, 2, 3, 4 pages twice, the last used first.
    assert stored(target) - {key_of(b) for b in mine} == {key_of(b) for b in BLOCKS[:8]}
    assert command("import", target, exported) == 1
    assert "no free room" in command.out


def test_a_block_that_cannot_be_stored_ends_the_import_and_says_which(
    store: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    command.json("export", store, tmp_path / "x")
    monkeypatch.setattr(ShardIndex, "are_marked", lambda _, slots, owner: [False] * len(slots))
    with pytest.raises(BlockNotStoredError, match="could not be stored: FAILED") as caught:
        import_store(tmp_path / "target", tmp_path / "x", storage_size=1 << 22, shards=1)
    error: Any = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(error, OSError)
    assert (error.outcome, error.errno) == ("FAILED", errno.EIO)
    assert error.key in map(key_of, BLOCKS)
    assert error.key in str(error)
