"""`light-mem verify` and its library: every kind of damage is found, named, and put right."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from light_mem.index import format as fmt
from light_mem.maintenance import verify
from tests.children import ROOT
from tests.engine_helpers import Block
from tests.maintenance_helpers import (
    BLOCKS,
    PAGE,
    SLOTS,
    Command,
    assert_holds,
    assert_reads,
    entries_of,
    files,
    flip,
    index_of,
    key_of,
    make_store,
    place_of,
    stored,
)


def test_a_sound_store_is_clean_and_no_byte_of_it_changes(store: Path, command: Command) -> None:
    before = files(store)
    assert command("verify", store) == 0
    assert "clean" in command.out
    assert "20 blocks read" in command.out
    code, report = command.json("verify", store, "--jobs", 3)
    assert code == 0
    assert report["clean"]
    assert report["blocks"] == len(BLOCKS)
    assert report["nbytes"] == sum(b.pages for b in BLOCKS) * PAGE
    assert files(store) == before


def test_an_empty_store_is_clean(tmp_path: Path, command: Command) -> None:
    make_store(tmp_path / "store", [])
    assert command("verify", tmp_path / "store") == 0


@pytest.mark.parametrize("block", [BLOCKS[0], BLOCKS[3], BLOCKS[19]])
@pytest.mark.parametrize("last", [False, True])
def test_a_flipped_byte_names_its_block_and_repair_drops_it_alone(
    store: Path, command: Command, block: Block, last: bool
) -> None:
    flip(store, block, block.pages * PAGE - 1 if last else 0)
    before = files(store)
    code, report = command.json("verify", store)
    assert code == 1
    shard, slot = place_of(store, block)
    assert report["damaged"] == [
        {
            "key": key_of(block),
            "shard": shard,
            "slot": slot,
            "nbytes": block.pages * PAGE,
            "problem": "its bytes do not fit its checksum",
        }
    ]
    assert report["findings"] == []
    assert files(store) == before
    assert command("verify", store) == 1
    assert key_of(block) in command.out
    assert command("verify", store, "--repair") == 1
    assert "put right" in command.out
    assert command("verify", store) == 0
    assert_holds(store, *[b for b in BLOCKS if b is not block])


@pytest.mark.parametrize("field", ["low", "tag", "checksum", "nbytes", "run"])
def test_a_flipped_bit_of_an_entry_costs_no_block_whose_record_and_bytes_are_right(
    store: Path, command: Command, field: str
) -> None:
    block = BLOCKS[1]
    shard, slot = place_of(store, block)
    entries_of(store, shard)[field][slot] ^= 2
    assert command("verify", store) == 1
    assert command("verify", store, "--repair") == 1
    assert command("verify", store) == 0, command.out
    assert_reads(store, *BLOCKS)


def test_repair_beside_an_older_index_lists_what_lies_in_the_shards(
    tmp_path: Path, command: Command
) -> None:
    """As a backup of one file alone leaves it: what the index lists is gone, others have its
    slots."""
    store = make_store(tmp_path / "store", [Block(10**6 + n) for n in range(8)])
    older = (store / "index").read_bytes()
    assert command("clear", store) == 0, command.out
    make_store(store, BLOCKS)
    assert stored(store) == {key_of(block) for block in BLOCKS}
    (store / "index").write_bytes(older)
    whole = tmp_path / "rebuilt"
    shutil.copytree(store, whole)
    assert command("rebuild", whole) == 0
    assert command("verify", store, "--repair") == 1
    assert command("verify", store) == 0, command.out
    assert stored(store) == stored(whole)
    assert_reads(store, *BLOCKS)


def test_repair_counts_what_it_drops(store: Path) -> None:
    for block in BLOCKS[:3]:
        flip(store, block)
    report = verify(store, repair=True)
    assert report.repaired == 3
    assert report.sound
    assert not report.clean
    assert int(index_of(store).control["damaged"].sum()) == 3
    assert int(index_of(store).control["removals"].sum()) == 3


def test_a_byte_between_the_blocks_is_nobodys(store: Path, command: Command) -> None:
    with (store / "shard-000.data").open("r+b") as file:
        file.seek(fmt.SHARD_HEADER_BYTES + (SLOTS - 1) * PAGE)
        file.write(b"x" * PAGE)
    assert command("verify", store) == 0


def test_blocks_larger_than_a_piece_are_checked_to_their_end(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("light_mem.maintenance.data_file.PIECE_BYTES", PAGE + 100)
    store = make_store(tmp_path / "store")
    assert command("verify", store) == 0
    flip(store, BLOCKS[3], 4 * PAGE - 1)
    code, report = command.json("verify", store)
    assert code == 1
    assert [d["key"] for d in report["damaged"]] == [key_of(BLOCKS[3])]


def test_blocks_of_several_runs_are_checked_run_by_run(tmp_path: Path, command: Command) -> None:
    store, block = fragmented(tmp_path)
    assert command("verify", store) == 0
    shard, slot = place_of(store, block)
    entry = entries_of(store, shard)[slot]
    second = int(entry["next_run"]) - 1
    assert second >= 0
    with (store / f"shard-{shard:03}.data").open("r+b") as file:
        file.seek(fmt.SHARD_HEADER_BYTES + second * PAGE)
        file.write(b"spoilt")
    code, report = command.json("verify", store)
    assert code == 1
    assert [d["key"] for d in report["damaged"]] == [key_of(block)]
    assert command("verify", store, "--repair") == 1
    assert command("verify", store) == 0
    assert key_of(block) not in stored(store)


def fragmented(tmp_path: Path) -> tuple[Path, Block]:
    """A store with a block in several runs: its shard had free slots here and there only."""
    from tests.maintenance_helpers import opened

    store = tmp_path / "store"
    rig = opened(store, slots=8, shards=1)
    small = [Block(n) for n in range(8)]
    rig.write(*small)
    rig.delete(small[1], small[3], small[6])
    block = Block(100, 3)
    rig.write(block)
    rig.engine.close()
    return store, block


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["store.json", "index", "shard-001.slots"])
@pytest.mark.parametrize("how", ["missing", "cut", "garbage"])
def test_a_lost_file_that_others_can_replace_costs_no_block(
    store: Path, command: Command, name: str, how: str
) -> None:
    spoil_file(store / name, how)
    code, report = command.json("verify", store)
    assert code == 1
    assert not report["damaged"]
    code, report = command.json("verify", store, "--repair")
    assert report["sound"], report["remaining"]
    assert command("verify", store) == 0
    # Only the index knows the order of use; without it that of writing is left.
    assert_holds(store, *(reversed(BLOCKS) if name == "index" else BLOCKS))


def spoil_file(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "cut":
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    else:
        size = path.stat().st_size
        path.write_bytes(np.random.default_rng(3).integers(0, 256, size, np.uint8).tobytes())


@pytest.mark.parametrize("how", ["missing", "cut", "garbage"])
def test_lost_data_costs_its_blocks_and_no_other(store: Path, command: Command, how: str) -> None:
    spoil_file(store / "shard-001.data", how)
    kept = [b for b in BLOCKS if place_of(store, b)[0] == 0]
    lost = {key_of(b) for b in BLOCKS if place_of(store, b)[0] == 1}
    code, report = command.json("verify", store)
    assert code == 1
    named = {d["key"] for d in report["damaged"]}
    assert named == lost if how != "cut" else named <= lost
    assert command("verify", store, "--repair") == 1
    assert command("verify", store) == 0
    assert {key_of(b) for b in kept} <= stored(store)
    assert not stored(store) & named


def test_a_shard_of_another_store_is_left_alone(
    store: Path, tmp_path: Path, command: Command
) -> None:
    make_store(tmp_path / "other", [Block(5)])
    shutil.copy(tmp_path / "other" / "shard-001.data", store / "shard-001.data")
    before = files(store)
    for more in ([], ["--repair"]):
        code, report = command.json("verify", store, *more)
        assert code == 1
        assert "foreign" in {finding["kind"] for finding in report["findings"]}
        assert not report["sound"]
        assert command("verify", store, *more) == 1
        assert "put the right file back" in command.out
    assert files(store) == before


def test_without_an_index_damage_is_found_through_the_records(
    store: Path, command: Command
) -> None:
    flip(store, BLOCKS[7])
    (store / "index").unlink()
    code, report = command.json("verify", store)
    assert code == 1
    assert [d["key"] for d in report["damaged"]] == [key_of(BLOCKS[7])]
    assert [f["kind"] for f in report["findings"]] == ["index"]
    assert not (store / "index").exists()


def test_a_kill_is_unfinished_and_no_damage(store: Path, command: Command) -> None:
    index_of(store).control["dirty"][1] = 1
    (store / "index.999999.tmp").write_bytes(b"half")
    code, report = command.json("verify", store)
    assert code == 0
    assert len(report["unfinished"]) == 2
    assert command("verify", store) == 0
    assert "unfinished, no damage: shard 1" in command.out


def test_progress_is_told_and_reaches_the_end(store: Path) -> None:
    told: list[tuple[int, int]] = []
    report = verify(store, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (report.nbytes, report.nbytes)


def test_a_sector_that_cannot_be_read_costs_its_block_only(
    store: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = BLOCKS[6]
    shard, slot = place_of(store, block)
    bad = fmt.SHARD_HEADER_BYTES + slot * PAGE
    inode = (store / f"shard-{shard:03}.data").stat().st_ino
    preadv = os.preadv

    def failing(descriptor: int, buffers: list[memoryview], at: int) -> int:
        mine = os.fstat(descriptor).st_ino == inode
        if mine and at <= bad < at + sum(map(len, buffers)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, buffers, at)

    monkeypatch.setattr(os, "preadv", failing)
    code, report = command.json("verify", store)
    assert code == 1
    assert [d["key"] for d in report["damaged"]] == [key_of(block)]
    assert "cannot be read" in report["damaged"][0]["problem"]
    assert command("verify", store, "--repair") == 1
    monkeypatch.undo()
    assert command("verify", store) == 0
    assert_holds(store, *[b for b in BLOCKS if b is not block])


def test_a_store_on_a_file_system_that_cannot_be_written_is_checked_all_the_same(
    store: Path, tmp_path: Path
) -> None:
    flip(store, BLOCKS[2])
    code = (
        "import sys; from light_mem.cli import main\n"
        "sys.exit(max(main([name, sys.argv[1]]) for name in ('inspect', 'dump', 'verify')))"
    )
    mount = f"mount --bind '{store}' '{store}' && mount -o remount,ro,bind '{store}' && exec \"$@\""
    alone = ["unshare", "-m", "sh", "-c", mount, "sh"]
    if os.getuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("only root mounts")
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount")
    done = subprocess.run(
        [*alone, sys.executable, "-c", code, str(store)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert key_of(BLOCKS[2]) in done.stdout
    assert done.stderr == ""
