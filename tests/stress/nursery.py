"""Forks players, kills them, hears what they say, and knows when one hangs."""

from __future__ import annotations

import json
import os
import selectors
import signal
import sys
import time
from collections import Counter

from tests.stress import player
from tests.stress.player import Plan

HANG_SECONDS = 60.0


class Child:
    """One forked player."""

    def __init__(self, plan: Plan, seed: int, seconds: float) -> None:
        read, write = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(read)
            player.main(plan, seed, write, seconds)
        os.close(write)
        os.set_blocking(read, False)
        self.pipe = read
        self.workers: list[int] = []
        self.counts: Counter[str] = Counter()
        self.heard = time.monotonic()
        self.wrong: list[str] = []
        self.error = ""
        self.stats: dict[str, int] = {}
        self.status: int | None = None
        self._rest = b""

    def listen(self) -> None:
        """Take in what it has said."""
        try:
            raw = os.read(self.pipe, 1 << 16)
        except BlockingIOError:
            return
        self.heard = time.monotonic()
        *lines, self._rest = (self._rest + raw).split(b"\n")
        for line in lines:
            said = json.loads(line)
            self.counts = Counter(said["counts"]) or self.counts
            self.workers = said.get("workers", self.workers)
            self.stats = said.get("stats", self.stats)
            self.error = said.get("error", self.error)
            if "wrong" in said:
                self.wrong.append(said["wrong"])

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Signal the server."""
        os.kill(self.pid, number)

    def ended(self) -> bool:
        """Whether it has ended; reaps it."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
                self.listen()
        return self.status is not None

    def close(self) -> None:
        os.close(self.pipe)


class Nursery:
    """All players of a run. Sums up what they counted."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.children: list[Child] = []
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def start(self, seed: int, seconds: float) -> Child:
        """Fork one more player."""
        child = Child(self._plan, seed, seconds)
        self.children.append(child)
        return child

    def tend(self, seconds: float) -> None:
        """Listen for a while; players that end, or hang, are taken off the list."""
        end = time.monotonic() + seconds
        while True:
            left = end - time.monotonic()
            with selectors.DefaultSelector() as selector:
                for child in self.children:
                    selector.register(child.pipe, selectors.EVENT_READ)
                if self.children:
                    selector.select(max(0.0, min(left, 0.05)))
                else:
                    time.sleep(max(0.0, left))
            for child in list(self.children):
                child.listen()
                if not child.ended() and time.monotonic() - child.heard > HANG_SECONDS:
                    self.counts["hangs"] += 1
                    child.kill()
                    os.waitpid(child.pid, 0)
                    child.status = -signal.SIGKILL
                if child.status is not None:
                    self._bury(child)
            if left <= 0:
                return

    def tend_until_loaded(self) -> None:
        """Until every player has loaded a block, however slow the machine; those that hang are
        counted and gone."""
        while any(not child.counts["loaded"] for child in self.children):
            self.tend(0.02)

    def wait(self, seconds: float) -> None:
        """Until all players have ended; those that have not by then are killed, as hanging."""
        end = time.monotonic() + seconds
        while self.children and time.monotonic() < end:
            self.tend(0.02)
        self.counts["hangs"] += len(self.children)
        self.kill_all()

    def kill_all(self) -> None:
        """kill -9 of every server and every worker at once."""
        for child in self.children:
            for pid in [child.pid, *child.workers]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        while self.children:
            self.tend(0.01)

    def _bury(self, child: Child) -> None:
        self.children.remove(child)
        self.counts.update(child.counts)
        for name in ("lost_races", "damaged", "restarts"):
            self.counts[name] += child.stats.get(name, 0)
        evictions = child.stats.get("evictions", 0)  # of the whole store, ever
        self.counts["evictions"] = max(self.counts["evictions"], evictions)
        if child.status not in (0, -signal.SIGKILL):
            self.wrong += child.wrong or [f"status {child.status} {child.error}"]
        child.close()
