"""`light-mem verify` finds what contradicts itself in an index, and `--repair` puts it right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.maintenance.report import KINDS
from tests.maintenance_helpers import (
    BLOCKS,
    PAGE,
    SLOTS,
    Command,
    assert_holds,
    assert_reads,
    entries_of,
    files,
    index_of,
    place_of,
    records_of,
    reseal,
)

Spoil = Callable[[Path, int, int], None]  # store, shard and slot of one block of two pages


def state(store: Path, shard: int, slot: int) -> None:
    entries = entries_of(store, shard)
    free = int(np.flatnonzero(entries["run"] == 0)[-1])
    entries["tag"][free] = 9


def runs(store: Path, shard: int, slot: int) -> None:
    entries_of(store, shard)["run"][slot] = 40


def overlap(store: Path, shard: int, slot: int) -> None:
    """Another key's entry over the second slot, its record too; the counters agree."""
    entries, records = entries_of(store, shard), records_of(store, shard)
    for table in (entries, records):
        table[slot + 1] = table[slot]
        table["low"][slot + 1] += 100
        table["used"][slot + 1] -= 1
        table["run"][slot + 1] = 1
        table["nbytes"][slot + 1] = PAGE
    reseal(records, slot + 1)
    control = index_of(store).control
    control["blocks"][shard] += 1
    control["used_slots"][shard] += 1


def extent(store: Path, shard: int, slot: int) -> None:
    entries = entries_of(store, shard)
    free = int(np.flatnonzero(entries["run"] == 0)[-1])
    entries["tag"][free], entries["run"][free] = fmt.EXTENT, 1
    index_of(store).control["used_slots"][shard] += 1


def chain(store: Path, shard: int, slot: int) -> None:
    entries_of(store, shard)["next"][slot] = SLOTS + 7


def circle(store: Path, shard: int, slot: int) -> None:
    entries_of(store, shard)["next"][slot] = slot + 1


def unchained(store: Path, shard: int, slot: int) -> None:
    file = index_of(store)
    file.of_shard(shard).heads[:] = 0


def place(store: Path, shard: int, slot: int) -> None:
    """A key of the other shard."""
    entries, records = entries_of(store, shard), records_of(store, shard)
    other = next(
        n
        for n in range(10**6, 10**7)
        if keymath.shard_of(keymath.mix_one(*keymath.as_key(n)), 2) != shard
    )
    for table in (entries, records):
        table["low"][slot] = other
    reseal(records, slot)


def twin(store: Path, shard: int, slot: int) -> None:
    """The same key once more, in free slots."""
    entries, records = entries_of(store, shard), records_of(store, shard)
    free = int(np.flatnonzero(entries["run"] == 0)[-3])
    data = np.memmap(
        store / f"shard-{shard:03}.data", np.uint8, "r+", fmt.SHARD_HEADER_BYTES
    ).reshape(SLOTS, PAGE)
    data[free : free + 2] = data[slot : slot + 2]
    for table in (entries, records):
        table[free] = table[slot]
        table["used"][free] -= 1
    reseal(records, free)
    entries["next"][slot] = free + 1
    control = index_of(store).control
    control["blocks"][shard] += 1
    control["used_slots"][shard] += 2


def count(store: Path, shard: int, slot: int) -> None:
    index_of(store).control["blocks"][shard] += 1


def used_slots(store: Path, shard: int, slot: int) -> None:
    index_of(store).control["used_slots"][shard] -= 1


def pinned(store: Path, shard: int, slot: int) -> None:
    index_of(store).control["pinned"][shard] += 1


def expires(store: Path, shard: int, slot: int) -> None:
    """A time to live, in entry and record, that no eviction would look for."""
    entries_of(store, shard)["keep"][slot] = fmt.KEEP_TIME_MASK
    records = records_of(store, shard)
    records["keep"][slot] = fmt.KEEP_TIME_MASK
    reseal(records, slot)


def keep(store: Path, shard: int, slot: int) -> None:
    """A pin that only the record knows."""
    records = records_of(store, shard)
    records["keep"][slot] = fmt.KEEP_PINNED
    reseal(records, slot)


def held(store: Path, shard: int, slot: int) -> None:
    """A block taken out for whose lease nobody is there."""
    entries = entries_of(store, shard)
    free = int(np.flatnonzero(entries["run"] == 0)[-3])
    entries["tag"][free], entries["run"][free] = fmt.make_tag(fmt.HELD, 0, 5), 2
    index_of(store).control["used_slots"][shard] += 2


def record(store: Path, shard: int, slot: int) -> None:
    records_of(store, shard)["tag"][slot] = fmt.FREE


def torn_record(store: Path, shard: int, slot: int) -> None:
    records_of(store, shard)["crc"][slot] ^= 1


def other_record(store: Path, shard: int, slot: int) -> None:
    records = records_of(store, shard)
    records["checksum"][slot] += np.uint64(1)
    reseal(records, slot)


def stale(store: Path, shard: int, slot: int) -> None:
    records = records_of(store, shard)
    free = int(np.flatnonzero(entries_of(store, shard)["run"] == 0)[-3])
    records[free] = records[slot]
    records["low"][free] += 1
    reseal(records, free)


def leak(store: Path, shard: int, slot: int) -> None:
    entries = entries_of(store, shard)
    free = int(np.flatnonzero(entries["run"] == 0)[-3])
    entries["tag"][free], entries["run"][free] = fmt.make_tag(fmt.WRITING, 77, 5), 2
    index_of(store).control["used_slots"][shard] += 2


SPOILS: dict[Spoil, tuple[str, int]] = {  # the kind it must show, and how many blocks go
    state: ("state", 0),
    runs: ("runs", 0),
    overlap: ("overlap", 0),
    extent: ("extent", 0),
    chain: ("chain", 0),
    circle: ("chain", 0),
    unchained: ("unchained", 0),
    place: ("place", 1),
    twin: ("twin", 0),
    count: ("count", 0),
    used_slots: ("count", 0),
    pinned: ("count", 0),
    expires: ("count", 0),
    keep: ("record", 0),
    held: ("leak", 0),
    record: ("record", 0),
    torn_record: ("record", 0),
    other_record: ("record", 0),
    stale: ("stale", 0),
    leak: ("leak", 0),
}


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__)
def test_what_contradicts_itself_is_found_and_put_right(
    store: Path, command: Command, spoil: Spoil
) -> None:
    block = BLOCKS[1]
    assert block.pages == 2
    kind, lost = SPOILS[spoil]
    spoil(store, *place_of(store, block))
    before = files(store)
    code, report = command.json("verify", store)
    assert code == 1
    assert kind in {finding["kind"] for finding in report["findings"]}
    assert files(store) == before
    assert command("verify", store) == 1
    assert kind in command.out
    code, report = command.json("verify", store, "--repair")
    assert code == 1
    assert report["sound"]
    assert report["remaining"] == []
    assert command("verify", store) == 0, command.out
    expected = [b for b in BLOCKS if not lost or b is not block]
    if spoil is runs:  # listed again from its record, which knows of no use
        assert_reads(store, *expected)
    else:
        assert_holds(store, *expected)


def test_every_kind_of_finding_is_documented_and_tested() -> None:
    tested = {kind for kind, _ in SPOILS.values()}
    elsewhere = {"description", "file", "foreign", "index"}  # below
    assert tested | elsewhere == set(KINDS)
    document = (Path(__file__).parents[1] / "docs" / "tools.md").read_text()
    for kind, text in KINDS.items():
        assert f"| `{kind}` | {text} |" in document
