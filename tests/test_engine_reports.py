"""What an engine tells of blocks, and when, though others store, die, wait or close meanwhile."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from light_mem.engine import reading
from light_mem.engine.base import BlockIO, Outcome
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.places import Rows
from light_mem.engine.shard_file import ShardFile
from light_mem.errors import ServiceClosedError
from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.index.chains import Chains
from tests.engine_helpers import (
    COPIED_AND_STORED,
    PAGE,
    Block,
    Rig,
    assert_consistent,
    let_go,
    open_local,
)
from tests.local_rig import another, local_of, rig, states

__all__ = ["rig"]  # fixtures


def test_loaded_blocks_are_told_of_before_anybody_waits_for_a_lock(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged block is taken out under the shard's lock, which a stopped process may hold."""
    blocks = [Block(n) for n in range(4)]
    rig.write(*blocks)
    path = local_of(rig).directory / "shard-000.data"
    with path.open("r+b") as file:
        file.seek(4096 + 3 * PAGE)
        file.write(bytes(8))
    told: list[tuple[list[int], Outcome]] = []
    seen: list[list[tuple[list[int], Outcome]]] = []
    drop_damaged = LocalStorageEngine.drop_damaged

    def look(*arguments: Any) -> None:
        seen.append(list(told))
        drop_damaged(*arguments)

    monkeypatch.setattr(LocalStorageEngine, "drop_damaged", look)
    batch = rig._batch(blocks, fill=False)
    rig.engine.read(batch, lambda at, outcome: told.append((list(at), outcome)))
    assert seen == [[([0, 1, 2], Outcome.LOADED)]]
    assert told[1:] == [([3], Outcome.DAMAGED)]


def test_loaded_blocks_are_told_of_by_the_megabyte(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "GROUP_BYTES", 3 * PAGE)
    blocks = [Block(0), Block(1), Block(2), Block(3, 4), Block(4)]
    rig.write(*blocks)
    told: list[tuple[list[int], Outcome]] = []
    batch = rig._batch(blocks, fill=False)
    rig.engine.read(batch, lambda at, outcome: told.append((list(at), outcome)))
    assert [at for at, _ in told] == [[0, 1, 2], [3], [4]]
    assert {outcome for _, outcome in told} == {Outcome.LOADED}


def test_a_record_of_a_block_that_another_process_stored_first_goes(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_records = ShardFile.write_records
    with another(tmp_path) as other:

        def late(file: ShardFile, blocks: Any) -> None:
            write_records(file, blocks)
            monkeypatch.setattr(ShardFile, "write_records", write_records)
            assert Rig(other).write(Block(1)) == [COPIED_AND_STORED]

        monkeypatch.setattr(ShardFile, "write_records", late)
        assert rig.write(Block(1), Block(2)) == [
            (Outcome.COPIED, Outcome.PRESENT),
            COPIED_AND_STORED,
        ]
        records = other.file(0).records
        listed = np.flatnonzero(records["tag"] == fmt.LIVE).tolist()
        assert listed == np.flatnonzero(np.array(states(rig)) == fmt.LIVE).tolist()
        assert len(listed) == 2


def test_one_that_another_process_chained_and_died_before_it_was_counted_is_found(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    write_records, put_in = ShardFile.write_records, Chains.put_in

    def die(*arguments: Any) -> None:
        put_in(*arguments)
        raise Killed

    with another(tmp_path) as other:

        def late(file: ShardFile, blocks: Any) -> None:
            write_records(file, blocks)
            monkeypatch.setattr(ShardFile, "write_records", write_records)
            with monkeypatch.context() as patch:
                patch.setattr(Chains, "put_in", die)
                with pytest.raises(Killed):
                    Rig(other).write(Block(1))

        monkeypatch.setattr(ShardFile, "write_records", late)
        assert rig.write(Block(1)) == [(Outcome.COPIED, Outcome.PRESENT)]
        assert states(rig).count(fmt.LIVE) == 1
        assert rig.read(Block(1)) == [Outcome.LOADED]
        assert_consistent(local_of(rig)._index)


def test_after_a_batch_no_intent_is_left(rig: Rig) -> None:
    engine = local_of(rig)
    rig.write(*[Block(n) for n in range(5)])
    rig.write(Block(6))
    assert not engine._owners.records["intents"][engine._owner.number].any()


def test_a_read_tells_of_what_it_has_before_it_opens_a_shard(
    tmp_path: Path,
) -> None:
    engine = open_local(tmp_path / "s", 64, page_bytes=1 << 20, shards=2)
    blocks = [Block(n) for n in range(24)]
    assert Rig(engine, 1 << 20).write(*blocks) == [COPIED_AND_STORED] * 24
    shards = [engine.lookup.find_one(b.key, 0) // engine.geometry.slots for b in blocks]
    engine.close()
    let_go(engine)
    engine = LocalStorageEngine(tmp_path / "s", kind="worker")
    engine.file(0)
    told: list[int] = []
    opened: list[int] = []
    open_file = engine._open.file

    def note(shard: int) -> ShardFile:
        opened.append(sum(told))
        return open_file(shard)

    engine._reader._engine.file = note  # type: ignore[method-assign]
    # Nothing is cold, and so nothing is opened beforehand.
    engine._reader._device.begin = lambda *_, **__: {}  # type: ignore[method-assign]
    memory = np.zeros((24, 1 << 20), np.uint8)
    batch = [
        BlockIO(*keymath.as_key(block.key), Rows(memory, np.array([n])))
        for n, block in enumerate(blocks)
    ]
    engine.read(batch, lambda positions, outcome: told.append(len(positions)))
    assert sum(told) == 24
    assert opened == [shards.count(0)]
    engine.close()


def test_what_a_closed_engine_goes_on_writing_goes_to_no_other_file(
    tmp_path: Path, rig: Rig
) -> None:
    """`close` in the middle of a batch, from a signal's handler say, frees a descriptor that the
    next file to be opened gets."""
    engine = local_of(rig)
    memory = np.full((4, PAGE), 0xAB, np.uint8)
    batch = [BlockIO(*keymath.as_key(n), Rows(memory, np.array([n], np.intp))) for n in range(4)]
    others: list[int] = []

    def report(_: Sequence[int], outcome: Outcome) -> None:
        if outcome is Outcome.COPIED and not others:
            engine.close()
            others.extend(os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT) for _ in range(16))

    with suppress(ServiceClosedError):
        engine.write(batch, report)
    assert others
    assert os.path.getsize(tmp_path / "other") == 0
    for descriptor in others:
        os.close(descriptor)
