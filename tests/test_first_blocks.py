"""An idle worker gets ready: its first blocks find imported and opened what they need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest import mock

from light_mem.engine import open_shards
from light_mem.engine.base import Outcome
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.shard_file import ShardFile
from light_mem.engine.shard_header import data_path
from tests.engine_helpers import COPIED_AND_STORED, Block, Rig, let_go, open_local
from tests.service_child import ROOT

SHARDS = 4
SLOTS = 64

# What a worker has imported before and after its first blocks.
FIRST_BLOCKS = """
import sys
from pathlib import Path
import numpy as np
from light_mem.engine.base import BlockIO
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.places import Rows

engine = LocalStorageEngine(Path(sys.argv[1]), kind="worker")
for _ in range(int(sys.argv[2])):
    engine.rest()
memory = np.full((1, engine.geometry.page_bytes), 7, np.uint8)
batch = [BlockIO(n, 0, Rows(memory, np.array([0]))) for n in range(32)]
outcomes = []
before = set(sys.modules)
engine.write(batch, lambda them, outcome: outcomes.extend([outcome.name] * len(them)))
engine.read(batch, lambda them, outcome: outcomes.extend([outcome.name] * len(them)))
print(outcomes.count("STORED"), outcomes.count("LOADED"), *sorted(set(sys.modules) - before))
engine.close()
"""


def first_blocks(store: Path, rests: int) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", FIRST_BLOCKS, str(store), str(rests)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.split()


def test_the_first_blocks_of_a_worker_that_rested_import_nothing(tmp_path: Path) -> None:
    for name, rests in ("rested", SHARDS), ("at once", 0):
        store = tmp_path / name
        engine = open_local(store, SLOTS, shards=SHARDS)
        engine.close()
        let_go(engine)
        stored, loaded, *imported = first_blocks(store, rests)
        assert (stored, loaded) == ("32", "32")
        assert ("filelock" in imported) == (name == "at once"), imported
        if name == "rested":
            assert imported == []


def test_a_worker_that_rested_has_every_shard_open(tmp_path: Path) -> None:
    open_local(tmp_path / "store", SLOTS, shards=SHARDS).close()
    engine = LocalStorageEngine(tmp_path / "store", kind="worker")
    assert [engine.rest() for _ in range(SHARDS)] == [True] * SHARDS
    assert not engine.rest()  # else it would never sleep
    blocks = [Block(key) for key in range(32)]
    with (
        mock.patch.object(open_shards, "ShardFile", side_effect=AssertionError),
        mock.patch("light_mem.index.shard.open_shard", side_effect=AssertionError),
    ):
        rig = Rig(engine)
        assert rig.write(*blocks) == [COPIED_AND_STORED] * len(blocks)
        assert rig.read(*blocks) == [Outcome.LOADED] * len(blocks)
    engine.close()


def test_a_shard_that_cannot_be_opened_is_left_to_its_first_block(tmp_path: Path) -> None:
    open_local(tmp_path / "store", SLOTS, shards=SHARDS).close()
    data_path(tmp_path / "store", 1).rename(tmp_path / "elsewhere")
    data_path(tmp_path / "store", 1).symlink_to(tmp_path / "elsewhere")
    engine = LocalStorageEngine(tmp_path / "store", kind="worker")
    with mock.patch.object(open_shards, "ShardFile", wraps=ShardFile) as opened:
        while engine.rest():
            pass
    assert [call.args[2] for call in opened.call_args_list] == [0, 1]
    rig = Rig(engine)
    outcomes = {rig.write(Block(key))[0][-1] for key in range(32)}
    assert outcomes == {Outcome.STORED, Outcome.FAILED}
    engine.close()
