"""`light-mem rebuild` while other processes have the store open; and from a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from light_mem.engine.base import Outcome
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.shard_file import ShardFile
from light_mem.errors import StoreBusyError, StoreFormatError
from light_mem.index import format as fmt
from light_mem.index.shard import ShardIndex
from light_mem.maintenance import in_place, rebuild, rebuilding
from light_mem.maintenance.inspecting import listed
from light_mem.maintenance.owners import Ownership
from light_mem.maintenance.store import Store
from tests.children import ROOT, line
from tests.maintenance_helpers import (
    BLOCKS,
    Command,
    assert_holds,
    files,
    index_of,
    key_of,
    opened,
    records_of,
    stored,
)


def missing(store: Path) -> None:
    (store / "index").unlink()


def garbage(store: Path) -> None:
    size = (store / "index").stat().st_size
    content = np.random.default_rng(1).integers(0, 256, size, np.uint8).tobytes()
    (store / "index").write_bytes(content)


def zero_entries(store: Path) -> None:
    index_of(store).entries[:] = np.zeros((), fmt.ENTRY)


def header(store: Path) -> None:
    """Only the header is garbage: what the entries say can still be believed."""
    with (store / "index").open("r+b") as file:
        file.write(b"garbage" * 500)


def nothing(store: Path) -> None:
    pass


def chains(store: Path) -> None:
    index_of(store).heads[:] = 12345


SERVER = """
import sys
from tests.maintenance_helpers import BLOCKS, opened
from pathlib import Path
from typing import Any
rig = opened(Path(sys.argv[1]))
print("open", flush=True)
for command in sys.stdin:
    if command.strip() == "read":
        print(*[outcome.name for outcome in rig.read(*BLOCKS)], flush=True)
    elif command.strip() == "write":
        print(rig.write(*[type(BLOCKS[0])(5000 + n) for n in range(6)])[0][-1].name, flush=True)
    else:
        break
rig.engine.close()
"""


class Server:
    """Another process that has the store open."""

    def __init__(self, store: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(store)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        assert line(self._process) == "open"

    def ask(self, what: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return line(self._process)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate("end\n")
        assert self._process.returncode == 0


def test_it_refuses_while_another_process_has_the_store_open_and_names_it(
    store: Path, command: Command
) -> None:
    with Server(store) as server:
        before = files(store)
        assert command("rebuild", store) == 2
        assert str(server.pid) in command.err
        with pytest.raises(StoreBusyError, match=f"server {server.pid}") as error:
            rebuild(store)
        assert [owner.pid for owner in error.value.owners] == [server.pid]
        after = files(store)
        after.pop("open.lock", None)
        before.pop("open.lock", None)
        assert after == before
        assert rebuild(store, dry_run=True).blocks == len(BLOCKS)
    assert command("rebuild", store) == 0


@pytest.mark.parametrize("spoil", [nothing, chains, zero_entries], ids=lambda f: f.__name__)
def test_forced_the_index_is_corrected_under_the_running_server(
    store: Path, command: Command, spoil: Callable[[Path], None]
) -> None:
    with Server(store) as server:
        spoil(store)
        code, report = command.json("rebuild", store, "--force")
        assert code == 0
        assert report["in_place"]
        assert report["blocks"] == len(BLOCKS)
        assert report["restart"] == []
        assert server.ask("read") == " ".join(["LOADED"] * len(BLOCKS))
        assert server.ask("write") == "STORED"
        assert command("verify", store) == 0, command.out
    assert command("verify", store) == 0
    assert {key_of(b) for b in BLOCKS} <= stored(store)


def test_forced_over_a_garbage_header_servers_see_the_corrected_index(
    store: Path, command: Command
) -> None:
    with Server(store) as server:
        header(store)
        assert command("rebuild", store, "--force") == 0
        assert server.ask("read") == " ".join(["LOADED"] * len(BLOCKS))
    assert command("verify", store) == 0


def test_forced_with_the_index_gone_it_says_who_must_be_restarted(
    store: Path, command: Command
) -> None:
    with Server(store) as server:
        missing(store)
        code, report = command.json("rebuild", store, "--force")
        assert code == 1
        assert [owner["pid"] for owner in report["restart"]] == [server.pid]
        missing(store)
        assert command("rebuild", store, "--force") == 1
        assert str(server.pid) in command.out
    rig = opened(store)
    assert rig.read(*BLOCKS) == [Outcome.LOADED] * len(BLOCKS)
    rig.engine.close()


def test_forced_without_others_it_is_the_usual_way(store: Path, command: Command) -> None:
    garbage(store)
    code, report = command.json("rebuild", store, "--force")
    assert code == 0
    assert not report["in_place"]
    assert_holds(store, *reversed(BLOCKS))


def test_the_tool_in_a_checkout_does_the_same(store: Path) -> None:
    garbage(store)
    script = ROOT / "tools" / "recover_index.py"
    environment = {**os.environ, "PYTHONPATH": ""}
    for arguments, code in (
        (["verify"], 1),
        (["rebuild", "--dry-run"], 0),
        (["rebuild"], 0),
        (["verify"], 0),
        (["inspect"], 2),
    ):
        done = subprocess.run(
            [sys.executable, str(script), arguments[0], str(store), *arguments[1:]],
            cwd="/",
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
    assert_holds(store, *reversed(BLOCKS))


def test_an_index_of_another_version_that_is_in_use_stays_as_it_is(store: Path) -> None:
    rig = opened(store)
    try:
        file = index_of(store)
        file.header["version"] = 2
        file.header["crc"] = fmt.header_crc(file.header, fmt.INDEX_HEADER_CRC)
        before = files(store)
        with pytest.raises(StoreBusyError, match="version 2"):
            rebuild(store, force=True)
        assert files(store) == before
        with pytest.raises(StoreFormatError, match="another version") as caught:
            LocalStorageEngine(store, kind="worker")  # of a server before an upgrade
        error: Any = caught.value
        assert (error.path, error.field) == (str(store), "index")
        assert "version 2" in error.found
        assert error.expected == f"an index of version {fmt.INDEX_VERSION}"
    finally:
        rig.engine.close()


def test_times_of_use_that_were_lost_are_those_of_storing(store: Path) -> None:
    rig = opened(store)
    try:
        index_of(store).uses[:] = 0
        rebuild(store, force=True)
    finally:
        rig.engine.close()
    assert_holds(store, *BLOCKS)


def test_without_an_index_the_records_say_what_was_taken_out(store: Path) -> None:
    (store / "index").unlink()
    seen = Store(store)
    [part, *_] = listed(seen)
    shard, slot, entry = part.shard, int(part.heads[0]), part.rows[0]
    assert seen.still_lists(shard, slot, entry)
    records_of(store, shard)["tag"][slot] = fmt.FREE
    assert not seen.still_lists(shard, slot, entry)


def test_an_index_is_not_marked_clean_while_it_is_changed(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last server leaves, and marks it clean, right after it was seen."""
    server = opened(store).engine
    seen: list[int] = []
    look, correct = rebuilding.Ownership, in_place._correct

    def look_and_leave(directory: Path) -> Ownership:
        found = look(directory)
        server.close()
        return found

    def note(of: Store, index: ShardIndex, file: ShardFile) -> tuple[int, int]:
        seen.append(int(index_of(store).header["clean"][0]))
        return correct(of, index, file)

    monkeypatch.setattr(rebuilding, "Ownership", look_and_leave)
    monkeypatch.setattr(in_place, "_correct", note)
    assert rebuild(store, force=True).in_place
    assert set(seen) == {0}
    assert int(index_of(store).header["clean"][0]) == 1
