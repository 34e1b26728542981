"""The pipe that carries the log lines of workers to the server's log."""

from __future__ import annotations

import logging
import os
import weakref

log = logging.getLogger("light_mem")

_READ_BYTES = 1 << 16
_LONGEST = 1 << 16  # bytes of a line; what has no end is not gathered for ever
_QUOTED = 500  # characters of a line in an error


class WorkerLog:
    """One pipe for all workers of a service; a line is a level, a blank, the text. `write` is their
    standard error, so that a traceback comes here too. One thread at a time.

    Only this process has `read`, and no program that it becomes: where that end is closed, workers
    know that their server is gone (`program.die_with`).
    """

    def __init__(self) -> None:
        """Raises OSError where no descriptors are left."""
        self.read, self.write = os.pipe()
        os.set_blocking(self.read, False)
        _logs.add(self)
        self._begun = b""  # of a line whose end has not come yet
        self.last = ""  # what they complained of last, for an error that says why none is left

    def relay(self) -> bool:
        """Log the whole lines that are there, of one read; False: nothing is there."""
        if self.read < 0:
            return False
        try:
            raw = os.read(self.read, _READ_BYTES)
        except BlockingIOError:
            return False
        *lines, self._begun = (self._begun + raw).split(b"\n")
        for line in lines:
            self._log(line)
        if len(self._begun) > _LONGEST:
            self._log_begun()
        return bool(raw)

    def finish(self) -> None:
        """Log all that is there, with or without the end of a line: who wrote it is dead. (A line
        of up to PIPE_BUF bytes, 4,096 on Linux, comes as one; it is of nobody who lives.)"""
        while self.relay():
            pass
        self._log_begun()

    def _log_begun(self) -> None:
        line, self._begun = self._begun, b""
        self._log(line)

    def _log(self, raw: bytes) -> None:
        line = raw.decode("utf-8", "replace").rstrip()
        if not line:
            return
        level, _, text = line.partition(" ")
        if len(level) != 2 or not level.isdecimal():
            level, text = str(logging.ERROR), f"worker: {line}"
        log.log(int(level), "%s", text)
        if int(level) >= logging.WARNING:
            self.last = text.removeprefix("worker: ").strip()[:_QUOTED]

    def close(self) -> None:
        """Log what is there, and close both ends. Calling it again does nothing."""
        self.finish()
        self.abandon()

    def abandon(self) -> None:
        """Close both ends."""
        (read, self.read), (write, self.write) = (self.read, -1), (self.write, -1)
        for descriptor in (read, write):
            if descriptor >= 0:
                os.close(descriptor)


_logs: weakref.WeakSet[WorkerLog] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # Else the parent could become another program, and its workers would not know.
    for each in list(_logs):
        each.abandon()


os.register_at_fork(after_in_child=_after_fork_in_child)
