"""kill -9 at random moments: of workers, of servers, of all at once, with several on one store.

After each round a fresh process opens the store and reads every block: absent or byte-correct.
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


def run(store: str, seed: int, seconds: float, rounds: int | None = None) -> Counter[str]:
    """Rounds of work and killing for `seconds`, or `rounds` of them; returns what was counted."""
    dice = random.Random(seed)
    plan = Plan(store, 700 * 1536 * 4, 4, keys=240, workers=2)
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end and (rounds is None or counts["rounds"] < rounds):
        nursery = Nursery(plan)
        for _ in range(2):
            nursery.start(dice.getrandbits(32), 60)
        kind = dice.choice(("worker", "worker", "server", "all"))
        _round(nursery, dice, kind, counts)
        nursery.kill_all()
        counts.update(nursery.counts)
        for what in nursery.wrong:
            sys.stderr.write(f"seed {seed} round {counts['rounds']}: {what}\n")
            counts["wrong"] += 1
        counts.update(check_store(plan))
        counts["rounds"] += 1
    return counts


def _round(nursery: Nursery, dice: random.Random, kind: str, counts: Counter[str]) -> None:
    if dice.random() < 0.75:  # else some are killed while they open the store
        nursery.tend_until_loaded()
    nursery.tend(dice.uniform(0.1, 0.6))
    if kind == "worker":
        for _ in range(4):
            workers = [pid for child in nursery.children for pid in child.workers]
            if workers:
                try:
                    os.kill(dice.choice(workers), signal.SIGKILL)
                    counts["workers killed"] += 1
                except ProcessLookupError:
                    pass
            nursery.tend(dice.uniform(0.02, 0.3))
    elif kind == "server" and nursery.children:
        nursery.children[0].kill()
        counts["servers killed"] += 1
        nursery.tend(dice.uniform(0.1, 0.5))  # the other one goes on
    counts["killed at the end"] += len(nursery.children)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        counts = run(f"{directory}/store", args.seed, args.seconds, args.rounds)
    for name, count in sorted(counts.items()):
        sys.stdout.write(f"{name:20} {count}\n")
    sys.exit(1 if counts["wrong"] or counts["hangs"] or counts["check problems"] else 0)


if __name__ == "__main__":
    main()
