"""Writing one block at once, for who must not wait. A part of LocalStorageEngine.

The steps of `writing.py` in one hold of the shard's lock: room, intent, marks, copy, record,
publish.
"""

from __future__ import annotations

import time
import weakref
from typing import TYPE_CHECKING

from light_mem.engine.base import BlockIO, Outcome
from light_mem.engine.gather import Gatherer
from light_mem.engine.intents import Intents
from light_mem.engine.publishing import is_present
from light_mem.index.keys import mix_one, shard_of
from light_mem.index.owners import Owner
from light_mem.index.replica import ScanNeeded
from light_mem.index.written import Written

if TYPE_CHECKING:
    from light_mem.engine.local import LocalStorageEngine
    from light_mem.engine.scans_ahead import ScansAhead


class WriteNow:
    """Writes single blocks for one engine. Not thread-safe, nor beside its Writer."""

    def __init__(
        self, engine: LocalStorageEngine, owner: Owner, intents: Intents, gatherer: Gatherer
    ) -> None:
        # Weak: in a cycle, the maps of a closed store would stay until the next collection.
        self._engine: LocalStorageEngine = weakref.proxy(engine)
        self._owner = owner
        self._intents = intents
        self._gatherer = gatherer
        self._geometry = engine.geometry

    def write(self, block: BlockIO, ahead: ScansAhead | None = None) -> Outcome | None:
        """Write one block in one hold of its shard's lock, which is only tried; raises
        LockTimeoutError, OSError, StoreFormatError. By system calls alone: a store to a mapping
        may be SIGBUS.

        STORED, or PRESENT, which counts as use. None: not done, for want of room, because one of
        another length is stored, or because it would take long: the shard is not open yet, is to
        be put in order, or has no room before expired blocks are taken out. With `ahead` this call
        never goes over all entries of a shard: where it would have to, it tells `ahead`.
        """
        engine = self._engine
        low, high, place = block
        nbytes = place.nbytes
        mixed = mix_one(low, high)
        if engine.lookup.find_one(low, high, mixed=mixed) >= 0:
            return Outcome.PRESENT if engine.is_stored(low, high, nbytes) else None
        shard = shard_of(mixed, self._geometry.shards)
        if not engine.is_at_hand(shard):
            return None
        if ahead is None or engine.is_near(shard):
            try:
                return self._write(block, mixed, shard, ahead)
            except ScanNeeded:
                pass
        assert ahead is not None
        ahead.refused(shard)
        return None

    def _write(
        self, block: BlockIO, mixed: int, shard: int, ahead: ScansAhead | None
    ) -> Outcome | None:
        engine = self._engine
        low, high, place = block
        nbytes = place.nbytes
        slots = self._geometry.slots_of(nbytes)
        failure: OSError | None = None
        may_scan = ahead is None
        change = engine.change(shard, timeout=0) if may_scan else engine.change_at_hand(shard)
        with change as (index, file):
            self._intents.give_back(shard, index, file)
            stored = index.find(low, high)
            if stored is not None:  # stored meanwhile, or expired
                return Outcome.PRESENT if is_present(index, stored, nbytes) else None
            if index.retention.is_due() and not index.has_room(slots):
                return None
            evicted: list[int] = []
            where = index.allocate_at_hand(slots, evicted, engine.evicts, may_scan)
            if where is not None:
                self._intents.announce(shard, [where.slot])
            if evicted:
                file.clear_records(evicted)
            if where is None:
                if ahead is not None:
                    ahead.refused(shard, index.sorting())
                return None
            index.mark(where.runs, self._owner.number)
            try:
                [checksum] = file.plan(self._gatherer, [(where.runs, block)], by_calls=True)(None)
            except OSError as error:  # passed on after the hold: in it, it would count as a death
                failure = error
                index.give_back(where.slot)
            else:
                now = time.time_ns()
                [keep] = engine.keeps_for([(low, high)])
                written = Written(low, high, checksum, nbytes, where.runs, now, keep)
                file.write_records([written])
                index.publish([written], [mixed], now)
                if ahead is not None:
                    is_low = bool(evicted) and index.is_running_low
                    ahead.wrote(shard, index.sorting() if is_low else None)
        if not engine.is_closed:  # by this very thread: the record may be another's by now
            self._intents.announce(shard, [])
        if failure is not None:
            raise failure
        return Outcome.STORED
