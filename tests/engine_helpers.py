"""What the tests below the service share: small stores, and a rig that writes and reads blocks
whose bytes follow from their keys."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from light_mem.engine.base import BlockIO, Outcome, StorageEngine, never
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.places import Rows
from light_mem.engine.settings import EngineSettings
from light_mem.index import file as index_file
from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.index.description import Geometry
from light_mem.index.file import IndexFile
from light_mem.index.keys import Key, MixedKeys
from light_mem.index.locks import PathLock, lock_path
from light_mem.index.lookup import Lookup
from light_mem.index.recovery import occupied_runs, states_of
from light_mem.index.shard import Allocation, ShardIndex
from light_mem.index.written import Written
from tests.payload import block_bytes_of

PAGE = 64
UNTOUCHED = 0xEE
STORE_ID = "000102030405060708090a0b0c0d0e0f"


# --- an index without shard files -----------------------------------------------------------------


def geometry_of(slots: int, shards: int = 1, page_bytes: int = PAGE) -> Geometry:
    return Geometry(STORE_ID, page_bytes, shards, slots, slots * shards * page_bytes)


def new_index(directory: Path, slots: int, shards: int = 1, page_bytes: int = PAGE) -> IndexFile:
    """An empty index in `directory`."""
    geometry = geometry_of(slots, shards, page_bytes)
    index_file.publish(directory, index_file.create(directory, geometry))
    return IndexFile(directory / index_file.NAME, geometry)


def replica(directory: Path, file: IndexFile, shard: int = 0) -> ShardIndex:
    """One shard as a process of its own would see it: own mapping, own copy of the free space."""
    mapped = IndexFile(directory / index_file.NAME, file.geometry)
    lock = PathLock(lock_path(directory, f"shard-{shard:03}"))
    return ShardIndex(mapped, shard, lock, Lookup(mapped))


def let_go(*held: object) -> None:
    """Drop what fixtures hold, mappings above all: pytest keeps their values a little too long."""
    for each in held:
        vars(each).clear()


def put(index: ShardIndex, key: int, slots: int, now: int = 0, owner: int = 1) -> int:
    """Store a block of `slots` pages, inside `change()`; returns its first slot."""
    low, high = keymath.as_key(key)
    where = index.allocate(slots, [])
    assert where is not None
    index.mark(where.runs, owner)
    publish(index, [where], [(low, high)], now or 10**18 + key)
    return where.slot


def publish(index: ShardIndex, room: list[Allocation], keys: list[Key], now: int) -> None:
    """Make blocks visible that fill their room, inside `change()`; the checksum is the key's low
    half."""
    blocks = [
        Written(low, high, low, sum(n for _, n in where.runs) * PAGE, where.runs, now)
        for (low, high), where in zip(keys, room, strict=True)
    ]
    index.publish(blocks, MixedKeys.of(keys).mixed, now)


def stored_keys(file: IndexFile) -> set[int]:
    """Keys of all LIVE entries, whether look-ups reach them or not."""
    live = np.flatnonzero(states_of(file.entries) == fmt.LIVE)
    return {int(file.entries["high"][n]) << 64 | int(file.entries["low"][n]) for n in live}


def assert_consistent(file: IndexFile) -> None:
    """Runs do not overlap, counts fit, and look-ups find exactly the stored blocks."""
    keys = sorted(stored_keys(file))
    lookup = Lookup(file)
    for low, high in keymath.as_keys(keys).tolist():
        entry = lookup.find_one(low, high, touch=False)
        assert entry >= 0
        assert lookup.locate(entry, low, high) is not None
    padded = keymath.as_keys([*keys, *range(2**127, 2**127 + 8)])  # enough for the other look-up
    assert (lookup.find(padded, touch=False) >= 0).tolist() == [True] * len(keys) + [False] * 8
    for shard in range(file.shards):
        entries = file.of_shard(shard).entries
        starts, lengths = occupied_runs(entries)
        assert (lengths > 0).all()
        ends = starts + lengths
        assert (ends[:-1] <= starts[1:]).all(), "runs overlap"
        assert not ends.size or ends[-1] <= file.slots
        control = file.control[shard]
        assert int(control["used_slots"]) == lengths.sum()
        assert int(control["blocks"]) == np.count_nonzero(states_of(entries) == fmt.LIVE)


# --- engines --------------------------------------------------------------------------------------


def open_local(
    directory: Path,
    pages: int,
    *,
    page_bytes: int = PAGE,
    shards: int = 1,
    block_pages: int = 1,
    verify: bool = True,
    durability: str = "kernel",
) -> LocalStorageEngine:
    """A store of `pages` pages a shard."""
    return LocalStorageEngine.open_store(
        directory,
        page_bytes=page_bytes,
        num_of_shard=shards,
        storage_size=pages * page_bytes * shards,
        block_pages=block_pages,
        settings=EngineSettings(verify=verify, durability=durability),
    )


class Block(NamedTuple):
    """A block of a test: its key and how many pages it has."""

    key: int
    pages: int = 1


def blocks_of_shard(shard: int, shards: int, count: int, first: int = 0) -> list[Block]:
    """Blocks of one page that belong to one of so many shards, with keys from `first` on."""
    of_shard = (
        Block(key)
        for key in itertools.count(first)
        if keymath.shard_of(keymath.mix_one(*keymath.as_key(key)), shards) == shard
    )
    return list(itertools.islice(of_shard, count))


def blocks_of(memory: npt.NDArray[np.uint8], count: int) -> list[BlockIO]:
    """Blocks of a row each of some memory, with keys from 0 on."""
    return [BlockIO(*keymath.as_key(n), Rows(memory, np.array([n], np.intp))) for n in range(count)]


def lent(engine: LocalStorageEngine) -> Iterator[LocalStorageEngine]:
    """What a fixture yields from."""
    yield engine
    engine.close()
    let_go(engine)


def collect(outcomes: list[Outcome]) -> Callable[[Sequence[int], Outcome], None]:
    """A report that appends what it is told."""

    def report(positions: Sequence[int], outcome: Outcome) -> None:
        outcomes.extend([outcome] * len(positions))

    return report


def _into(outcomes: list[list[Outcome]]) -> Callable[[Sequence[int], Outcome], None]:
    def report(positions: Sequence[int], outcome: Outcome) -> None:
        for at in positions:
            outcomes[at].append(outcome)

    return report


class Rig:
    """Writes and reads blocks through one engine, and looks at every byte."""

    def __init__(self, engine: StorageEngine, page_bytes: int = PAGE) -> None:
        self.engine = engine
        self.page_bytes = page_bytes

    def _batch(self, blocks: Iterable[Block], fill: bool) -> list[BlockIO]:
        blocks = list(blocks)
        total = sum(b.pages for b in blocks)
        memory = np.full((total + 1, self.page_bytes), UNTOUCHED, np.uint8)
        rows = np.random.default_rng(total).permutation(total).astype(np.intp)
        batch: list[BlockIO] = []
        for block in blocks:
            mine, rows = rows[: block.pages], rows[block.pages :]
            if fill:
                memory[mine] = block_bytes_of(block.key, block.pages, self.page_bytes)
            batch.append(BlockIO(*keymath.as_key(block.key), Rows(memory, mine)))
        return batch

    def write(
        self, *blocks: Block, stop: Callable[[int], bool] = never
    ) -> list[tuple[Outcome, ...]]:
        """All outcomes of each block, in order."""
        outcomes: list[list[Outcome]] = [[] for _ in blocks]
        batch = self._batch(blocks, fill=True)
        self.engine.write(batch, _into(outcomes), stop)
        return [tuple(o) for o in outcomes]

    def read(self, *blocks: Block, stop: Callable[[int], bool] = never) -> list[Outcome]:
        """The outcome of each block; fails for a loaded block with a wrong byte, and for a
        missing one whose pages were touched."""
        outcomes: list[list[Outcome]] = [[] for _ in blocks]
        batch = self._batch(blocks, fill=False)
        self.engine.read(batch, _into(outcomes), stop)
        for block, io, got in zip(blocks, batch, outcomes, strict=True):
            assert len(got) == 1
            found = io.place.memory[io.place.numbers]
            if got[0] is Outcome.LOADED:
                wanted = block_bytes_of(block.key, block.pages, self.page_bytes)
                assert np.array_equal(found, wanted), f"wrong bytes of {block}"
            elif got[0] is Outcome.MISSING:
                assert (found == UNTOUCHED).all(), f"pages of the missing {block} were touched"
        return [got[0] for got in outcomes]

    def find(self, *blocks: Block, touch: bool = False) -> list[bool]:
        found: npt.NDArray[np.bool_] = self.engine.find(
            keymath.as_keys([b.key for b in blocks]), touch
        )
        return [bool(f) for f in found]

    def delete(self, *blocks: Block) -> int:
        return self.engine.delete(keymath.as_keys([b.key for b in blocks]))


def assert_whole_after_death(rig: Rig, every: Sequence[Block], kept: Set[int]) -> None:
    """Look at every block of a store whose process died: what is found is whole, what has a key in
    `kept` is there, and nothing else takes room."""
    engine = rig.engine
    assert isinstance(engine, LocalStorageEngine)
    outcomes = dict(zip(every, rig.read(*every), strict=True))
    # Nothing is DAMAGED. `read` compares the bytes.
    assert set(outcomes.values()) <= {Outcome.LOADED, Outcome.MISSING}
    loaded = {block for block, outcome in outcomes.items() if outcome is Outcome.LOADED}
    assert kept <= {block.key for block in loaded}
    for shard in range(engine.geometry.shards):
        with engine.change(shard):
            pass
    assert_consistent(engine._index)
    assert engine.stats()["used_slots"] == sum(block.pages for block in loaded)
    assert engine.stats()["blocks"] == len(loaded)
    states = states_of(engine._index.entries)
    assert fmt.WRITING not in states
    # Records and index say the same of it.
    for shard in range(engine.geometry.shards):
        first = shard * engine.geometry.slots
        listed = np.flatnonzero(states[first : first + engine.geometry.slots] == fmt.LIVE)
        assert np.array_equal(np.flatnonzero(engine.file(shard).records["tag"] == fmt.LIVE), listed)


COPIED_AND_STORED = (Outcome.COPIED, Outcome.STORED)
