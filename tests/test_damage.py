"""Bits that flip and files that go, over every field of every header: a miss or a clear error."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from light_mem.engine import local, writing
from light_mem.engine.base import Outcome
from light_mem.errors import LightMemError, StoreFormatError
from light_mem.index import format as fmt
from tests.engine_helpers import Block, Rig, open_local

PAGES = 12
BLOCKS = [Block(1, 3), Block(2, 1), Block(3, 4), Block(4, 1)]
HEADERS = {
    "index": fmt.INDEX_HEADER.itemsize,
    "shard-000.data": fmt.SHARD_HEADER.itemsize,
    "shard-000.slots": fmt.SHARD_HEADER.itemsize,
    "owners": 2 * fmt.OWNER.itemsize,
    "store.json": None,  # whole
}


def opened(directory: Path) -> Rig:
    return Rig(open_local(directory, PAGES, block_pages=4))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("original") / "store"
    rig = opened(directory)
    assert all(o[-1] is Outcome.STORED for o in rig.write(*BLOCKS))
    rig.engine.close()
    return directory


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "store"))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "ROOM_SECONDS", 0.05)


def look(directory: Path) -> int:
    """Open, read every block (`Rig.read` looks at every byte), write more; returns how many were
    loaded."""
    rig = opened(directory)
    outcomes = rig.read(*BLOCKS)
    assert set(outcomes) <= {Outcome.LOADED, Outcome.MISSING, Outcome.DAMAGED}
    for block in (Block(50, 2), Block(51, 4), Block(52, 1)):
        [said] = rig.write(block)
        if said[-1] is Outcome.STORED:
            assert rig.read(block) == [Outcome.LOADED]
    rig.read(*BLOCKS)
    rig.engine.close()
    return outcomes.count(Outcome.LOADED)


def contents(directory: Path) -> dict[str, bytes]:
    # Lock files and the list of owners are written by whoever tries to open.
    kept = [p for p in directory.iterdir() if p.suffix != ".lock" and p.name != "owners"]
    return {p.name: p.read_bytes() for p in kept}


def flipped(size: int, seed: int) -> Iterator[tuple[int, int]]:
    dice = random.Random(seed)
    fields = range(min(size, 256))  # beyond them: spare room and intents
    for at in [*fields, *dice.sample(range(size), min(size, 40))]:
        yield at, 1 << dice.randrange(8)


@pytest.mark.parametrize("name", HEADERS)
def test_a_flipped_bit_in_a_header_costs_no_block_or_is_an_error_that_changes_nothing(
    original: Path, tmp_path: Path, name: str
) -> None:
    size = HEADERS[name] or (original / name).stat().st_size
    refused = 0
    for at, bit in flipped(size, seed=size):
        directory = Path(shutil.copytree(original, tmp_path / "copy"))
        with (directory / name).open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ bit]))
        before = contents(directory)
        try:
            assert look(directory) == len(BLOCKS), f"byte {at}, bit {bit}"
        except LightMemError:
            refused += 1
            assert contents(directory) == before
        shutil.rmtree(directory)
    assert refused <= size // 8  # a few fields may name another version; most heal


def test_flipped_bits_in_control_pages_entries_and_heads_never_give_wrong_bytes(
    original: Path, tmp_path: Path
) -> None:
    dice = random.Random(5)
    size = (original / "index").stat().st_size
    _, heads, entries, uses, _ = fmt.index_layout(1, PAGES)
    spans = [(fmt.BLOCK_ALIGN, fmt.BLOCK_ALIGN + 128), (heads, heads + 256), (entries, uses)]
    spans.append((uses, size))
    for trial in range(150):
        directory = Path(shutil.copytree(original, tmp_path / f"{trial}"))
        raw = bytearray((directory / "index").read_bytes())
        for _ in range(dice.choice((1, 1, 3))):
            at = dice.randrange(*dice.choice(spans))
            raw[at] ^= 1 << dice.randrange(8)
        (directory / "index").write_bytes(raw)
        look(directory)
        shutil.rmtree(directory)


def test_flipped_bits_in_records_cost_nothing_while_the_index_lives(store: Path) -> None:
    with (store / "shard-000.slots").open("r+b") as file:
        file.seek(fmt.SHARD_HEADER_BYTES)
        file.write(np.random.default_rng(0).bytes(PAGES * fmt.RECORD.itemsize))
    assert look(store) == len(BLOCKS)


def test_every_flipped_byte_of_data_is_damage(original: Path, tmp_path: Path) -> None:
    rig = opened(original)
    engine = rig.engine
    assert isinstance(engine, local.LocalStorageEngine)
    entry = engine.lookup.find_one(3, 0)
    where = engine.lookup.locate(entry, 3, 0)
    assert where is not None
    rig.engine.close()
    [(slot, length)] = where.runs
    start = fmt.SHARD_HEADER_BYTES + slot * rig.page_bytes
    for at in range(start, start + length * rig.page_bytes, 7):
        directory = Path(shutil.copytree(original, tmp_path / f"{at}"))
        with (directory / "shard-000.data").open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 0x10]))
        copy = opened(directory)
        assert copy.read(Block(3, 4)) == [Outcome.DAMAGED]
        assert copy.read(Block(3, 4)) == [Outcome.MISSING]
        copy.engine.close()
        shutil.rmtree(directory)


@pytest.mark.parametrize("name", ["index", "shard-000.data", "shard-000.slots", "owners"])
@pytest.mark.parametrize("what", ["missing", "empty", "half", "one byte short", "header only"])
def test_a_file_that_is_missing_or_cut_short_is_a_miss_and_no_crash(
    store: Path, name: str, what: str
) -> None:
    path = store / name
    size = path.stat().st_size
    if what == "missing":
        path.unlink()
    else:
        left = {"empty": 0, "half": size // 2, "one byte short": size - 1, "header only": 64}[what]
        with path.open("r+b") as file:
            file.truncate(left)
    look(store)


@pytest.mark.parametrize("name", ["index", "shard-000.data", "shard-000.slots", "store.json"])
def test_a_file_of_another_store_never_gives_wrong_bytes(
    store: Path, tmp_path: Path, name: str
) -> None:
    other = tmp_path / "other"
    rig = opened(other)
    assert all(o[-1] is Outcome.STORED for o in rig.write(Block(9, 4), Block(8, 4), Block(7, 1)))
    rig.engine.close()
    shutil.copy(other / name, store / name)
    before = contents(store)
    try:
        look(store)
    except LightMemError:
        assert contents(store) == before


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("shard-000.data", "shard-001.data"),
        ("shard-000.slots", "shard-001.slots"),
        ("shard-001.data", "shard-001.slots"),
    ],
)
def test_files_of_a_store_that_were_exchanged_are_an_error_that_changes_nothing(
    tmp_path: Path, one: str, other: str
) -> None:
    """They are of this store, and so of its size and version; but not of this shard, or kind."""
    store = tmp_path / "store"
    rig = Rig(open_local(store, PAGES, shards=2, block_pages=4))
    assert all(o[-1] is Outcome.STORED for o in rig.write(*BLOCKS))
    rig.engine.close()

    def exchange() -> None:
        (store / one).rename(tmp_path / "moved")
        (store / other).rename(store / one)
        (tmp_path / "moved").rename(store / other)

    exchange()
    before = contents(store)
    with pytest.raises(StoreFormatError, match="belongs to another store or shard"):
        open_local(store, PAGES, shards=2, block_pages=4)
    assert contents(store) == before
    exchange()
    rig = Rig(open_local(store, PAGES, shards=2, block_pages=4))
    assert rig.read(*BLOCKS) == [Outcome.LOADED] * len(BLOCKS)
    rig.engine.close()
