"""Makes, opens, resizes and rebuilds the files of a store, under the store's open lock.

Whoever opens takes `open.lock` (workers do not: their server holds the store for them), then:
description -> shard files of the right size -> an index that can be trusted. What is missing is
made, what is damaged beyond use is made anew from what describes itself, and whatever belongs to
another store or version is an error that changes nothing.
"""

from __future__ import annotations

import logging
import os
import resource
import time
from pathlib import Path

from light_mem.engine import shard_header
from light_mem.engine.index_making import (
    NewIndex,
    counts,
    problem_of,
    put_in_place,
)
from light_mem.engine.reindex import pinned_slots
from light_mem.engine.shard_making import ShardMaking, cut_shards, remove_shards
from light_mem.engine.store_room import lacking_beside_shards, require_room
from light_mem.errors import (
    InvalidArgumentError,
    PinLimitError,
    StoreFormatError,
)
from light_mem.index import description
from light_mem.index import file as index_file
from light_mem.index import format as fmt
from light_mem.index.description import Geometry
from light_mem.index.owners import FILE_BYTES, Owners, started_at
from light_mem.index.owners import NAME as OWNERS_NAME
from light_mem.index.room import fill_holes

log = logging.getLogger("light_mem")

MAX_SHARDS = 1000
# The data file, what its mapping and that of the records keep, the lock; and what the mapping for
# views keeps, or, in a worker, the descriptor that reads past the page cache.
DESCRIPTORS_PER_SHARD = 5


def make_directory(directory: Path) -> None:
    """The store's directory, 0700; raises StoreFormatError when it is something else."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        raise StoreFormatError(
            f"{directory} is not a directory",
            path=str(directory),
            field="directory",
            found="file",
            expected="directory",
        ) from None


def descriptors_for(shards: int) -> int:
    """Descriptors that a process with all shards mapped needs, its own few among them."""
    return DESCRIPTORS_PER_SHARD * shards + 64


def check_descriptors(shards: int) -> None:
    """Raise InvalidArgumentError when this process may not open the files of so many shards."""
    needed = descriptors_for(shards)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise InvalidArgumentError(
            f"{shards} shards need {needed} file descriptors, the limit is {hard} (ulimit -n)",
            needed=needed,
            limit=hard,
        )
    if needed > soft:
        log.warning(
            "%d shards need up to %d file descriptors here, the soft limit is %d (ulimit -n): "
            "clear and delete may fail, and small reads are left to the workers",
            shards,
            needed,
            soft,
        )


def has_descriptors_for(shards: int) -> bool:
    """Whether this process may open the files of all shards and has more left than it needs."""
    return 2 * descriptors_for(shards) <= resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def check_sizes(page_bytes: int, shards: int, storage_size: int, block_pages: int) -> None:
    """Raise InvalidArgumentError unless every shard has room for one full block."""
    if not 1 <= shards <= MAX_SHARDS:
        raise InvalidArgumentError(
            f"num_of_shard is 1 to {MAX_SHARDS}, not {shards}", num_of_shard=shards
        )
    if description.slots_for(storage_size, shards, page_bytes) < block_pages:
        least = block_pages * page_bytes * shards
        raise InvalidArgumentError(
            f"storage_size {storage_size} is too small: {shards} shards of one block of "
            f"{block_pages} pages of {page_bytes} bytes need {least}",
            storage_size=storage_size,
            needed=least,
        )


def prepare(
    directory: Path, page_bytes: int, shards: int, storage_size: int, owners: Owners
) -> Geometry:
    """Bring the store's files in order and return its geometry; the open lock is held.

    Raises StoreFormatError (other geometry), StoreFullError, StoreBusyError.
    """
    described = description.load(directory)
    geometry = described or describe(directory)
    alone = not owners.others()
    if not alone and described is not None and storage_size != described.storage_size:
        alone = _wait_until_alone(owners)
    if geometry is None:
        return _make(directory, Geometry.new(page_bytes, shards, storage_size), alone)
    _require_same(directory, geometry, page_bytes, shards)
    drop_unfinished(directory)
    wanted = geometry
    if storage_size != geometry.storage_size:
        resized = geometry.resized(storage_size)
        too_many = pinned_beyond(directory, geometry, resized.slots) if alone else None
        if too_many is not None:
            log.warning("store %s keeps its storage_size: %s", directory, str(too_many))
        elif alone:
            wanted = resized
        else:
            log.warning(
                "store %s keeps its storage_size of %d bytes (%d were asked for): another %s has "
                "it open",
                directory,
                geometry.storage_size,
                storage_size,
                "service of this process" if _is_open_here(owners) else "process",
            )
    making = ShardMaking(directory, wanted, geometry)
    problem = problem_of(directory, wanted, owners)
    beside = lacking_beside_shards(directory, wanted, described, bool(problem)) if alone else 0
    require_room(directory, directory, making.lacking + beside)
    if alone:  # else they did so when they came
        fill_holes(directory / OWNERS_NAME, FILE_BYTES)
        if not problem:  # else one is made anew, and what is there is read, as a rule
            fill_holes(
                directory / index_file.NAME, fmt.index_layout(wanted.shards, wanted.slots).size
            )
    # All that takes room comes before the description says so: on a full disk nothing has changed.
    new = NewIndex(directory, wanted) if problem else None
    try:
        making.make(alone)
        if new is not None:
            new.fill()
        if described != wanted:
            description.save(directory, wanted)
    except BaseException:
        if new is not None:
            new.discard()
        if alone and description.load(directory) == described:
            making.take_back()
        raise
    if new is not None:
        put_in_place(new, directory, wanted, geometry, problem)
    if alone:
        cut_shards(directory, wanted)
    return wanted


def _make(directory: Path, geometry: Geometry, alone: bool) -> Geometry:
    """Make a new store."""
    try:
        making = ShardMaking(directory, geometry, None)
        beside = lacking_beside_shards(directory, geometry, None, True)
        require_room(directory, directory, making.lacking + beside)
        if alone:
            fill_holes(directory / OWNERS_NAME, FILE_BYTES)
        making.make(alone)
        new = NewIndex(directory, geometry)
        new.fill()
        new.publish()
        description.save(directory, geometry)  # last: from here on the store exists
    except StoreFormatError:
        raise  # refused before any change: what is there is not ours to remove
    except BaseException:
        remove_shards(directory, geometry)  # else another try would have to be of this size
        raise
    return geometry


def pinned_beyond(directory: Path, geometry: Geometry, slots: int) -> PinLimitError | None:
    """Why shards cannot have `slots` slots each: more than half of them would be pinned in one, and
    writes would find no room. None: they can."""
    if slots >= geometry.slots:
        return None
    pinned = _pinned_slots(directory, geometry)
    most, limit = max(pinned), slots // 2
    if most <= limit:
        return None
    shard = pinned.index(most)
    return PinLimitError(
        f"{most} slots of shard {shard} are pinned; of {slots} slots at most {limit} may be: "
        "unpin some",
        shard=shard,
        pinned=most,
        needed=0,
        limit=limit,
    )


def _pinned_slots(directory: Path, geometry: Geometry) -> list[int]:
    """Pinned slots of each shard: as the index says, or the records where it will be made anew."""
    pinned = counts(directory, geometry, "pinned_slots", trusted=True)
    if pinned is not None:
        return pinned
    return [pinned_slots(directory, geometry, shard) for shard in range(geometry.shards)]


def _is_open_here(owners: Owners) -> bool:
    """Whether one of those who have the store open is another service of this process. By pid and
    start: in another container the same pid is another process's."""
    pid, started = os.getpid(), started_at(os.getpid())
    return any(o.pid == pid and abs(o.started - started) < 1 for o in owners.alive())


def _wait_until_alone(owners: Owners) -> bool:
    """Whether nobody else has the store open: workers of a server just killed need a moment."""
    deadline = time.monotonic() + 1
    while owners.others():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def drop_unfinished(directory: Path) -> None:
    """Remove what a killed process was about to rename; the open lock keeps living ones out."""
    for path in directory.glob("*.tmp"):
        name, _, pid = path.stem.rpartition(".")
        if name in (index_file.NAME, description.NAME) and pid.isdigit():
            path.unlink(missing_ok=True)


def _require_same(directory: Path, geometry: Geometry, page_bytes: int, shards: int) -> None:
    pairs = {
        "page_bytes": (geometry.page_bytes, page_bytes),
        "num_of_shard": (geometry.shards, shards),
    }
    for field, (found, expected) in pairs.items():
        if found != expected:
            raise StoreFormatError(
                f"the store {directory} has {field} {found}, not {expected}; nothing was changed",
                path=str(directory),
                field=field,
                found=found,
                expected=expected,
            )


def describe(directory: Path) -> Geometry | None:
    """The geometry of a store, from its description or the shards' own headers; changes nothing.

    None: there is no store. Raises StoreFormatError for one of another format version.
    """
    return description.load(directory) or _from_shards(directory)


def _from_shards(directory: Path) -> Geometry | None:
    """The description from the shards' own headers; None when there are none."""
    data, records = (sorted(directory.glob(f"shard-*.{kind}")) for kind in ("data", "slots"))
    for path in data + records:
        header = shard_header.read_header(path)
        if header is None:
            continue
        shards, page_bytes = int(header["shards"]), int(header["page_bytes"])
        files, each = (data, page_bytes) if data else (records, fmt.RECORD.itemsize)
        sizes = [p.stat().st_size for p in files]
        slots = max(0, max(sizes) - fmt.SHARD_HEADER_BYTES) // each
        log.warning(
            "store %s: its description is lost; the shards' headers say the same", directory
        )
        store_id = bytes(header["store_id"]).hex()
        return Geometry(store_id, page_bytes, shards, slots, slots * shards * page_bytes)
    return None
