"""The parent's handle on the processes of one contestant."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmark import machine, rivals
from benchmark.machine import cpu_of
from benchmark.plan import Plan

_IDLE_SECONDS = 0.1
_READY_SECONDS = 0.05  # in which several processes hear when to begin
_END_SECONDS = 60.0
_TICK = 0.005  # less than what the kernel counts CPU time in

TOOLS = Path(__file__).resolve().parent.parent


class ContestantError(RuntimeError):
    """A process of a contestant ended; the message is the end of its log."""


class Contestant:
    """Starts the processes of a contestant on a shared tensor, and tells them what to do.

    `source` says how to map the tensor (`light_mem.engine.kvmemory.MemorySource`). Raises
    rivals.NotInstalledError when its package is missing.
    """

    def __init__(
        self,
        kind: str,
        directory: Path,
        source: Any,
        plan: Plan,
        workers: int,
        options: dict[str, Any] | None = None,
        processes: int | None = None,
    ) -> None:
        self.code = kind  # its name on the command line
        self.failed = False
        self.kind = rivals.find(kind)
        self.name = self.kind.name
        self.plan = plan
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._logs = directory.parent / f"{directory.name}.log"
        shares = processes or (workers if self.kind.one_process_each else 1)
        config = {
            "kind": kind,
            "directory": str(directory),
            "memory": source._asdict(),
            "plan": plan.to_json(),
            "workers": workers,
            "shares": shares,
            "options": options or {},
            "log": str(self._logs),
            "parent": os.getpid(),
        }
        self._processes: list[subprocess.Popen[str]] = []
        self._others: list[psutil.Process] = []
        try:
            # One after the other: the first makes the store that the others open.
            for share in range(shares):
                self._start({**config, "share": share}, source.fd)
        except BaseException:
            self.kill()
            raise
        self._look()

    def _start(self, config: dict[str, Any], fd: int) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmark.host", json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[fd] if fd >= 0 else [],
            start_new_session=True,  # a Ctrl-C is the parent's, which ends them in order
            env={
                **os.environ,
                **self.kind.environment(self.plan),
                "PYTHONPATH": os.pathsep.join(
                    [str(TOOLS), str(TOOLS.parent), os.environ.get("PYTHONPATH", "")]
                ),
                "OPENBLAS_NUM_THREADS": "1",
                "OMP_NUM_THREADS": "1",
            },
        )
        self._processes.append(process)
        self._answer(process)

    def about(self) -> dict[str, str]:
        """Its version, how it is used, what it lacks."""
        try:
            version = importlib.metadata.version(self.kind.package) if self.kind.package else ""
        except importlib.metadata.PackageNotFoundError:
            version = "from a checkout"
        return {
            "name": self.name,
            "version": version,
            "how": self.kind.how,
            "lacks": self.kind.lacks,
        }

    @property
    def processes(self) -> int:
        """How many processes have it, each with a share of the blocks."""
        return len(self._processes)

    @property
    def many_passes(self) -> bool:
        """Whether passes may follow each other without the others waiting for each."""
        alone = self.kind.one_process_each or self.processes == 1
        return alone and (self.kind.evicts or self.kind.delete is rivals.Rival.delete)

    def _look(self) -> None:
        self.family = []
        for process in self._processes:
            own = psutil.Process(process.pid)
            self.family += [own, *own.children(recursive=True)]

    def _answer(self, process: subprocess.Popen[str]) -> Any:
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            text = self._logs.read_text(errors="replace") if self._logs.exists() else ""
            raise ContestantError(f"{self.name}: {text[-2000:]}")
        answer = json.loads(line)
        if "missing" in answer:
            raise rivals.NotInstalledError(answer["missing"])
        return answer["answer"]

    def tell(self, do: str, first_only: bool = False, **arguments: Any) -> list[Any]:
        """What each process answers; they work at the same time."""
        told = self._processes[:1] if first_only else self._processes
        for process in told:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            process.stdin.flush()
        return [self._answer(process) for process in told]

    def move(self, what: str, passes: int = 1) -> float:
        """Seconds of `write`, `read` or `mixed`: those of the slowest process. Where what is
        replaced must be deleted, untimed, each pass is told by itself."""
        if self.many_passes:
            return float(max(self.tell(what, passes=passes)))
        return float(sum(max(self.tell(what)) for _ in range(passes)))

    def complete(self, what: str, passes: int) -> None:
        """After `passes` of `what`: have every block there. A service that is at two passes of
        writing at a time may have evicted a block of the last one for one of the pass before."""
        if what == "write" and passes > 1 and not self.kind.one_process_each:
            self.move("write")

    def steady(self, what: str, seconds: float) -> tuple[int, int]:
        """Bytes that all processes together move by `write` or `read` while all are at it, for so
        many seconds, and the bytes until the last has ended its pass."""
        self.tell("prepare_steady", mode=what, seconds=seconds)
        begin = time.monotonic() + _READY_SECONDS
        moved, total = zip(
            *self.tell("steady", mode=what, begin=begin, seconds=seconds), strict=True
        )
        return sum(moved), sum(total)

    def awake(self, yes: bool) -> None:
        """Stop a contestant that uses the CPU while idle, so that it does not slow others down."""
        if self.kind.spins:
            for process in self._processes:
                process.send_signal(signal.SIGCONT if yes else signal.SIGSTOP)

    def forget(self, meanwhile: Callable[[], None] = lambda: None) -> float:
        """Drop its files from the page cache; returns which share of them stayed.

        What maps its files is closed for that, and opened anew afterwards. `meanwhile` may read
        the files, and must drop them again.
        """
        closed = all(self.tell("suspend"))  # what cannot be closed does not map its files
        stayed = machine.forget(self.directory)
        meanwhile()
        if closed:
            self.tell("resume")
            self._look()
        return stayed

    def rest(self, seconds: float = 10.0) -> None:
        """Wait until its processes do nothing any more: what they do later is not for others to
        wait for."""
        deadline = time.monotonic() + seconds
        while not self.kind.spins and time.monotonic() < deadline:
            before = sum(map(cpu_of, self.family))
            time.sleep(_IDLE_SECONDS)
            if sum(map(cpu_of, self.family)) - before < _TICK:
                return

    def check(self) -> dict[str, Any]:
        """What the store says of itself after the work."""
        return dict(self.tell("check", first_only=True)[0])

    def close(self) -> None:
        self.awake(True)
        for process in self._processes:
            if process.stdin:
                process.stdin.close()
        for process in self._processes:
            try:
                code = process.wait(_END_SECONDS if rivals.is_ours(self.code) else _END_SECONDS / 3)
            except subprocess.TimeoutExpired:
                if rivals.is_ours(self.code):
                    raise
                # Its figures are taken, and what it wrote is deleted: the run need not end here.
                print(f"{self.name} did not end in time and was killed", file=sys.stderr)
                process.kill()
                process.wait()
                code = 0
            if process.stdout:
                process.stdout.close()
            if code:
                raise ContestantError(f"{self.name} ended with {code}: {self._logs.read_text()}")

    def kill(self) -> None:
        """End its processes, whatever they do."""
        for process in self._processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream:
                    with suppress(OSError):  # what was told last, and nobody reads
                        stream.close()
        self._processes = []


def close_all(contestants: Iterable[Contestant]) -> None:
    """Close each, the rest too when one fails."""
    failed: Exception | None = None
    for contestant in contestants:
        try:
            contestant.close()
        except Exception as err:
            contestant.kill()
            failed = failed or err
    if failed:
        raise failed
