"""The other end of `scan_child.py`: a process that scans units for the thread that owns it.

Whatever ends the process early, the thread learns it from the pipe's end and reads the unit
itself: no unit is lost, and none is taken for clean that was not read to its end.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from light_mem.descriptors import keep_standard_numbers, memory_file
from light_mem.engine import child_start
from light_mem.maintenance import scan_child
from light_mem.maintenance.scan_child import ANSWER, DONE_BYTES, END, FAILED_BLOCK, HEADER
from light_mem.maintenance.scanning import Batch, Told


class ScanProcess:
    """One child process. One thread scans; any may kill."""

    def __init__(self) -> None:
        """Raises OSError when it cannot be started."""
        keep_standard_numbers()
        self._memory = memory_file("light-mem-verify")
        try:
            config = {"parent": os.getpid(), "memory": self._memory}
            path = child_start.search_path()
            with child_start.command(scan_child.__name__, config, path) as (command, told):
                # A session of its own: a Ctrl-C in the terminal is for the parent to answer.
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[self._memory, told],
                    env=child_start.environment(os.environ),
                    start_new_session=True,
                    bufsize=0,
                )
        except BaseException:
            os.close(self._memory)
            raise
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._units, self._answers = self._process.stdin, self._process.stdout

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def scan(self, path: Path, batch: Batch, told: Told) -> list[int] | None:
        """What `Scanner.scan` gives; None when the process ended before it had read it all."""
        at = 0
        for column in batch:
            view = memoryview(column)
            while view:
                written = os.pwrite(self._memory, view, at)
                view, at = view[written:], at + written
        name = os.fsencode(path)
        header = HEADER.pack(len(name), len(batch.low) // 8, len(batch.stretches))
        try:
            self._units.write(header + name)
        except BrokenPipeError:
            return None
        failed: list[int] = []
        rest = b""
        while True:
            part = os.read(self._answers.fileno(), 1 << 16)
            if not part:
                return None
            rest += part
            whole = len(rest) - len(rest) % ANSWER.size
            for kind, number in ANSWER.iter_unpack(rest[:whole]):
                if kind == DONE_BYTES:
                    told(number)
                elif kind == FAILED_BLOCK:
                    failed.append(number)
                elif kind == END:
                    return failed
            rest = rest[whole:]

    def kill(self) -> None:
        """End it at once, whatever it does."""
        self._process.kill()

    def close(self) -> None:
        """Let it leave, wait for its end. Once, when no thread scans any more."""
        self._units.close()
        self._answers.close()
        os.close(self._memory)
        self._process.wait()
