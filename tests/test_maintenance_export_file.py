"""The export file: its bytes, and what is got out of one that is damaged."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from light_mem.errors import StoreFormatError
from light_mem.index import keys as keymath
from light_mem.maintenance import export_store, import_store
from light_mem.maintenance import transfer_format as fmt
from tests.engine_helpers import Block
from tests.maintenance_helpers import (
    BLOCKS,
    PAGE,
    Command,
    assert_holds,
    entries_of,
    files,
    key_of,
    make_store,
    place_of,
    stored,
)

PART = fmt.ALIGN


def offset_of(exported: Path, block: Block) -> int:
    """Where the header of a block lies in an export."""
    low = keymath.as_key(block.key)[0]
    raw = exported.read_bytes()
    for at in range(PART, len(raw), PART):
        header = np.frombuffer(raw, fmt.BLOCK_HEADER, 1, at)[0]
        if int(header["magic"]) == fmt.BLOCK_MAGIC and int(header["low"]) == low:
            return at
    raise AssertionError("not exported")


def spoil(path: Path, at: int, content: bytes = b"\xa5") -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


@pytest.mark.parametrize("number", [0, 7, 19])
def test_damaged_bytes_cost_their_block_only(
    exported: Path, tmp_path: Path, command: Command, number: int
) -> None:
    spoil(exported, offset_of(exported, BLOCKS[number]) + PART + 5)
    target = make_store(tmp_path / "target", [])
    code, report = command.json("import", target, exported)
    assert code == 1
    assert [d["key"] for d in report["damaged"]] == [key_of(BLOCKS[number])]
    assert report["problems"] == []
    assert command("import", target, exported, "--dry-run") == 1
    assert key_of(BLOCKS[number]) in command.out
    assert_holds(target, *[b for b in BLOCKS if b is not BLOCKS[number]])


@pytest.mark.parametrize("number", [0, 7, 19])
@pytest.mark.parametrize("at", range(0, PART, 9))
def test_a_damaged_header_costs_its_block_only(
    exported: Path, tmp_path: Path, number: int, at: int
) -> None:
    spoil(exported, offset_of(exported, BLOCKS[number]) + at)
    target = make_store(tmp_path / "target", [])
    report = import_store(target, exported)
    assert not report.complete
    assert len(report.problems) == 2  # the place, and the count
    assert stored(target) == {key_of(b) for b in BLOCKS} - {key_of(BLOCKS[number])}


def test_a_file_cut_anywhere_gives_the_whole_blocks_before(exported: Path, tmp_path: Path) -> None:
    whole = exported.read_bytes()
    starts = [offset_of(exported, block) for block in BLOCKS]
    target = make_store(tmp_path / "target", [])
    for cut in sorted(np.random.default_rng(0).integers(PART, len(whole) - 1, 25).tolist()):
        exported.write_bytes(whole[:cut])
        report = import_store(target, exported)
        assert not report.complete
        assert "cut short" in report.problems[-1]
        ends = [start + PART + b.pages * PAGE for start, b in zip(starts, BLOCKS, strict=True)]
        assert report.blocks + report.present == sum(end <= cut for end in ends)
    exported.write_bytes(whole)
    assert import_store(target, exported).complete
    assert_holds(target, *BLOCKS)


def test_a_lost_or_repeated_block_is_noticed_by_the_trailer(exported: Path, tmp_path: Path) -> None:
    whole = exported.read_bytes()
    start = offset_of(exported, BLOCKS[4])
    end = start + PART + BLOCKS[4].pages * PAGE
    target = make_store(tmp_path / "target", [])
    for spoilt in (
        whole[:start] + whole[end:],
        whole[:end] + whole[start:],
        whole[:start] + whole[end : end + PART + 2 * PAGE] + whole[start:end]
        + whole[end + PART + 2 * PAGE :],
    ):  # fmt: skip
        exported.write_bytes(spoilt)
        report = import_store(target, exported)
        assert not report.complete
        assert len(report.problems) == 1
        assert not report.damaged


@pytest.mark.parametrize("content", [b"", b"LMEXPORT", b"something else" * 100])
def test_what_is_no_export_is_refused(tmp_path: Path, command: Command, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    store = make_store(tmp_path / "store", [])
    before = files(store)
    assert command("import", store, tmp_path / "x") == 2
    assert "no export" in command.err
    assert command("import", store, tmp_path / "nowhere") == 2
    assert files(store) == before


def test_a_pipe_is_no_export_and_is_not_replaced_by_one(
    store: Path, tmp_path: Path, command: Command
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for arguments in (["--overwrite"], ["--overwrite", "--dry-run"]):
        assert command("export", store, pipe, *arguments) == 2
        assert f"{pipe} is no file" in command.err
    assert pipe.is_fifo()
    kept = os.open(pipe, os.O_RDWR)  # else an open would wait for who writes
    try:
        assert command("import", tmp_path / "new", pipe, "--storage-size", "1M") == 2
    finally:
        os.close(kept)
    assert f"{pipe} is no file" in command.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe", "store"]


@pytest.mark.parametrize("name", ["index", "shard-000.data", "blocks.lmx"])
def test_no_export_goes_into_the_store_itself(store: Path, command: Command, name: str) -> None:
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    assert command("export", store, store / name, "--overwrite") == 2
    assert "lies in the store itself" in command.err
    assert {path.name: path.read_bytes() for path in store.iterdir()} == before


def test_another_version_is_refused(exported: Path, tmp_path: Path) -> None:
    raw = bytearray(exported.read_bytes())
    header = np.frombuffer(raw, fmt.EXPORT_HEADER, 1)
    header["version"] = 3
    fmt.sealed(header)
    exported.write_bytes(raw)
    with pytest.raises(StoreFormatError, match="version 3") as error:
        import_store(make_store(tmp_path / "target", []), exported)
    assert (error.value.found, error.value.expected) == ("3", "1 or 2")


# --- the format -----------------------------------------------------------------------------------

DOCUMENT = (Path(__file__).parents[1] / "docs" / "tools.md").read_text()


@pytest.mark.parametrize("name", ["EXPORT_HEADER", "BLOCK_HEADER", "TRAILER"])
def test_the_document_lists_the_fields_of_each_part(name: str) -> None:
    dtype = getattr(fmt, name)
    section = DOCUMENT[DOCUMENT.index(f"### {name}, {dtype.itemsize} bytes") :]
    rows = [
        tuple(cell.strip().strip("`") for cell in line.strip("|").split("|")[:3])
        for line in section.split("\n\n")[1].splitlines()[2:]
    ]
    assert rows == [
        (str(dtype.fields[f][1]), str(dtype.fields[f][0].itemsize), f) for f in dtype.names
    ]


@pytest.mark.parametrize("options", [[], ["--storage-size", "2M"], ["--dry-run"]])
def test_pages_without_bytes_are_exit_code_2(
    exported: Path, store: Path, command: Command, options: list[str]
) -> None:
    raw = exported.read_bytes()
    header = np.frombuffer(raw[:PART], fmt.EXPORT_HEADER).copy()
    header["page_bytes"] = 0
    exported.write_bytes(fmt.sealed(header) + raw[PART:])
    for target in (store, store.parent / "new"):
        assert command("import", target, exported, *options) == 2
        assert f"{exported} says that a page has 0 bytes" in command.err
    assert not (store.parent / "new").exists()


def test_an_export_has_these_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "store", [Block(0x1122, 1)], shards=1)
    shard, slot = place_of(store, Block(0x1122, 1))
    checksum = int(entries_of(store, shard)["checksum"][slot])
    monkeypatch.setattr("light_mem.maintenance.exporting.time.time_ns", lambda: 0x55)
    export_store(store, tmp_path / "x")
    raw = (tmp_path / "x").read_bytes()
    assert len(raw) == 3 * PART + PAGE
    assert raw[:12].hex() == "4c4d4558504f5254" + "02000000"
    assert (
        raw[32:64].hex()
        == (
            PAGE.to_bytes(8, "little") + (0x55).to_bytes(8, "little") + (1).to_bytes(8, "little")
        ).hex()
        + 16 * "0"
    )
    assert raw[64:68] == b"MBLK"
    assert raw[72:96].hex() == "2211000000000000" + 16 * "0" + "0002000000000000"
    assert raw[96:104] == checksum.to_bytes(8, "little")
    assert raw[112:128] == bytes(16)
    assert raw[-64:-60] == b"MEND"
    assert raw[-56:-40].hex() == "0100000000000000" + "0002000000000000"
    assert os.stat(tmp_path / "x").st_mode & 0o777 == 0o600
