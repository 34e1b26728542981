"""A store that is mounted read-only where it is looked at, and in use elsewhere: a sidecar."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from light_mem import maintenance
from light_mem.engine.base import Outcome
from light_mem.engine.local import LocalStorageEngine
from light_mem.errors import LockTimeoutError
from light_mem.index.locks import PathLock, RangeLock
from light_mem.index.owners import Owners
from light_mem.maintenance.owners import Ownership
from tests.engine_helpers import Block, let_go
from tests.maintenance_helpers import BLOCKS, opened
from tests.service_child import ROOT

Look = Callable[..., tuple[int, str]]


@pytest.fixture
def sidecar(store: Path) -> Look:
    """Runs `light-mem COMMAND STORE ...` where the store is mounted read-only; returns its exit
    code and what it says."""
    mounted = store.parent / "mounted"
    mounted.mkdir()
    mount = f"mount --bind '{store}' '{mounted}' && mount -o remount,ro,bind '{mounted}'"
    through = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    if os.getuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("only root mounts")
    if subprocess.run([*through, "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount")

    def run(command: str, *options: str) -> tuple[int, str]:
        light_mem = [sys.executable, "-m", "light_mem", command, str(mounted), *options]
        done = subprocess.run(
            [*through, *light_mem], capture_output=True, text=True, cwd=ROOT, timeout=60
        )
        return done.returncode, done.stdout + done.stderr

    return run


def test_who_has_it_open_is_seen(store: Path, sidecar: Look) -> None:
    engine = opened(store).engine
    pid = os.getpid()
    code, text = sidecar("inspect", "--json")
    found: dict[str, Any] = json.loads(text)
    assert code == 0
    assert [(owner["pid"], owner["kind"]) for owner in found["owners"]] == [(pid, "server")]
    code, text = sidecar("rebuild")
    assert (code, f"server {pid}" in text) == (2, True), text
    engine.close()
    assert json.loads(sidecar("inspect", "--json")[1])["owners"] == []


def test_a_server_is_counted(store: Path, sidecar: Look) -> None:
    pytest.importorskip("prometheus_client")
    engine = opened(store).engine
    for command in ("metrics", "stats"):
        code, text = sidecar(command)
        assert code == 0
        assert "no server has it open" not in text
    assert "lightmem_unseen_services" in sidecar("metrics")[1]
    engine.close()


def test_what_is_being_written_is_no_damage(store: Path, sidecar: Look) -> None:
    rig = opened(store)
    assert isinstance(rig.engine, LocalStorageEngine)
    seen = []

    def report(_: Sequence[int], outcome: Outcome) -> None:
        if outcome is Outcome.COPIED:
            seen.append(maintenance.inspect(store).writing_blocks)
            seen.append(sidecar("verify")[0])

    rig.engine.write(rig._batch([Block(7777, 3)], fill=True), report)
    rig.engine.close()
    assert seen == [1, 0]


def test_nothing_is_changed_there(store: Path, sidecar: Look) -> None:
    for command in ("inspect", "dump", "stats", "verify", "doctor"):
        assert "Traceback" not in sidecar(command)[1]
    code, text = sidecar("evict", "--older-than", "1w")
    assert (code, "Read-only" in text) == (2, True)
    assert maintenance.verify(store).blocks == len(BLOCKS)


# --- what it stands on ----------------------------------------------------------------------------


def test_owners_are_seen_without_the_right_to_write(tmp_path: Path) -> None:
    one = Owners(tmp_path)
    me = one.join("server")
    me.announce(0, (1, 2))
    looking = Owners(tmp_path, writable=False)
    try:
        assert [owner.pid for owner in looking.alive()] == [os.getpid()]
        assert looking.is_alive(me.number)
        assert looking.others()
        assert not looking.records.flags.writeable
        me.leave()
        assert (looking.alive(), looking.others()) == ([], False)
    finally:
        one.close()
        looking.close()
        let_go(one, looking)


def test_whoever_only_looks_makes_no_owners_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Owners(tmp_path, writable=False)
    assert not Ownership(tmp_path).alive
    (tmp_path / "owners").write_bytes(b"")
    assert not Ownership(tmp_path).alive
    assert (tmp_path / "owners").read_bytes() == b""


def test_a_lock_is_asked_for_but_not_taken_through_a_read_only_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "ranges"
    path.touch()
    one, looking = RangeLock(path), RangeLock(path, os.open(path, os.O_RDONLY))
    assert one.try_lock(3)
    assert looking.locked_by_another(3)
    assert not looking.locked_by_another(4)
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        looking.try_lock(4)
    one.close()
    looking.close()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_shard_is_held_still_without_the_right_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path, open_any = tmp_path / "shard-000.lock", os.open

    def open_to_read(name: Any, flags: int, *args: Any, **options: Any) -> int:
        if str(name) == str(path) and flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(code, os.strerror(code), str(name))
        return open_any(name, flags, *args, **options)

    monkeypatch.setattr(os, "open", open_to_read)
    with pytest.raises(OSError, match=os.strerror(code)):
        PathLock(path).acquire("me")
    os.close(open_any(path, os.O_CREAT | os.O_RDWR))
    with PathLock(path).hold():
        holds = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        done = subprocess.run([sys.executable, "-c", holds, path], capture_output=True)
        assert b"BlockingIOError" in done.stderr
        with pytest.raises(LockTimeoutError), PathLock(path).hold(timeout=0):
            pass
