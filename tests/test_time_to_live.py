"""Times to live: expired is absent at once, everywhere, and the first to go. The clock is ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from light_mem import maintenance
from light_mem.engine.base import Outcome
from light_mem.errors import InvalidArgumentError, StoreFormatError
from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.index import retention
from light_mem.index.lookup import SCALAR_LIMIT
from light_mem.index.taking import Taking
from tests.engine_helpers import Block, assert_consistent, open_local
from tests.retention_helpers import START, Clock, Store, keys_of
from tests.service_rig import rig

SHORT, LONG, EVER = Block(1, 2), Block(2, 2), Block(3, 2)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    """SHORT lives 10 s, LONG 1000, EVER for good, in this order of use."""
    store = Store(tmp_path / "store", 8)
    store.write(SHORT, time_to_live=10)
    store.write(LONG, time_to_live=1000)
    store.write(EVER)
    yield store
    store.close()


@pytest.mark.parametrize("n", [1, 2 * SCALAR_LIMIT], ids=["scalar", "vectorised"])
def test_a_block_is_a_miss_from_its_second_on(store: Store, clock: Clock, n: int) -> None:
    lookup = store.engine.lookup
    keys = keymath.as_keys([SHORT.key] * n)
    pairs = [(low, high) for low, high in keys.tolist()]
    clock.now = START + 9.999
    assert store.engine.find(keys).all()
    assert store.rig.read(*[SHORT] * n) == [Outcome.LOADED] * n
    clock.now = START + 10
    assert not store.engine.find(keys).any()
    assert lookup.find_each(pairs) == [-1] * n
    assert lookup.find_one(*pairs[0]) == -1
    assert store.rig.read(*[SHORT] * n) == [Outcome.MISSING] * n
    assert not store.engine.is_stored(*pairs[0], SHORT.pages * 64)
    assert store.stored(SHORT, LONG, EVER, *[EVER] * SCALAR_LIMIT)[:2] == [LONG.key, EVER.key]
    assert lookup.find_each(pairs, expired=True) == [lookup.find_one(*pairs[0], expired=True)] * n


def test_a_use_does_not_prolong_a_life_and_a_fraction_of_a_second_is_given(
    tmp_path: Path, clock: Clock
) -> None:
    clock.now = START + 0.5
    store = Store(tmp_path / "store", 8)
    store.write(SHORT, time_to_live=2.25)
    clock.now = START + 2.9  # it is to live until 2.75; whole seconds are rounded up
    assert store.rig.find(SHORT, touch=True) == [True]
    clock.now = START + 3
    assert store.rig.find(SHORT) == [False]
    store.close()


def test_expired_blocks_go_first_whoever_was_used_last(store: Store, clock: Clock) -> None:
    assert store.rig.find(SHORT, touch=True) == [True]  # now the most recently used
    clock.now = START + 10
    assert store.write(Block(4, 4)) == ["STORED"]  # two slots are free, two are SHORT's
    assert store.stored(SHORT, LONG, EVER, Block(4)) == [2, 3, 4]
    assert store.engine.stats()["evictions"] == 1
    assert_consistent(store.engine._index)
    clock.now = START + 1000
    assert store.write(Block(5, 2), Block(6, 2)) == ["STORED", "STORED"]
    assert store.stored(EVER, Block(4), Block(5), Block(6)) == [4, 5, 6]  # LONG, then the oldest


def test_an_expired_block_that_nobody_evicts_costs_no_look_into_the_entries(
    store: Store, clock: Clock
) -> None:
    control = store.engine._index.control
    assert int(control["expires"][0]) == retention.keep_for(10)
    clock.now = START + 10
    store.write(Block(4, 4))
    assert int(control["expires"][0]) == retention.keep_for(990)  # of LONG
    clock.now = START + 1000
    store.write(Block(5, 2))
    assert int(control["expires"][0]) == 0


@pytest.mark.parametrize("pages", [2, 1], ids=["same length", "another length"])
def test_a_write_replaces_what_has_expired(store: Store, clock: Clock, pages: int) -> None:
    again = Block(SHORT.key, pages)
    assert store.write(SHORT) == ["PRESENT"]  # and does not prolong its life
    clock.now = START + 10
    assert store.write(again, time_to_live=5) == ["STORED"]
    assert store.rig.read(again) == [Outcome.LOADED]
    assert store.engine.stats()["blocks"] == 3
    assert store.engine.stats()["used_slots"] == 4 + pages
    clock.now = START + 15
    assert store.stored(SHORT, LONG, EVER) == [2, 3]


def test_two_expired_blocks_are_replaced_in_one_batch(tmp_path: Path, clock: Clock) -> None:
    store = Store(tmp_path / "store", 32)
    blocks = [Block(key) for key in range(12)]
    store.write(*blocks, time_to_live=10)
    clock.now = START + 10
    assert store.write(*blocks) == ["STORED"] * 12
    assert store.engine.stats()["blocks"] == 12
    assert store.rig.read(*blocks) == [Outcome.LOADED] * 12
    store.close()
    assert maintenance.verify(tmp_path / "store").clean


def test_what_has_expired_counts_as_absent_when_it_is_deleted(store: Store, clock: Clock) -> None:
    clock.now = START + 10
    assert store.rig.delete(SHORT, LONG) == 1
    assert store.engine.stats()["blocks"] == 1


def test_times_outlive_the_engine_and_the_index(tmp_path: Path, clock: Clock) -> None:
    store = Store(tmp_path / "store", 16)
    store.write(SHORT, time_to_live=10)
    store.write(EVER)
    store.close()
    (tmp_path / "store" / "index").unlink()
    store = Store(tmp_path / "store", 16)
    assert int(store.engine._index.control["expires"][0]) == retention.keep_for(10)
    assert store.stored(SHORT, EVER) == [1, 3]
    clock.now = START + 10
    assert store.stored(SHORT, EVER) == [3]
    store.close()


@pytest.mark.usefixtures("short_blocks")
def test_an_export_carries_times_and_leaves_out_what_has_expired(
    store: Store, clock: Clock, tmp_path: Path
) -> None:
    store.write(Block(9), time_to_live=20)
    clock.now = START + 10
    report = maintenance.export_store(tmp_path / "store", tmp_path / "file", hashes=[1, 2, 3, 9])
    assert report.blocks == 3
    assert report.missing == (keymath.key_text(1, 0),)
    clock.now = START + 20
    report = maintenance.import_store(tmp_path / "other", tmp_path / "file", storage_size=16 * 64)
    assert (report.blocks, report.changed) == (2, 1)
    found = {block.key: block.expires for block in maintenance.blocks(tmp_path / "other")}
    assert found == {
        keymath.key_text(2, 0): int(START + 1000) * 10**9,
        keymath.key_text(3, 0): None,
    }


@pytest.mark.usefixtures("short_blocks")
def test_an_import_keeps_what_only_its_pin_keeps(
    store: Store, clock: Clock, tmp_path: Path
) -> None:
    assert store.engine.pin(keys_of(SHORT)) == 1
    clock.now = START + 20
    assert maintenance.export_store(tmp_path / "store", tmp_path / "file").blocks == 3
    other = tmp_path / "other"
    report = maintenance.import_store(other, tmp_path / "file", storage_size=8 * 64)
    assert (report.blocks, report.changed, report.complete) == (3, 0, True)
    found = {block.key: (block.pinned, block.expires) for block in maintenance.blocks(other)}
    assert found[keymath.key_text(1, 0)] == (True, int(START + 10) * 10**9)
    used = {b.key: b.used for b in maintenance.blocks(tmp_path / "store")}
    assert {b.key: b.used for b in maintenance.blocks(other)} == used
    # Two of three slots cannot be pinned, and without a pin its time is up.
    maintenance.export_store(tmp_path / "store", tmp_path / "one", hashes=[SHORT.key])
    report = maintenance.import_store(tmp_path / "tiny", tmp_path / "one", storage_size=3 * 64)
    assert (report.blocks, report.nbytes, report.changed) == (0, 0, 1)
    assert maintenance.verify(other).clean


def exported_from(store: Path) -> Path:
    maintenance.export_store(store, store.parent / "wide")
    return store.parent / "wide"


def test_an_import_takes_the_room_of_what_has_expired(
    store: Store, clock: Clock, tmp_path: Path
) -> None:
    other = Store(tmp_path / "other", 4, block_pages=2)
    assert other.write(LONG, SHORT, time_to_live=10) == ["STORED"] * 2
    other.close()
    clock.now = START + 20
    assert maintenance.export_store(tmp_path / "store", tmp_path / "file").blocks == 2
    open_local(tmp_path / "pages", 8, page_bytes=128).close()
    with pytest.raises(StoreFormatError):  # before anything is taken out
        maintenance.import_store(tmp_path / "other", exported_from(tmp_path / "pages"))
    assert len(list(maintenance.blocks(tmp_path / "other"))) == 2
    for dry_run in (True, False):
        report = maintenance.import_store(tmp_path / "other", tmp_path / "file", dry_run=dry_run)
        assert (report.blocks, report.present, report.no_room) == (2, 0, 0)


@pytest.mark.usefixtures("short_blocks")
def test_a_smaller_store_keeps_times_and_gives_up_what_has_expired_first(
    tmp_path: Path, clock: Clock
) -> None:
    store = Store(tmp_path / "store", 16)
    for key in range(4):
        store.write(Block(key, 2))
    store.write(Block(4, 2), time_to_live=100)
    store.write(Block(5, 2), time_to_live=10)
    store.close()
    clock.now = START + 10
    maintenance.resize(tmp_path / "store", 10 * 64)  # room for five
    store = Store(tmp_path / "store", 10)
    assert store.stored(*map(Block, range(6))) == [0, 1, 2, 3, 4]
    clock.now = START + 100
    assert store.stored(*map(Block, range(6))) == [0, 1, 2, 3]
    store.close()


def test_evict_takes_what_has_expired_whatever_its_last_use(store: Store, clock: Clock) -> None:
    clock.now = START + 10
    report = maintenance.evict(store.engine.directory, older_than=10**6)
    assert (report.removed, report.blocks) == (1, 2)


def test_the_number_in_an_entry_says_what_the_document_says() -> None:
    assert fmt.KEEP_EPOCH == 1577836800
    assert retention.expires_at(0) is None
    assert retention.expires_at(5) == retention.expires_at(5 | fmt.KEEP_PINNED) == 1577836805
    keeps = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1], np.uint32)
    assert retention.expired(keeps).tolist() == [retention.has_expired(k) for k in keeps.tolist()]
    assert retention.expired(keeps).tolist() == [False, True, False, False, False]
    assert retention.keep_for(1e18) == fmt.KEEP_TIME_MASK


@pytest.mark.parametrize("value", [0, -1, float("nan"), "60", True])
def test_a_time_to_live_is_a_positive_number_of_seconds(tmp_path: Path, value: object) -> None:
    with pytest.raises(InvalidArgumentError), rig(tmp_path, time_to_live=value):
        pass
    assert not (tmp_path / "store").exists()


def test_workers_write_with_the_time_to_live_of_their_service(tmp_path: Path) -> None:
    with rig(tmp_path, time_to_live=3600) as r:
        r.write(["a"], [0])
        [block] = maintenance.blocks(tmp_path / "store")
        assert block.written is not None
        assert block.expires is not None
        assert 3600 * 10**9 <= block.expires - block.written < 3602 * 10**9
        assert r.service.query("a")
        assert r.service.match_prefix(["a"] * 9) == 9


def test_a_store_of_version_1_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    """Its `owners` file is a quarter as long: not even that may be touched."""
    open_local(tmp_path / "store", 8).close()
    text = (tmp_path / "store" / "store.json").read_text()
    assert '"version": 2' in text
    for path in tmp_path.glob("store/shard-*.[ds]*[as]"):
        header = np.fromfile(path, fmt.SHARD_HEADER, 1)
        header["version"] = 1
        header["crc"] = fmt.header_crc(header, fmt.SHARD_HEADER_CRC)
        with path.open("r+b") as file:
            file.write(header.tobytes())
    (tmp_path / "store" / "store.json").unlink()
    with (tmp_path / "store" / "owners").open("r+b") as file:
        file.truncate(1 << 20)
    before = {p.name: p.read_bytes() for p in (tmp_path / "store").iterdir()}

    with pytest.raises(StoreFormatError, match="version 1, this library reads 2") as caught:
        open_local(tmp_path / "store", 8)
    assert (caught.value.field, caught.value.found, caught.value.expected) == ("version", 1, 2)  # type: ignore[attr-defined]
    assert {p.name: p.read_bytes() for p in (tmp_path / "store").iterdir()} == before


def test_a_death_in_a_sweep_brings_no_expired_block_back(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep is cut off at its first block; look-ups of many keys ask the control page first."""
    store = Store(tmp_path / "store", 16)
    gone = [Block(key) for key in range(1, 2 * SCALAR_LIMIT)]
    store.write(*gone, time_to_live=5)
    store.write(*(Block(key) for key in range(100, 100 + 16 - len(gone))))
    clock.now = START + 100

    def die(self: Taking, slot: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Taking, "remove", die)
        with pytest.raises(KeyboardInterrupt):
            store.write(Block(200))
    assert store.stored(*gone) == []
    assert store.rig.read(*gone) == [Outcome.MISSING] * len(gone)
    assert store.write(Block(200)) == ["STORED"]
    assert store.stored(*gone) == []
    store.close()
