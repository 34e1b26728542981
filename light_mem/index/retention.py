"""How long blocks stay: their times to live, and pins that eviction leaves alone.

Both are one number in a block's entry and record, its `keep` (see `format.py`). An expired block
is a miss for every look-up from that second on; its slots go when room is needed next, before
those of any other block. Times are whole seconds, rounded up: a block may live a second longer
than it was given, never shorter.
"""

from __future__ import annotations

import math
import time

import numpy as np
import numpy.typing as npt

from light_mem.index import format as fmt
from light_mem.index.control import Control
from light_mem.index.runs import slots_needed

Keeps = npt.NDArray[np.uint32]

clock = time.time  # seconds since 1970

# A sweep holds the shard's lock for some 10 us a block.
SWEEP_BLOCKS = 1024


def now() -> int:
    """The second that `keep` is compared with."""
    return max(0, int(clock()) - fmt.KEEP_EPOCH)


def keep_for(time_to_live: float | None) -> int:
    """The `keep` of a block that is written now, to live so many seconds; None: for good."""
    if time_to_live is None:
        return 0
    until = clock() + time_to_live - fmt.KEEP_EPOCH
    return max(1, math.ceil(min(until, fmt.KEEP_TIME_MASK)))


def expires_at(keep: int) -> int | None:
    """When a block with this `keep` expires, or would if it were not pinned: seconds since 1970;
    None: never."""
    second = keep & fmt.KEEP_TIME_MASK
    return second + fmt.KEEP_EPOCH if second else None


def has_expired(keep: int) -> bool:
    """Whether a block with this `keep` counts as absent. (A pinned one is beyond any time.)"""
    return 0 < keep <= clock() - fmt.KEEP_EPOCH  # each look-up asks: no more calls than needed


def expired(keeps: Keeps) -> npt.NDArray[np.bool_]:
    """`has_expired` of many, shape [n]."""
    return np.asarray(keeps - np.uint32(1) < np.uint32(now()))  # 0 becomes the largest number


def pinned_among(entries: npt.NDArray[np.void], page_bytes: int) -> tuple[int, int]:
    """How many of the stored blocks among entries, ENTRY [n], are pinned, and their slots."""
    live = fmt.states_of(entries["tag"]) == fmt.LIVE
    nbytes = entries["nbytes"][live & (entries["keep"] >= fmt.KEEP_PINNED)]
    return len(nbytes), int(slots_needed(nbytes.astype(np.int64), page_bytes).sum())


class Retention:
    """Pins and expiry of one shard, and what its control page says of them.

    Changed under the shard's lock. All counts follow from the entries: `recount` makes them anew
    after a death.
    """

    def __init__(
        self,
        control: npt.NDArray[np.void],
        entries: npt.NDArray[np.void],
        uses: npt.NDArray[np.uint64],
        page_bytes: int,
    ) -> None:
        self._control = Control(control)
        self._entries = entries
        self._tags = entries["tag"]
        self._keeps: Keeps = entries["keep"]
        self._nbytes = entries["nbytes"]
        self._uses = uses
        self._page_bytes = page_bytes
        self.limit = len(entries) // 2  # slots that may be pinned: writes always find the others

    @property
    def pinned_slots(self) -> int:
        """Slots of pinned blocks."""
        return self._control.pinned_slots

    @property
    def is_overcounted(self) -> bool:
        """Whether the control page says that more is pinned than may be: damage."""
        return self._control.pinned_slots > self.limit

    def slots_at(self, slot: int) -> int:
        """Slots of the block that begins at `slot`."""
        return slots_needed(int(self._nbytes[slot]), self._page_bytes)

    def is_pinned(self, slot: int) -> bool:
        """Whether the block at `slot` is pinned."""
        return int(self._keeps[slot]) >= fmt.KEEP_PINNED

    def is_kept_by_lease(self, slot: int) -> bool:
        """Whether a leased block at `slot` keeps its slots, and is not among the `pinned`."""
        state = fmt.state_of(self._tags[slot])
        return state == fmt.HELD or (state == fmt.LIVE and not self.is_pinned(slot))

    def has_expired(self, slot: int) -> bool:
        """Whether the block that is listed at `slot` counts as absent."""
        return has_expired(int(self._keeps[slot]))

    def has_room(self, slots: int) -> bool:
        """Whether so many more slots may be pinned."""
        return bool(self._control.pinned_slots + slots <= self.limit)

    def excess(self, slots: list[int]) -> int:
        """Slots by which the limit would be exceeded if these blocks were pinned too; 0: none."""
        needed = sum(self.slots_at(slot) for slot in slots if not self.is_pinned(slot))
        return max(0, self._control.pinned_slots + needed - self.limit)

    def pin(self, slot: int) -> int:
        """Pin the stored block at `slot`; returns its new `keep`, for its record."""
        keep = int(self._keeps[slot])
        if keep < fmt.KEEP_PINNED:
            self._count(slot, 1)
            keep |= fmt.KEEP_PINNED
            self._keeps[slot] = keep
        return keep

    def unpin(self, slot: int) -> int:
        """Take the pin away; returns the block's new `keep`. Counts as a use: while it was pinned
        the block had no place in the order of use, so it begins at the end."""
        keep = int(self._keeps[slot])
        if keep >= fmt.KEEP_PINNED:
            self._count(slot, -1)
            keep &= fmt.KEEP_TIME_MASK
            self._uses[slot] = time.time_ns()
            self._expects(keep)
            self._keeps[slot] = keep
        return keep

    def uses(self, slot: int) -> None:
        """Count the listed block at `slot`, if there is one, as used now."""
        if fmt.state_of(self._tags[slot]) == fmt.LIVE:
            self._uses[slot] = time.time_ns()

    def arrives(self, slot: int) -> None:
        """A block whose entry says all but LIVE is about to be listed."""
        if self.is_pinned(slot):
            self._count(slot, 1)
        self._expects(int(self._keeps[slot]))

    def _expects(self, keep: int) -> None:
        if 0 < keep < fmt.KEEP_PINNED:
            first = self._control.expires
            if not first or keep < first:
                self._control.expires = keep

    def leaves(self, slot: int) -> None:
        """The block at `slot` has been taken out."""
        if self.is_pinned(slot):
            self._count(slot, -1)

    def _count(self, slot: int, sign: int) -> None:
        control = self._control
        control.pinned = max(0, control.pinned + sign)
        control.pinned_slots = max(0, control.pinned_slots + sign * self.slots_at(slot))

    def recount(self) -> None:
        """What the control page says of pins and expiry, from the entries."""
        control = self._control
        control.pinned, control.pinned_slots = pinned_among(self._entries, self._page_bytes)
        self.expect_next()

    def is_due(self) -> bool:
        """Whether a listed block's time is up, so that `take_expired` walks over the entries."""
        first = self._control.expires
        return 0 < first <= now()

    def take_expired(self) -> list[int]:
        """First slots of blocks whose time is up, at most SWEEP_BLOCKS, to be taken out at once.

        Costs nothing before the time of the first one is up, then a walk over the entries. When
        they are out, `expect_next` must follow.
        """
        if not self.is_due():
            return []
        live = (self._tags & np.uint64(fmt.STATE_MASK)) == fmt.LIVE
        slots: list[int] = np.flatnonzero(live & expired(self._keeps))[:SWEEP_BLOCKS].tolist()
        if not slots:
            self.expect_next()
        return slots

    def expect_next(self) -> None:
        """Set when the first of the listed blocks expires. Take expired blocks out before: look-ups
        check no block's time if this says that no block has one."""
        live = (self._tags & np.uint64(fmt.STATE_MASK)) == fmt.LIVE
        keeps = self._keeps[live]
        timed = keeps[(keeps > 0) & (keeps < fmt.KEEP_PINNED)]
        self._control.expires = int(timed.min()) if timed.size else 0
