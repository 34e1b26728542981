"""`light-mem` itself: help, exit codes, JSON."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import light_mem
from light_mem import cli
from light_mem.commands.arguments import age, hash_value, size
from light_mem.index.format import FORMAT_VERSION
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
    make_store,
)

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
WRONG = {  # what is no store, and what is said of it
    "nothing": "it does not exist",
    "a file": "it is no directory",
    "a link": "it is a symlink that leads to no directory",
    "an empty directory": "it is empty",
    "other files": "it lacks ",
}
OPERATORS = ["stats", "top", "metrics", "doctor"]  # tests of their own


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_store(tmp_path / "store")


@pytest.mark.parametrize("name", [*COMMANDS, *OPERATORS, "demo"])
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
    assert all(f"    {name} " in text for name in (*COMMANDS, *OPERATORS))


@pytest.mark.parametrize("program", [["-m", "light_mem"], ["-m", "light_mem.cli"]])
def test_it_tells_its_version_and_runs_as_a_module(program: list[str]) -> None:
    said = subprocess.run(
        [sys.executable, *program, "--version"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert said == f"light-mem {light_mem.__version__}, store format {FORMAT_VERSION}\n"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_what_an_output_cannot_show_is_no_error(tmp_path: Path, encoding: str) -> None:
    store = make_store(tmp_path / "größe")
    for arguments in (["stats", store], ["dump", store, "größe"], ["inspect", f"{store}ł"]):
        done = subprocess.run(
            [sys.executable, "-m", "light_mem", *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True,
            text=True,
            encoding=encoding,
            check=False,
        )
        assert "Traceback" not in done.stderr
        assert "codec" not in done.stderr
        assert done.returncode == {"stats": 0, "dump": 1, "inspect": 2}[arguments[0]]
        if arguments[0] == "stats":
            assert ("größe" if encoding == "latin-1" else "gr\\xf6\\xdfe") in done.stdout
            assert "100.0% ####################" in done.stdout


def test_the_document_describes_every_command() -> None:
    document = (ROOT / "docs" / "tools.md").read_text()
    for name in (*COMMANDS, *OPERATORS):
        assert f"[`{name}`](#light-mem-{name})" in document
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
        "--interval", "--watch", "--once", "--port", "--address",
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
@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_store_is_exit_code_2_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command, name: str, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_store(tmp_path / "source", [Block(1)])
    command("export", tmp_path / "source", "x.lmx")
    target = tmp_path / "target"
    if what == "a file":
        target.write_text("text")
    elif what == "a link":
        target.symlink_to("nowhere")
    elif what != "nothing":
        target.mkdir()
    if what == "other files":
        (target / "shard-000.data").write_bytes(b"not a shard" * 1000)
        (target / "index").write_bytes(b"not an index")
    before = files(tmp_path)
    more = ["--overwrite"] if name == "export" else []
    assert command(name, target, *COMMANDS[name], *more) == 2
    assert f"light-mem {name}: {target} holds no store: {WRONG[what]}" in command.err
    assert ("--storage-size" in command.err) == (name == "import")
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


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_command_that_nobody_reads_ends_with_the_exit_code_of_what_it_found(
    store: Path, command: Command, as_json: list[str]
) -> None:
    assert command("export", store, "x.lmx") == 0
    codes = {("inspect",): 0, ("dump",): 0, ("clear", "--dry-run"): 0, ("verify",): 0}
    assert {call: unread(store, *call, *as_json) for call in codes} == codes
    assert unread(store, "export", "y.lmx", "none", *as_json) == 1
    assert unread(store, "stats", "--interval", "0.01", *as_json) == 0
    assert unread(store / "none", "verify", *as_json) == 2
    flip(store, BLOCKS[0])
    assert unread(store, "verify", *as_json) == 1
    assert unread(store, "dump", f"int:{BLOCKS[0].key}", *as_json) == 1
    assert unread(store, "dump", "none", *as_json) == 1


def unread(store: Path, name: str, *arguments: str) -> int:
    """The exit code of a command whose output and errors go to a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    line = [sys.executable, "-m", "light_mem", name, str(store), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, stdout=writing, stderr=writing, env=environment, check=False)
    os.close(writing)
    return done.returncode


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: COMMAND"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["resize", "x"], "--storage-size"),
        (["verify", "x", "--jobs", "0"], "above 0"),
        (["dump", "x", "--json", "a", "b"], "unrecognized arguments: a b"),
        (["dump", "x", "a", "--json", "b"], "unrecognized arguments: b"),
        (["export", "x", "y", "--json", "a", "--jsn"], "unrecognized arguments: a --jsn"),
        (["export", "x", "y", "--json", "int:z"], "argument HASH: no hash: 'int:z'"),
        (["verify", "x", "--json", "a"], "unrecognized arguments: a"),
        # Of a variable that is not set: the current directory may be a store.
        *[([name, "", *COMMANDS[name]], "argument STORE: it is empty") for name in COMMANDS],
        *[([name, ""], "argument STORE: it is empty") for name in ("stats", "top", "metrics")],
        (["doctor", ""], "argument DIR: it is empty"),
        (["demo", "--store", ""], "argument --store: it is empty"),
        (["export", "x", ""], "argument FILE: it is empty"),
        (["export", "x", "-"], "'-' does not stand for"),
        (["export", "x", "y", "--hashes", "-"], "'-' does not stand for"),
        (["import", "x", "-"], "'-' does not stand for"),
        (["dump", "x", "a", "--output", "-"], "'-' does not stand for"),
    ],
)
def test_wrong_arguments_are_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)  # what would be the store where an empty path were none
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    assert said in capsys.readouterr().err


def test_hashes_may_stand_behind_options(store: Path, command: Command) -> None:
    assert (
        command("export", store, "x.lmx", "int:1", "--dry-run", "int:2", "--json", "--", "-") == 1
    )
    assert len(json.loads(command.out)["missing"]) == 3
    one = f"int:{BLOCKS[0].key}"
    assert command.json("dump", store, one)[0] == 0
    shown = command.out
    for words in (["--json", one], ["--json", "--", one]):
        assert command("dump", store, *words) == 0
        assert command.out == shown


def test_no_line_ends_with_blanks(store: Path, command: Command) -> None:
    for name in (*COMMANDS, "stats", "doctor"):
        command(name, store, *COMMANDS.get(name, []))
        assert command.out
        assert not re.search(r" $", command.out, re.MULTILINE), name


@pytest.mark.parametrize("digits", [310, 400])
@pytest.mark.parametrize(
    "arguments",
    [
        "resize --storage-size {}",
        "evict --older-than {}w",
        "dump --limit {}",
        "import x --shards {}",
    ],
)
def test_a_number_that_is_too_long_is_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: str, digits: int
) -> None:
    name, *options = arguments.format("9" * digits).split()
    with pytest.raises(SystemExit) as error:
        cli.main([name, "x", *options])
    assert error.value.code == 2
    assert "99" in capsys.readouterr().err


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


def test_the_document_names_every_option_of_every_command() -> None:
    document = (ROOT / "docs" / "tools.md").read_text()
    for name in (*COMMANDS, *OPERATORS):
        section = document.partition(f"## light-mem {name}\n")[2].partition("\n## ")[0]
        synopsis = next(line for line in section.splitlines() if line.startswith("**SYNOPSIS**"))
        help_text = subprocess.run(
            [sys.executable, "-m", "light_mem.cli", name, "--help"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        usage = help_text.partition("\n\n")[0]
        options = set(re.findall(r"--[a-z-]+", usage)) - {"--help"}
        assert set(re.findall(r"--[a-z-]+", synopsis)) == options, name
