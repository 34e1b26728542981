"""Warnings at a bounded rate: a failing disk must not fill the log with one line a block."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger("light_mem")

EACH = 5  # lines of one kind
SECONDS = 60.0  # ... in so long


class _Kind:
    """What happened to one message template."""

    __slots__ = ("began", "last", "said", "suppressed")

    def __init__(self, now: float) -> None:
        self.began = now
        self.said = 0
        self.suppressed = 0
        self.last = ""  # of those that were suppressed


class Limited:
    """Logs at most `each` lines of one message template in `seconds`, per object; the first line
    after that says how many were left out. Any thread.

    A kind is the text before its arguments are put in. Each store, worker or service has an
    object of its own, so that one does not silence another.
    """

    def __init__(
        self,
        each: int = EACH,
        seconds: float = SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._each = each
        self._seconds = seconds
        self._clock = clock
        self._kinds: dict[str, _Kind] = {}
        self._guard = threading.RLock()  # a signal's handler may flush while its thread warns

    def warning(self, template: str, *arguments: object) -> None:
        """Log a warning, or count it."""
        with self._guard:
            suppressed = self._admit(template, arguments)
        if suppressed is None:
            return
        if suppressed:
            template, arguments = template + " (suppressed %d similar)", (*arguments, suppressed)
        log.warning(template, *arguments, stacklevel=2)

    def _admit(self, template: str, arguments: tuple[object, ...]) -> int | None:
        """None: leave this one out; else how many were left out before it."""
        now = self._clock()
        kind = self._kinds.get(template)
        if kind is None:
            kind = self._kinds[template] = _Kind(now)
        suppressed = 0
        if now - kind.began >= self._seconds:
            suppressed, kind.suppressed = kind.suppressed, 0
            kind.began, kind.said = now, 0
        if kind.said >= self._each:
            kind.suppressed += 1
            # As text: what is kept here is not to keep anything else.
            kind.last = template % arguments if arguments else template
            return None
        kind.said += 1
        return suppressed

    def flush(self) -> None:
        """At the end: say how many were left out and not told of yet, and the last one of each."""
        with self._guard:
            kinds = list(self._kinds.values())
            left = [(kind.last, kind.suppressed) for kind in kinds if kind.suppressed]
            for kind in kinds:
                kind.suppressed = 0
        for text, count in left:
            log.warning("suppressed %d similar to: %s", count, text)
