"""Publishing blocks that were copied: their records, then all at once in the index. A part of
LocalStorageEngine.

One hold of the shard's lock a part of a batch: all become visible, or give their slots back.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING

from light_mem.engine import removing
from light_mem.engine.base import Outcome
from light_mem.engine.intents import Intents
from light_mem.engine.write_job import Failures, Part
from light_mem.errors import LockTimeoutError, StoreFormatError
from light_mem.index.format import KEEP_PINNED
from light_mem.index.locks import LOCK_TIMEOUT_SECONDS, SHORT_SECONDS
from light_mem.index.owners import Owner
from light_mem.index.written import Written

if TYPE_CHECKING:
    from light_mem.engine.local import LocalStorageEngine
    from light_mem.engine.shard_file import ShardFile
    from light_mem.index.shard import ShardIndex

log = logging.getLogger("light_mem")


def is_present(index: ShardIndex, slot: int, nbytes: int) -> bool:
    """Whether the block listed at `slot` is of this length and has not expired."""
    same = int(index.entries["nbytes"][slot]) == nbytes
    return same and not index.retention.has_expired(slot)


class Publisher:
    """Publishes for one engine. Not thread-safe."""

    def __init__(
        self, engine: LocalStorageEngine, owner: Owner, intents: Intents, *, flush: bool
    ) -> None:
        """`flush`: what is published is on the device before."""
        # Weak: in a cycle, the maps of a closed store would stay until the next collection.
        self._engine: LocalStorageEngine = weakref.proxy(engine)
        self._owner = owner
        self._intents = intents
        self._flush = flush

    def publish(self, parts: list[Part]) -> Failures:
        """Wait for what is under way to the slots, and publish; tells the outcomes. Takes the parts
        from the list one by one. Returns what failed: its slots stay announced."""
        failures: Failures = []
        later: deque[tuple[Part, dict[int, Written]]] = deque()  # described; somebody has the lock
        # Do not wait for a lock whose holder is stopped while others are free.
        alone = len(parts) == 1
        while True:
            written: dict[int, Written] | None = None
            try:
                part = parts.pop(0)
            except IndexError:  # not asked before: this very thread may close the engine meanwhile
                if not later:
                    return failures
                part, written = later.popleft()
            is_last_try = alone or written is not None
            timeout = LOCK_TIMEOUT_SECONDS if is_last_try else 0 if later else SHORT_SECONDS
            try:
                if written is None:
                    file = self._engine.file(part.shard)
                    file.land(part.under_way)
                    written = self._describe(part, file)
                self._publish(part, written, timeout)
            except (OSError, StoreFormatError) as error:
                if isinstance(error, LockTimeoutError) and not is_last_try and written is not None:
                    later.append((part, written))
                else:  # without its frames, which refer to the parts
                    failures.append((part, error.with_traceback(None)))

    def _describe(self, part: Part, file: ShardFile) -> dict[int, Written]:
        """Write the records of what lies in its slots; by position in the batch."""
        if not part.copied:
            return {}
        pairs, nbytes = part.job.keys.pairs, part.job.nbytes
        keys = [pairs[at] for at, _, _ in part.copied]
        now = time.time_ns()
        written = {
            at: Written(low, high, checksum, nbytes[at], runs, now, keep)
            for (at, runs, checksum), (low, high), keep in zip(
                part.copied, keys, self._engine.keeps_for(keys), strict=True
            )
        }
        file.write_records(list(written.values()))
        if self._flush:
            file.sync()
        return written

    def _publish(self, part: Part, written: dict[int, Written], timeout: float) -> None:
        shard, taken, job = part.shard, part.taken, part.job
        pairs = job.keys.pairs
        outcomes: list[tuple[int, Outcome]] = []
        stored: list[int] = []
        fresh: dict[tuple[int, int], int] = {}  # positions
        with self._engine.change(shard, timeout) as (index, file):
            ours = index.are_marked(part.slots, self._owner.number)
            before = index.stamp()
            for (at, where), is_ours in zip(taken, ours, strict=True):
                block = written.get(at)
                if not is_ours:
                    outcomes.append((at, Outcome.FAILED))  # cleared or put in order meanwhile
                elif block is None:
                    index.give_back(where.slot)
                    outcomes.append((at, Outcome.STOPPED))
                elif (other := fresh.setdefault(pairs[at], at)) != at:  # twice in one batch
                    if written[other].nbytes != block.nbytes:  # the later one replaces it
                        fresh[pairs[at]], at = at, other
                    removing.give_back(index, file, written[at].slot)
                    outcomes.append((at, Outcome.PRESENT))
            if index.stamp() != before:  # damage was met, and the shard put in order
                for key, at in list(fresh.items()):
                    if not index.is_marked(written[at].slot, self._owner.number):
                        del fresh[key]
                        outcomes.append((at, Outcome.FAILED))
            if fresh:
                stored = self._publish_fresh(index, file, list(fresh.values()), written, part)
                if len(stored) < len(fresh):
                    others = set(fresh.values()).difference(stored)
                    outcomes += [(at, Outcome.PRESENT) for at in sorted(others)]
        self._intents.forget(shard, part.slots)
        if stored:
            job.settle(stored, Outcome.STORED)
        job.settle_each(outcomes)

    def _publish_fresh(
        self,
        index: ShardIndex,
        file: ShardFile,
        fresh: list[int],
        written: dict[int, Written],
        part: Part,
    ) -> list[int]:
        """Publish the blocks at these positions (their keys differ), except those that another
        process has stored meanwhile. Returns the positions that were published."""
        keys = part.job.keys.at(fresh)
        stored = [] if index.stamp() == part.all_new else index.find_mixed(keys)
        pinned: dict[int, int] = {}  # slots of pinned blocks, by what replaces them
        if stored and max(stored) >= 0:
            left = []
            for at, slot in zip(fresh, stored, strict=True):
                block = written[at]
                if slot >= 0 and is_present(index, slot, block.nbytes):
                    removing.give_back(index, file, block.slot)
                    continue
                if slot >= 0:  # expired, or of another length: with other settings, by another
                    if index.retention.is_pinned(slot):
                        pinned[at] = index.retention.slots_at(slot)
                    removing.take_out(index, file, slot)
                    index.control["removals"] += 1
                left.append(at)
            fresh, keys = left, part.job.keys.at(left)
        more = 0  # slots that are pinned as these are published
        # Those that are no longer than before have their pins in any case, and so come first.
        for at in sorted(pinned, key=lambda at: self._slots_of(written[at]) > pinned[at]):
            more += self._pin(index, file, written, at, pinned[at], more)
        blocks = [written[at] for at in fresh]
        index.publish(blocks, keys.mixed, time.time_ns())
        return fresh

    def _pin(
        self,
        index: ShardIndex,
        file: ShardFile,
        written: dict[int, Written],
        at: int,
        slots: int,
        more: int,
    ) -> int:
        """Pin the block at `at`, which replaces a pinned one of `slots` slots, before it is
        published: this process may die in between. `more`: slots pinned by other blocks of the same
        publication. Returns the slots pinned; 0 where there is no room for a longer pinned one."""
        block = written[at]
        wanted = self._slots_of(block)
        if wanted > slots and not index.retention.has_room(more + wanted):
            log.warning(
                "a pinned block of shard %d of %s was replaced by a longer one, which is not "
                "pinned: more than half of the shard would be",
                index.shard,
                self._engine.directory,
            )
            return 0
        written[at] = block._replace(keep=block.keep | KEEP_PINNED)
        file.set_keep(block.slot, written[at].keep)
        return wanted

    def _slots_of(self, block: Written) -> int:
        return self._engine.geometry.slots_of(block.nbytes)
