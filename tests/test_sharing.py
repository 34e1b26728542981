"""What a batch shares with other processes: two holds of its shard's lock, none to look or poll."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

BLOCKS = 48  # one batch of one shard
STORE = (
    "index: header",
    "index: control",
    "index: chains",
    "index: entries",
    "index: uses",
    "records",
)


@pytest.fixture(scope="module")
def counts() -> Any:
    tools = str(Path(__file__).resolve().parent.parent / "tools")
    sys.path.insert(0, tools)
    try:
        from benchmark.sharing import measure

        return measure(BLOCKS, slots=256)
    finally:
        sys.path.remove(tools)


def test_a_batch_of_writes_holds_its_shards_lock_twice_and_the_queue_once(counts: Any) -> None:
    assert counts["write"].shard_locks == 2
    assert counts["write"].queue_locks == 1


def test_reads_hold_no_shards_lock(counts: Any) -> None:
    assert counts["read"].shard_locks == 0
    assert counts["read"].queue_locks == 1


@pytest.mark.parametrize("what", ["look-up", "poll"])
def test_looking_and_polling_take_no_lock_and_no_system_call(counts: Any, what: str) -> None:
    assert counts[what].shard_locks == counts[what].queue_locks == 0
    assert counts[what].calls.total() == 0


def test_a_task_is_made_by_one_hold_of_the_queue_and_one_wake(counts: Any) -> None:
    for what in ("create", "create (write)"):
        assert counts[what].queue_locks == 1
        assert counts[what].shard_locks == 0
        assert counts[what].calls["futex"] <= 1


def test_system_calls_of_a_batch_do_not_grow_with_its_blocks_but_for_one_write_each(
    counts: Any,
) -> None:
    assert counts["read"].calls.total() < 10
    write = counts["write"].calls
    assert write.total() - write["pwritev"] - write["pwrite"] < 16
    assert write["pwritev"] + write["pwrite"] <= BLOCKS


def test_lines_that_every_process_of_every_server_may_write_are_no_more_than_one_a_call(
    counts: Any,
) -> None:
    for what, of in counts.items():
        assert of.lines["index: header"] <= 1, what
        # The order of use is one store a block found; a block written is an entry, a chain
        # and a record, and the entry of the one that it evicts.
        assert of.lines["index: entries"] <= 2 * BLOCKS, what
        assert of.lines["index: chains"] + of.lines["records"] <= 3 * BLOCKS, what
        assert of.lines["table: cells"] <= BLOCKS, what  # a block's cell is one line
    assert counts["look-up"].lines["index: control"] == 0
    assert not any(counts["read"].lines[part] for part in STORE), "readers would share lines"
    assert counts["poll"].lines == dict.fromkeys(counts["poll"].lines, 0)
