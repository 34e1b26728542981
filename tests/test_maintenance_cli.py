"""`light-mem` itself: help, exit codes, JSON; and what `inspect` and `dump` show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from light_mem import cli
from light_mem.commands.arguments import age, hash_value, size
from light_mem.index import keys as keymath
from light_mem.maintenance import inspect
from tests.children import ROOT
from tests.engine_helpers import Block
from tests.maintenance_helpers import (
    BLOCKS,
    PAGE,
    SHARDS,
    SLOTS,
    Command,
    files,
    flip,
    index_of,
    key_of,
    make_store,
    opened,
    place_of,
    records_of,
)
from tests.payload import block_bytes_of

COMMANDS = {  # and what they need to run on a store
    "inspect": [],
    "dump": [],
    "verify": [],
    "rebuild": [],
    "export": ["x.lmx"],
    "import": ["x.lmx"],
    "resize": ["--storage-size", str(2 * SHARDS * SLOTS * PAGE)],
    "clear": [],
    "evict": ["--older-than", "1w"],
}
READ_ONLY = ["inspect", "dump", "verify"]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_store(tmp_path / "store")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.mark.parametrize("name", [*COMMANDS, "demo"])
def test_every_command_explains_itself_with_examples_and_exit_codes(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main([name, "--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert f"  light-mem {name}" in text
    assert "exit code: 0" in text


def test_the_whole_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert all(f"    {name} " in text for name in COMMANDS)


def test_the_document_describes_every_command() -> None:
    document = (ROOT / "docs" / "tools.md").read_text()
    for name in COMMANDS:
        assert f"## light-mem {name}" in document
    options = {
        word.strip("`,")
        for line in document.splitlines()
        if line.startswith("| `--")
        for word in line.split("|")[1].split()
        if word.startswith("`--")
    }
    assert options == {
        "--json", "--shards", "--output", "--limit", "--repair", "--jobs", "--dry-run", "--force",
        "--hashes", "--overwrite", "--storage-size", "--older-than",
    }  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_speaks_json(store: Path, command: Command, name: str) -> None:
    command("export", store, "x.lmx")
    more = ["--overwrite"] if name == "export" else []
    code, report = command.json(name, store, *COMMANDS[name], *more)
    assert code == 0
    assert isinstance(report, dict)
    assert command.err == "" or name == "resize"


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("what", ["nothing", "a file", "an empty directory", "other files"])
def test_what_is_no_store_is_exit_code_2_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command, name: str, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_store(tmp_path / "source", [Block(1)])
    command("export", tmp_path / "source", "x.lmx")
    target = tmp_path / "target"
    if what == "a file":
        target.write_text("text")
    elif what != "nothing":
        target.mkdir()
    if what == "other files":
        (target / "shard-000.data").write_bytes(b"not a shard" * 1000)
        (target / "index").write_bytes(b"not an index")
    before = files(tmp_path)
    more = ["--overwrite"] if name == "export" else []
    assert command(name, target, *COMMANDS[name], *more) == 2
    assert f"light-mem {name}: " in command.err
    assert command.out == ""
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_another_format_version_is_exit_code_2_and_stays(
    store: Path, command: Command, name: str
) -> None:
    from light_mem.index import description

    command("export", store, "x.lmx")
    fields = json.loads((store / "store.json").read_text())
    del fields["crc"]
    fields["version"] = 99
    fields["crc"] = description._crc(fields)
    (store / "store.json").write_text(json.dumps(fields))
    before = files(store)
    more = ["--overwrite"] if name == "export" else []
    assert command(name, store, *COMMANDS[name], *more) == 2
    assert "99" in command.err
    assert files(store) == before


def test_wrong_arguments_are_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["nonsense"], ["resize", "x"], ["verify", "x", "--jobs", "0"]):
        with pytest.raises(SystemExit) as error:
            cli.main(arguments)
        assert error.value.code == 2
    capsys.readouterr()


def test_a_reader_that_has_seen_enough_is_no_error(store: Path) -> None:
    code = "import sys; from light_mem.cli import main; sys.exit(main(sys.argv[1:]))"
    dump = subprocess.Popen(
        [sys.executable, "-c", code, "dump", str(store)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert dump.stdout is not None
    dump.stdout.close()
    assert dump.stderr is not None
    assert dump.stderr.read() == b""
    assert dump.wait() == 0
    dump.stderr.close()


@pytest.mark.parametrize(
    ("text", "count"),
    [("1000", 1000), ("64K", 65536), ("1.5GiB", 3 << 29), ("2T", 2 << 40), ("3MB", 3 * 10**6)],
)
def test_sizes(text: str, count: int) -> None:
    assert size(text) == count


@pytest.mark.parametrize("text", ["", "G", "-1", "1X", "0", "1 000"])
def test_what_is_no_size(text: str) -> None:
    import argparse

    with pytest.raises(argparse.ArgumentTypeError):
        size(text)


def test_ages_and_hashes() -> None:
    assert [age(t) for t in ("90s", "1.5m", "2h", "7d", "2w")] == [90, 90, 7200, 604800, 1209600]
    assert [hash_value(t) for t in ("a", "int:12", "int:0xff", "hex:00ff")] == [
        "a", 12, 255, b"\x00\xff",
    ]  # fmt: skip


# --- inspect --------------------------------------------------------------------------------------


def test_inspect_shows_the_numbers(store: Path, command: Command) -> None:
    before = files(store)
    file = index_of(store)
    file.count(30, 20)
    code, report = command.json("inspect", store)
    assert code == 0
    pages = sum(b.pages for b in BLOCKS)
    assert report["format_version"] == 1
    assert (report["shards"], report["slots"], report["page_bytes"]) == (SHARDS, SLOTS, PAGE)
    assert report["capacity"] == SHARDS * SLOTS * PAGE
    assert (report["blocks"], report["block_bytes"]) == (len(BLOCKS), pages * PAGE)
    assert report["used_slots"] == pages
    assert (report["lookups"], report["hits"]) == (30, 20)
    assert (report["inserts"], report["evictions"], report["damaged"]) == (len(BLOCKS), 0, 0)
    assert report["owners"] == []
    assert report["index_state"] == "ok"
    assert report["oldest_use"] < report["median_use"] < report["newest_use"]
    assert sum(shard["blocks"] for shard in report["by_shard"]) == len(BLOCKS)
    assert command("inspect", store, "--shards") == 0
    for text in ("20,", "30, 20 hits, 66.7%", "0 processes", "2 of 64 slots"):
        assert text in command.out
    file.count(-30, -20)
    assert files(store) == before


def test_inspect_says_who_has_the_store_open(store: Path, command: Command) -> None:
    rig = opened(store)
    code, report = command.json("inspect", store)
    assert code == 0
    assert [(o["pid"], o["kind"]) for o in report["owners"]] == [(os.getpid(), "server")]
    assert command("inspect", store) == 0
    assert f"{os.getpid()}" in command.out
    assert "1 process\n" in command.out.replace(" ", "").replace("1process", "1 process")
    rig.engine.close()
    assert inspect(store).owners == ()


def test_inspect_without_an_index_counts_the_records(store: Path, command: Command) -> None:
    (store / "index").write_bytes(b"garbage")
    code, report = command.json("inspect", store)
    assert code == 0
    assert report["blocks"] == len(BLOCKS)
    assert report["index_state"] != "ok"
    assert report["lookups"] is None
    assert report["newest_use"] is None
    assert report["newest_write"] is not None
    assert command("inspect", store) == 0
    assert "cannot be used" in command.out


# --- dump -----------------------------------------------------------------------------------------


def test_dump_lists_every_block(store: Path, command: Command) -> None:
    before = files(store)
    code, report = command.json("dump", store)
    assert code == 0
    assert {b["key"]: b["pages"] for b in report["blocks"]} == {key_of(b): b.pages for b in BLOCKS}
    assert command("dump", store) == 0
    lines = command.out.splitlines()
    assert len(lines) == 1 + len(BLOCKS)
    assert lines[0].split()[:3] == ["key", "shard", "slot"]
    assert command("dump", store, "--limit", 3) == 0
    assert len(command.out.splitlines()) == 4
    assert files(store) == before


def test_dump_shows_a_block_and_writes_its_bytes(
    store: Path, tmp_path: Path, command: Command
) -> None:
    block = BLOCKS[3]
    code, report = command.json("dump", store, key_of(block), "--output", "block.bin")
    assert code == 0
    assert (report["key"], report["pages"], report["problem"]) == (key_of(block), 4, "")
    assert (report["shard"], report["slot"]) == place_of(store, block)
    wanted = block_bytes_of(block.key, block.pages, PAGE)
    assert (tmp_path / "block.bin").read_bytes() == wanted.tobytes()
    assert command("dump", store, f"int:{block.key}") == 0
    assert "the bytes fit it" in command.out
    assert command("dump", store, key_of(block), "--output", "block.bin") == 2  # it is there
    assert command("dump", store, "--output", "other.bin") == 2


def test_dump_of_a_hash_uses_the_servers_way_to_a_key(tmp_path: Path, command: Command) -> None:
    rig = opened(tmp_path / "store")
    for value in ("prefix", b"\x01\x02"):
        low, high = keymath.as_key(value)
        rig.write(Block(high << 64 | low))
    rig.engine.close()
    assert command("dump", tmp_path / "store", "prefix") == 0
    assert command("dump", tmp_path / "store", "hex:0102") == 0
    assert command("dump", tmp_path / "store", "0102") == 1
    assert "is not stored" in command.err


def test_dump_does_not_write_damaged_bytes(store: Path, tmp_path: Path, command: Command) -> None:
    flip(store, BLOCKS[3])
    code, report = command.json("dump", store, key_of(BLOCKS[3]), "--output", "block.bin")
    assert code == 1
    assert report["problem"] == "its bytes do not fit its checksum"
    assert not (tmp_path / "block.bin").exists()


def test_dump_says_when_a_block_has_no_record(store: Path, command: Command) -> None:
    shard, slot = place_of(store, BLOCKS[0])
    records_of(store, shard)["tag"][slot] = 0
    assert command("dump", store, key_of(BLOCKS[0])) == 0
    assert "no record" in command.out
