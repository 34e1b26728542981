"""Servers that join, leave, die and are stopped on one store.

A server that is stopped may hold a shard's lock; the others go on, at the price of aborted blocks,
and it goes on when it is continued.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter

from tests.stress.nursery import Nursery
from tests.stress.player import Plan, check_store


def run(store: str, seed: int, seconds: float, stop_seconds: float = 0.5) -> Counter[str]:
    """Comings and goings for `seconds`; returns what was counted."""
    dice = random.Random(seed)
    plan = Plan(store, 500 * 1536 * 2, 2, keys=200, workers=1)
    nursery = Nursery(plan)
    counts = nursery.counts
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if len(nursery.children) < 3:
            nursery.start(dice.getrandbits(32), dice.uniform(0.5, 4.0))  # and leaves by itself
            counts["joins"] += 1
        nursery.tend(dice.uniform(0.05, 0.4))
        child = dice.choice(nursery.children) if nursery.children else None
        if child is None:
            continue
        what = dice.random()
        if what < 0.15:
            child.kill()
            counts["servers killed"] += 1
        elif what < 0.3:
            victims = dice.choice(([child.pid], child.workers, [child.pid, *child.workers]))
            _signal(victims, signal.SIGSTOP)
            counts["stops"] += 1
            nursery.tend(stop_seconds)
            _signal(victims, signal.SIGCONT)
    nursery.wait(60)
    for what in nursery.wrong:
        sys.stderr.write(f"seed {seed}: {what}\n")
        counts["wrong"] += 1
    counts.update(check_store(plan))
    return counts


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        counts = run(f"{directory}/store", args.seed, args.seconds)
    for name, count in sorted(counts.items()):
        sys.stdout.write(f"{name:20} {count}\n")
    sys.exit(1 if counts["wrong"] or counts["hangs"] or counts["check problems"] else 0)


if __name__ == "__main__":
    main()
