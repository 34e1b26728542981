"""Member: an open store whose blocks can be leased, and which is left in order.

While anybody looks at a block of it, the process stays a member of the store.
"""

from __future__ import annotations

import _thread
import logging

from light_mem.closing import Ending
from light_mem.engine import keeping
from light_mem.engine.open_store import OpenStore
from light_mem.errors import LeaseLimitError, LockTimeoutError
from light_mem.index.locks import LOCK_TIMEOUT_SECONDS, PathLock, lock_path

log = logging.getLogger("light_mem")

# Log records keep their arguments: an exception among them would keep its frames, and with them
# mappings of a store that is long closed. So errors are logged as text.


class Member(OpenStore):
    """An open store until it is left. Any thread."""

    _closed = False
    _broken_off = False  # `close` was interrupted
    _leaving: Ending | None = None  # from `close` on
    _in_order = True  # nothing of ours was left behind

    # --- leases ----------------------------------------------------------------------------------

    def lease(self, low: int, high: int) -> keeping.Leased | None:
        """Keep a block where it lies until `end_lease`; see `keeping.lease`. Any thread."""
        try:
            keeping.end_dropped(self, timeout=0)  # what is not to be had now can wait
            try:
                return keeping.lease(self, low, high)
            except LeaseLimitError:
                if not self.leases.dropped:
                    raise
            keeping.end_dropped(self, timeout=1)  # ... unless it is what is in the way
            return keeping.lease(self, low, high)
        finally:
            self._leave_if_closed()

    def end_dropped(self) -> None:
        """End the leases of views that were dropped, as far as that needs no waiting. For who
        comes here now and then: `lease` and `close` do it as well. Any thread."""
        if self.leases.dropped:
            keeping.end_dropped(self, timeout=0)
            self._leave_if_closed()

    # --- leaving ----------------------------------------------------------------------------------

    @property
    def is_closed(self) -> bool:
        """Whether `close` has begun."""
        return self._closed

    def close(self) -> None:
        """Leave the store; the last one to leave syncs the index. Calling it again does nothing, or
        ends what a Ctrl-C has broken off.

        While blocks are leased the process stays a member, until the last lease has ended.
        """
        if self._closed and not self._broken_off:
            return
        if self._leaving is None:
            # Not made before: its steps name this object, and are struck off when they are made.
            self._leaving = Ending(
                self._end_membership,
                self._owners.close,
                self._let_go,
                self.limited.flush,
                self._open.close,
            )
        self._closed, self._broken_off = True, False
        try:
            if self.leases.closed:
                self._leaving()
            else:
                self._in_order = self._end_moves()
                keeping.end_dropped(self, timeout=1)  # a living holder needs some milliseconds
                self._leave_unless_leased()
        except BaseException as error:
            self._broken_off = not isinstance(error, Exception)
            raise

    def _end_moves(self) -> bool:
        """End what is in hand; whether none of our slots is left behind."""
        return True

    def _let_go(self) -> None:
        """The store was left: let go of what only moved bytes."""

    def end_lease(self, leased: keeping.Leased) -> None:
        """End a lease of `lease`; the last one of a closed engine ends its membership too."""
        keeping.end_lease(self, leased.shard, leased.slot)
        self._leave_if_closed()

    def drop_lease(self, leased: keeping.Leased) -> None:
        """As `end_lease`, from a finalizer: it only notes what is to be done, for its thread may
        hold any lock. Who comes next does it; a closed engine, where nobody may, has a thread."""
        self.leases.dropped.append((leased.shard, leased.slot))
        if self._closed and self.leases.ending.acquire(blocking=False):
            try:
                # Not `threading.Thread`, whose `start` waits for the thread.
                _thread.start_new_thread(self._end_dropped_of_closed, ())
            except RuntimeError:  # none to be had: the process ends, or another view's end does it
                self.leases.ending.release()

    def _end_dropped_of_closed(self) -> None:
        again = True
        while again:
            try:
                ended = keeping.end_dropped(self, LOCK_TIMEOUT_SECONDS)
            finally:
                self.leases.ending.release()
            # A finalizer that saw this thread at work left it its note.
            again = (
                ended and bool(self.leases.dropped) and self.leases.ending.acquire(blocking=False)
            )
        self._leave_unless_leased()

    def _leave_if_closed(self) -> None:
        if self._closed:
            self._leave_unless_leased()

    def _leave_unless_leased(self) -> None:
        """Leave the store. Who still looks at blocks in it stays a member, so that they stay what
        they are; leases that could not be ended end with the membership, as at a death."""
        if self.leases.close():
            assert self._leaving is not None
            self._leaving()

    def _end_membership(self) -> None:
        quiet = self._open.shut(LOCK_TIMEOUT_SECONDS)
        if quiet and self._in_order and not self.leases.open:
            self._owner.leave()
        try:
            if not quiet:
                raise LockTimeoutError(
                    "a change has not ended",
                    path=str(self.directory),
                    timeout=LOCK_TIMEOUT_SECONDS,
                )
            with PathLock(lock_path(self.directory, "open")).hold(timeout=10):
                if not self._owners.others():
                    self._owners.flush()  # before: see there
                    self._index.mark_clean()
        except (LockTimeoutError, OSError) as error:
            log.warning("store %s is left without a sync: %s", self.directory, str(error))
