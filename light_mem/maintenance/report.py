"""What the tools found and did, as NamedTuples: plain numbers and text, picklable.

`plain` turns any of them into what JSON knows.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class OwnerReport(NamedTuple):
    """One process that has the store open."""

    pid: int
    kind: str  # "server", "worker", "client", "tool"
    started: float  # s since 1970
    joined: float  # s since 1970
    command: str  # "" when it cannot be seen, as in another container

    def __str__(self) -> str:
        return f"{self.kind} {self.pid}" + (f" ({self.command})" if self.command else "")


class StoreReport(NamedTuple):
    """Numbers of a store at one moment. Times are ns since 1970, sizes bytes."""

    directory: str
    format_version: int
    store_id: str
    page_bytes: int
    shards: int
    slots: int  # a shard
    storage_size: int
    capacity: int  # bytes of all slots
    index_state: str  # "ok", or why it cannot be used
    index_bytes: int
    index_bytes_a_slot: float
    blocks: int
    block_bytes: int
    used_slots: int
    pinned_blocks: int
    pinned_slots: int
    expired_blocks: int  # listed until their room is needed, and found by no look-up
    writing_blocks: int
    held_blocks: int  # taken out while they were viewed: their slots are not free yet
    oldest_use: int | None  # None: no blocks, or no index that knows
    newest_use: int | None
    median_use: int | None
    oldest_write: int | None
    newest_write: int | None
    lookups: int | None  # None: the index cannot be used
    hits: int | None
    inserts: int | None
    evictions: int | None
    removals: int | None
    damaged: int | None
    owners: tuple[OwnerReport, ...]
    by_shard: tuple[ShardReport, ...]
    unfinished: tuple[str, ...]


class ShardReport(NamedTuple):
    """Numbers of one shard; the counters are 0 when the index cannot be used."""

    shard: int
    blocks: int
    block_bytes: int
    used_slots: int
    inserts: int
    evictions: int
    removals: int
    damaged: int


class DamagedBlock(NamedTuple):
    """A stored block whose bytes are not those that were written."""

    key: str  # 32 hex digits
    shard: int
    slot: int
    nbytes: int
    problem: str


class Finding(NamedTuple):
    """A place where the store's files contradict each other; `kind` is one of KINDS."""

    kind: str
    shard: int  # -1: the store as a whole
    slot: int  # -1: no slot in particular
    key: str  # 32 hex digits, or ""
    problem: str


KINDS = {
    "description": "store.json is missing or damaged",
    "file": "a shard's file is missing, too short or has a damaged header",
    "foreign": "a shard's file that belongs to another store or shard",
    "index": "the index cannot be used",
    "state": "an entry in a state that there is not",
    "runs": "a block whose slots make no sense",
    "overlap": "two blocks in one slot",
    "extent": "a run of slots that belongs to no block",
    "chain": "a chain that leads nowhere, round in a circle or into another",
    "unchained": "a block that no look-up reaches",
    "place": "a block in a shard where its key does not belong",
    "twin": "one key, two blocks",
    "count": "a counter that is not what the entries say",
    "record": "a block without a fitting record: lost if the index is made anew",
    "stale": "the record of a block that is not stored: back if the index is made anew",
    "leak": "slots marked as being written by nobody",
}


class VerifyReport(NamedTuple):
    """What a check of every byte found. `clean`: nothing was found. `sound`: nothing was found, or
    everything found was repaired."""

    directory: str
    blocks: int  # blocks whose bytes were read
    nbytes: int
    changed: int  # blocks that were taken out or replaced while they were read
    damaged: tuple[DamagedBlock, ...]
    findings: tuple[Finding, ...]
    unfinished: tuple[str, ...]  # what kills left behind; the next open puts it in order
    repaired: int  # damaged blocks dropped and findings put right
    remaining: tuple[Finding, ...]  # after repair: what could not be put right
    seconds: float

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        return not self.damaged and not self.findings

    @property
    def sound(self) -> bool:
        """Whether the store is in order now: clean, or all of it repaired."""
        return self.clean or (self.repaired > 0 and not self.remaining)


class RebuildReport(NamedTuple):
    """An index made anew, or what it would be."""

    directory: str
    dry_run: bool
    in_place: bool  # while others have the store open
    blocks: int
    nbytes: int
    kept_order: int  # blocks whose last use is known from the old index
    adopted: int  # blocks without a record that the old index knew and whose bytes are right
    dropped: int  # records that were not believed
    lost: int  # blocks of the old index that are in the new one no more
    restart: tuple[OwnerReport, ...]  # processes that go on with another index: restart them
    seconds: float


class TransferReport(NamedTuple):
    """An export or an import."""

    directory: str
    file: str
    dry_run: bool
    blocks: int  # written to the file, or stored
    nbytes: int
    present: int  # import: stored before
    missing: tuple[str, ...]  # export: asked for, not stored
    changed: int  # export: taken out while they were read; import: expired meanwhile
    no_room: int  # import: blocks that did not fit
    damaged: tuple[DamagedBlock, ...]
    problems: tuple[str, ...]  # what is wrong with the file as a whole
    seconds: float

    @property
    def complete(self) -> bool:
        """Whether every block that was meant went over."""
        return not (self.missing or self.no_room or self.damaged or self.problems)


class ChangeReport(NamedTuple):
    """Blocks taken out by `clear`, `evict` or `resize`."""

    directory: str
    dry_run: bool
    removed: int
    nbytes: int
    moved: int  # resize: blocks that got other slots
    blocks: int  # stored afterwards
    storage_size: int  # afterwards
    seconds: float


class BlockReport(NamedTuple):
    """One stored block. Times are ns since 1970."""

    key: str
    shard: int
    slot: int
    runs: tuple[tuple[int, int], ...]  # (first slot, slots), in the order of the bytes
    pages: int
    nbytes: int
    checksum: str  # 16 hex digits
    used: int
    written: int | None  # None: it has no record
    pinned: bool
    expires: int | None  # when it counts as absent, unless it is pinned; None: never


def plain(value: Any) -> Any:
    """A report as dicts, lists, numbers and text; properties are left out."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: plain(field) for name, field in value._asdict().items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
