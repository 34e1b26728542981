"""A holder of a shard's lock that is stopped, continued, killed; a pid that was reused."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from light_mem.engine import local
from light_mem.engine.base import Outcome
from light_mem.engine.process import is_alive
from light_mem.index.keys import as_key, mix_one, shard_of
from light_mem.index.owners import process_start
from tests.children import ROOT
from tests.engine_helpers import Block, Rig, open_local

HOLDER = """
import sys
from light_mem.engine.local import LocalStorageEngine
engine = LocalStorageEngine(sys.argv[1], kind="test")
with engine.change(0):
    print("held", flush=True)
    sys.stdin.readline()
print("free", flush=True)
sys.stdin.readline()
engine.close()
"""


@contextmanager
def holder(directory: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(open_local(tmp_path / "store", 8, block_pages=2))
    assert rig.write(Block(1, 2))[0][-1] is Outcome.STORED
    yield rig
    rig.engine.close()
    vars(rig).clear()


def test_others_go_on_while_a_holder_is_stopped_and_it_goes_on_afterwards(
    tmp_path: Path, rig: Rig
) -> None:
    with holder(tmp_path / "store") as process:
        os.kill(process.pid, signal.SIGSTOP)
        started = time.monotonic()
        assert rig.read(Block(1, 2)) == [Outcome.LOADED]  # reading takes no lock
        assert time.monotonic() - started < 5
        os.kill(process.pid, signal.SIGCONT)
        assert process.stdin
        assert process.stdout
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "free\n"
        assert rig.write(Block(2, 2))[0][-1] is Outcome.STORED
        assert rig.read(Block(1, 2), Block(2, 2)) == [Outcome.LOADED] * 2


def test_a_write_that_meets_a_stopped_holder_fails_in_time(
    tmp_path: Path, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = rig.engine
    assert isinstance(engine, local.LocalStorageEngine)
    change = engine.change
    monkeypatch.setattr(engine, "change", lambda shard, timeout=0.2: change(shard, timeout))
    with holder(tmp_path / "store") as process:
        os.kill(process.pid, signal.SIGSTOP)
        assert rig.write(Block(2, 2)) == [(Outcome.FAILED,)]
    # It was killed: the kernel has freed its lock, and the shard is put in order.
    assert rig.write(Block(2, 2))[0][-1] is Outcome.STORED
    assert rig.read(Block(1, 2), Block(2, 2)) == [Outcome.LOADED] * 2


def test_a_pid_with_another_start_time_is_another_process() -> None:
    started = process_start(os.getpid())
    assert is_alive(os.getpid(), started)
    assert not is_alive(os.getpid(), started - 100)


FILLER = """
import os, signal, sys
from light_mem.engine import filling
from light_mem.engine.local import LocalStorageEngine
from tests.engine_helpers import Block, Rig
rig = Rig(LocalStorageEngine(sys.argv[1], kind="worker"))  # tidies nothing up
filling.Filler.fill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
rig.write(*(Block(int(key)) for key in sys.argv[2:]))
"""


def keys_of(shard: int, count: int) -> list[int]:
    found = (k for k in itertools.count(1000) if shard_of(mix_one(*as_key(k)), 2) == shard)
    return list(itertools.islice(found, count))


def test_slots_of_the_dead_in_other_shards_do_not_wait_for_it(tmp_path: Path) -> None:
    rig = Rig(open_local(tmp_path / "store", 8, shards=2, block_pages=2))
    full = keys_of(1, 9)
    for keys in (keys_of(0, 2), full[:8]):  # killed while they fill two slots, and a whole shard
        command = [sys.executable, "-c", FILLER, str(tmp_path / "store"), *map(str, keys)]
        assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    assert rig.engine.stats()["used_slots"] == 10
    with holder(tmp_path / "store"):
        assert rig.write(Block(full[8]))[0][-1] is Outcome.STORED
        assert rig.engine.stats()["used_slots"] == 3
    rig.engine.reclaim()
    assert rig.engine.stats()["used_slots"] == 1
    rig.engine.close()
