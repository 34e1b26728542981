"""The worker processes of one service: started, listened to, waited for."""

from __future__ import annotations

import logging
import math
import os
import select
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from light_mem import descriptors
from light_mem.engine import child_start, program, worker
from light_mem.engine.child_end import how_it_ended
from light_mem.engine.kvmemory import MemorySource
from light_mem.engine.settings import EngineSettings
from light_mem.engine.task_table import TaskTable
from light_mem.engine.worker_log import WorkerLog

log = logging.getLogger("light_mem")

# One thread a worker: they would only add memory and start time.
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

_LOOK_SECONDS = 0.5  # between two looks at one that is waited for; 0.01 where there are no pidfds

Process = subprocess.Popen[bytes]


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """A process that is started here does not hear SIGINT until it says so: a Ctrl-C in the
    terminal goes to the whole group, and a worker ignores it only from its first line on. What this
    process does with it is no matter: its other threads go on to hear it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkerProcesses:
    """Workers by number, and what one thread sleeps on to hear of them: their pidfds, the pipe of
    their log lines, and a pipe of its own. One thread at a time; `end` and `close` also where a
    signal's handler or a finalizer interrupts that thread, and again where it was interrupted."""

    def __init__(
        self,
        table: TaskTable,
        memory: MemorySource,
        settings: EngineSettings,
        cpus: Sequence[Sequence[int]] | None,
    ) -> None:
        """`settings`: the same for every worker; `cpus`: one set per worker; a replacement inherits
        them."""
        self._table = table
        self._memory = memory
        self._settings = settings
        self._cpus = cpus
        self._path = child_start.search_path()  # now: a later current directory is not to matter
        self._processes: dict[int, Process] = {}
        self._ended: dict[int, str] = {}  # how, of the dead that are not forgotten
        self._pidfds: dict[int, int] = {}
        self._selector = selectors.DefaultSelector()
        self._wakes: list[int] = []  # a pipe
        self.log: WorkerLog | None = None

    def open(self) -> None:
        """Be able to listen; raises OSError where no descriptors are left."""
        descriptors.keep_standard_numbers()
        lines = self.log = WorkerLog()
        self._wakes = list(os.pipe())
        self._selector.register(lines.read, selectors.EVENT_READ, lines.relay)
        self._selector.register(self._wakes[0], selectors.EVENT_READ, None)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers now. Any thread."""
        return [p.pid for p in list(self._processes.values())]

    @property
    def tell_of_their_deaths(self) -> bool:
        """Whether `listen` returns when one dies; else it is to be asked now and then."""
        return bool(self._pidfds)

    def start(self, number: int) -> None:
        """Start a worker, after `open`; raises OSError."""
        assert self.log is not None
        config = {
            "number": number,
            "parent": os.getpid(),
            "table_fd": self._table.fd,
            "table_path": self._table.path,
            "memory": self._memory._asdict(),
            "log_level": log.getEffectiveLevel(),
            "cpus": self._cpus[number - 1] if self._cpus else None,
            "engine": self._settings._asdict(),
        }
        passed = [self._table.fd]
        if self._memory.kind == "fd":
            passed.append(self._memory.fd)
        descriptors.keep_standard_numbers()  # closed since? its pidfd lives as long as it does
        with (
            child_start.command(worker.__name__, config, self._path) as (command, told),
            _no_interrupts(),
        ):
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.log.write,
                pass_fds=[*passed, told],
                env=child_start.environment(program.environment(_ENVIRONMENT)),
            )
        try:
            pidfd = descriptors.pidfd(process.pid)
            if pidfd >= 0:
                self._pidfds[number] = pidfd
                self._selector.register(pidfd, selectors.EVENT_READ, None)
        except BaseException:  # no descriptor left: nobody would know of this worker
            if number in self._pidfds:
                os.close(self._pidfds.pop(number))
            process.kill()
            process.wait()
            raise
        self._processes[number] = process

    def listen(self, seconds: float) -> None:
        """Sleep until there is something to do, at most so long; logs what workers say."""
        for key, _ in self._selector.select(seconds):
            relay: Callable[[], object] | None = key.data
            if relay is not None:
                relay()

    def wake(self) -> None:
        """Have `listen` return; nothing to do before `open`. Any thread, before `close`."""
        if self._wakes:
            os.write(self._wakes[1], b"x")

    def dead(self) -> Iterator[tuple[int, int, str]]:
        """Those that have died and are not forgotten: number, process id, and how it ended."""
        for number, process in list(self._processes.items()):
            if number not in self._ended:
                how = how_it_ended(process, self._pidfds.get(number, -1))
                if how is None:
                    continue
                self._ended[number] = how
            yield number, process.pid, self._ended[number]

    def forget(self, number: int) -> None:
        """A worker has died; what it still had to say is logged."""
        assert self.log is not None
        self.log.finish()
        process = self._processes.get(number)
        if process is None:
            return
        process.poll()  # not `wait`: its lock may be this thread's, further out
        self._table.workers[number : number + 1]["ready"] = 0
        pidfd = self._pidfds.pop(number, -1)
        if pidfd >= 0:
            with suppress(KeyError):  # closed meanwhile, further in
                self._selector.unregister(pidfd)
            os.close(pidfd)
        self._ended.pop(number, None)
        self._processes.pop(number, None)  # last: one that is not forgotten is met again

    @property
    def said(self) -> str:
        """What workers complained of last, in a line; "": of nothing."""
        return self.log.last if self.log is not None else ""

    def forget_said(self) -> None:
        """What workers have said so far is of no use to who asks why others do not start."""
        if self.log is not None:
            self.log.last = ""

    def end(self, seconds: float) -> None:
        """All were told to leave: forget them, and kill those who have not left by then."""
        deadline = time.monotonic() + seconds
        for number, process in list(self._processes.items()):
            if not self._wait(number, process, deadline):
                log.warning("worker pid %d did not leave; killed", process.pid)
                process.kill()
        for number, process in list(self._processes.items()):
            self._wait(number, process)
            self.forget(number)

    def _wait(self, number: int, process: Process, deadline: float = math.inf) -> bool:
        """Whether a worker has ended, by then. Not `Popen.wait`, which keeps a lock meanwhile: a
        signal's handler that waits for the same worker would wait for its own thread."""
        while process.poll() is None:
            seconds = min(deadline - time.monotonic(), _LOOK_SECONDS)
            if seconds <= 0:
                return False
            pidfd = self._pidfds.get(number, -1)
            if pidfd < 0:
                time.sleep(min(seconds, 0.01))
                continue
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if poll.poll(math.ceil(seconds * 1000)):
                return True
        return True

    def close(self) -> None:
        """Nobody listens any more."""
        self._selector.close()
        if self.log is not None:
            self.log.close()
        while self._wakes:
            os.close(self._wakes.pop())
