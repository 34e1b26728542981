"""A thread that begins once at most, and is waited for by whoever ends it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

_JOIN_SECONDS = 0.5


class OneThread:
    """Any thread, and signals' handlers and finalizers in the middle of any of this: no lock."""

    def __init__(self, name: str) -> None:
        self._name = name
        # `_first["it"]`: the thread, or None if `end` came first; `setdefault` decides atomically.
        self._first: dict[str, threading.Thread | None] = {}
        self._over = False

    def start(self, run: Callable[[], None]) -> None:
        """Start it, unless it has begun, or `end` came first; so also after a call that a Ctrl-C
        broke off."""
        # `run` is an argument, and not kept: what it belongs to keeps this object.
        threading.Thread(target=self._run, args=(run,), name=self._name, daemon=True).start()

    def _run(self, run: Callable[[], None]) -> None:
        me = threading.current_thread()
        if self._first.setdefault("it", me) is not me:
            return
        try:
            run()
        finally:
            self._over = True

    def end(self, wake: Callable[[], None], seconds: float = math.inf) -> bool:
        """End the thread; True if it ended within `seconds` or never started. Called from the
        thread itself it returns at once. `wake` is called before the wait. Pass `seconds` where the
        thread may need something that the caller holds further up its stack (a log handler's lock,
        a shard that is being opened): it cannot end before the caller goes on."""
        thread = self._first.setdefault("it", None)
        if thread is None or thread is threading.current_thread():
            return True
        if not self._over:
            wake()
        deadline = time.monotonic() + seconds
        thread.join(min(seconds, _JOIN_SECONDS))
        # Not one long `join`: in the middle of another of this thread it might wait for that one.
        while not self._over and time.monotonic() < deadline:
            thread.join(_JOIN_SECONDS)
        return self._over
