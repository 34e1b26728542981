"""The pipe that carries the log lines of workers to the server's log."""

from __future__ import annotations

import logging
import os

log = logging.getLogger("light_mem")

_TAIL_LINES = 50


class WorkerLog:
    """One pipe for all workers of a service; a line is a level, a blank, the text. `write` is their
    standard error, so that a traceback comes here too. One thread at a time."""

    def __init__(self) -> None:
        """Raises OSError where no descriptors are left."""
        self.read, self.write = os.pipe()
        os.set_blocking(self.read, False)
        self._tail: list[str] = []

    def relay(self) -> None:
        """Log what is there."""
        if self.read < 0:
            return
        try:
            raw = os.read(self.read, 1 << 16)
        except BlockingIOError:
            return
        for line in raw.decode("utf-8", "replace").splitlines():
            level, _, text = line.partition(" ")
            self._tail = [*self._tail[-_TAIL_LINES:], line]
            if level.isdigit():
                log.log(int(level), "%s", text)
            else:
                log.error("worker: %s", line)

    def tail(self, lines: int) -> str:
        """The last lines, for an error that says why workers do not start."""
        return "\n".join(self._tail[-lines:])

    def close(self) -> None:
        """Log what is there, and close both ends. Calling it again does nothing."""
        self.relay()
        (read, self.read), (write, self.write) = (self.read, -1), (self.write, -1)
        for descriptor in (read, write):
            if descriptor >= 0:
                os.close(descriptor)
