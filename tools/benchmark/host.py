"""The process that holds a contestant, or a share of one: commands in, seconds out.

    python -m benchmark.host CONFIG

A line in, a line out, both JSON. What a contestant's libraries print goes to a log file.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmark import rivals
from benchmark.plan import Plan
from benchmark.rivals.base import Rival, Setup
from benchmark.rivals.service import Service
from benchmark.rivals.service import under_way as service_tasks

_MOST_BYTES_A_SECOND = 30e9
_PAUSE = 0.008  # seconds
_TOUCH_BYTES = 4096
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def touch(memory: npt.NDArray[Any]) -> None:
    """Have the kernel map the KV tensor into this process, before anything is timed.

    LightMem's idle workers do so by themselves; others would pay these page faults in their first
    fill, though a server has long had its KV memory mapped by then.
    """
    memory.reshape(-1)[::_TOUCH_BYTES].max()


class Host:
    """Carries commands out on its share of the blocks, and keeps their hashes."""

    def __init__(self, config: dict[str, Any]) -> None:
        from light_mem.engine.kvmemory import MemorySource, attach

        self._plan = Plan.from_json(config["plan"])
        self._kind = rivals.find(config["kind"])
        memory = attach(MemorySource(**config["memory"]))
        self._setup = Setup(
            memory=memory.reshape(-1, self._plan.shape.page_bytes),
            directory=Path(config["directory"]),
            plan=self._plan,
            workers=config["workers"],
            share=config["share"],
            shares=config["shares"],
            options=config["options"],
        )
        touch(memory)
        share = slice(config["share"], None, config["shares"])
        self._blocks = np.arange(self._plan.blocks)[share]
        self._pages = self._plan.pages()[share]
        self._rewritten = self._plan.rewritten()[share]
        self._generation = 0
        self._versions = np.zeros(len(self._blocks), np.int64)
        self._rival: Rival = self._kind(self._setup)
        self._ahead: list[list[Any]] = []  # hashes of the passes of `steady`

    def hashes(self, which: npt.NDArray[Any]) -> list[Any]:
        """The present hashes of some of this share's blocks."""
        return self._rival.hashes(self._versions[which], self._blocks[which])

    def _renew(self, which: npt.NDArray[Any], delete: bool) -> list[Any]:
        """Next generation of some blocks; `delete` takes their old ones out first."""
        if self._generation and (delete or not self._rival.evicts):
            self._rival.delete(self.hashes(which))
        self._generation += 1
        self._versions[which] = self._generation
        return self.hashes(which)

    # Each of these takes time that does not count before `started`.

    def write(self, passes: int = 1) -> float:
        """All blocks, each under a new hash, `passes` times."""
        every = np.arange(len(self._blocks))
        hashes = [self._renew(every, delete=False) for _ in range(passes)]
        started = time.perf_counter()
        self._rival.write_passes(hashes, self._pages)
        return time.perf_counter() - started

    def read(self, passes: int = 1) -> float:
        """All blocks into the pages they came from."""
        hashes = self.hashes(np.arange(len(self._blocks)))
        started = time.perf_counter()
        self._rival.read_passes(hashes, self._pages, passes)
        return time.perf_counter() - started

    def mixed(self, passes: int = 1) -> float:
        """Three tenths of the blocks are written, the others read, at the same time."""
        new, old = np.flatnonzero(self._rewritten), np.flatnonzero(~self._rewritten)
        taken = 0.0
        for _ in range(passes):
            written = self._renew(new, delete=True)
            kept = self.hashes(old)
            started = time.perf_counter()
            self._rival.mixed(kept, self._pages[old], written, self._pages[new])
            taken += time.perf_counter() - started
        return taken

    def prepare_steady(self, mode: str, seconds: float, first: int = 0) -> None:
        """Make the hashes for `steady`, or for `beside`: of more passes of writing than any memory
        has time for, of all blocks from the `first` on."""
        these = np.arange(first, len(self._blocks))
        nbytes = len(these) * self._plan.shape.block_bytes
        passes = 1 + int(_MOST_BYTES_A_SECOND * seconds) // nbytes if mode == "write" else 1
        self._ahead = [
            self._renew(these, delete=False) if mode == "write" else self.hashes(these)
            for _ in range(passes)
        ]

    def steady(self, mode: str, begin: float, seconds: float) -> tuple[int, int]:
        """Passes of `write` or `read` without a pause, from `begin` (`time.monotonic`, in all
        processes the same) until `seconds` later and then to the end of the pass; returns the
        bytes moved in that time, the last pass's in proportion, and those moved in all."""
        hashes, passes = self._ahead, len(self._ahead)
        nbytes = len(self._blocks) * self._plan.shape.block_bytes
        first = self._generation - passes + 1
        time.sleep(max(0.0, begin - time.monotonic()))
        end, done = begin + seconds, 0
        while True:
            started = time.monotonic()
            if mode == "write":
                self._rival.write(hashes[done % passes], self._pages)
                self._versions[:] = first + done % passes
            else:
                self._rival.read(hashes[0], self._pages)
            ended, done = time.monotonic(), done + 1
            if ended >= end:
                # A process that the kernel left waiting may have begun its last pass too late.
                beyond = min(1.0, (ended - end) / (ended - started))
                return int((done - beyond) * nbytes), done * nbytes

    def tasks(self, mode: str, size: int, under_way: int, seconds: float) -> tuple[int, int]:
        """As `steady`, in tasks of `size` blocks, `under_way` at a time; of a service only. Tasks
        go over all blocks again and again. The bytes moved in that time are a share of all: some
        tasks end after it."""
        service = self._rival
        assert isinstance(service, Service)
        count, moved = len(self._blocks), 0
        hashes = list(chain.from_iterable(self._ahead))  # of writes, more than there is time for
        started = time.monotonic()

        def created() -> Iterator[list[Any]]:
            nonlocal moved
            first = 0
            while time.monotonic() < started + seconds:
                these = np.arange(first, first + size)
                asked = [hashes[n % len(hashes)] for n in range(first, first + size)]
                moved += size * self._plan.shape.block_bytes
                first += size
                yield service.create(mode, asked, self._pages[these % count])

        service_tasks(under_way, created(), service.finish)
        return int(moved * seconds / (time.monotonic() - started)), moved

    def beside(self, count: int, seconds: float) -> tuple[list[float], float]:
        """Seconds of each read of the first `count` blocks, while all others are written pass after
        pass for so many seconds, the next always queued; and bytes written a second. Reads come at
        any moment of a pass, with up to _PAUSE between them."""
        kept = self.hashes(np.arange(count))
        others = self._pages[count:]
        self._rival.read(kept, self._pages[:count])  # else they were the first to be evicted
        self._rival.keep(kept)
        end = time.perf_counter() + seconds
        written = 0

        def passes() -> Iterator[list[Any]]:
            nonlocal written
            for hashes in self._ahead:
                if time.perf_counter() > end:
                    return
                written += len(hashes) * self._plan.shape.block_bytes
                yield hashes

        started = time.perf_counter()
        writer = threading.Thread(target=self._rival.write_passes, args=(passes(), others))
        writer.start()
        out, pauses = [], np.random.default_rng(self._generation)
        while time.perf_counter() < end:
            time.sleep(_PAUSE * pauses.random())
            asked = time.perf_counter()
            self._rival.read(kept, self._pages[:count])
            out.append(time.perf_counter() - asked)
        writer.join()
        return out, written / (time.perf_counter() - started)

    def latency(self, mode: str, count: int) -> list[float]:
        """Seconds of `count` calls with one block each. Of a service the caller asks without a
        pause whether it is done, as LightMem's `wait` and a sleep differ in what they add."""
        out = []
        if isinstance(self._rival, Service):
            self._rival.spin = True
        for n in range(count):
            at = np.array([n % len(self._blocks)])
            hashes = self._renew(at, delete=True) if mode == "write" else self.hashes(at)
            pages = self._pages[at]
            call = self._rival.write if mode == "write" else self._rival.read
            started = time.perf_counter()
            call(hashes, pages)
            out.append(time.perf_counter() - started)
        if isinstance(self._rival, Service):
            self._rival.spin = False
        return out

    def suspend(self) -> bool:
        """Let go of maps and descriptors; False when that would lose what is stored."""
        if not self._kind.persistent:
            return False
        self._rival.close()
        del self._rival  # what it mapped goes with its objects
        gc.collect()
        return True

    def resume(self) -> None:
        self._rival = self._kind(self._setup)

    def check(self) -> dict[str, Any]:
        return self._rival.check()

    def close(self) -> None:
        self._rival.close()


def _die_with_parent(parent: int) -> None:
    """However the suite ends: a host that it has stopped (SIGSTOP) would stay for good."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        os._exit(1)


def main() -> None:
    config = json.loads(sys.argv[1])
    _die_with_parent(config["parent"])
    answers = os.fdopen(os.dup(1), "w")
    log = os.open(config["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    try:
        host = Host(config)
    except rivals.NotInstalledError as err:
        answers.write(json.dumps({"missing": str(err)}) + "\n")
        return
    answers.write(json.dumps({"answer": None}) + "\n")
    answers.flush()
    for line in sys.stdin:
        command = json.loads(line)
        answer = getattr(host, command.pop("do"))(**command)
        answers.write(json.dumps({"answer": answer}) + "\n")
        answers.flush()
    host.close()


if __name__ == "__main__":
    main()
