"""Readers against eviction at full speed: a store that holds a tenth of the working set.

`tight` is a store of hardly more than one large block: there a block is evicted while it is read,
which the order of use otherwise prevents (what is being read was used last).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter

from tests.stress.nursery import Nursery
from tests.stress.player import BLOCK_PAGES, Plan, check_store

PAGE_BYTES = 8192
TIGHT_PAGE_BYTES = 32768  # copies long enough to be overtaken


def run(
    store: str, seed: int, seconds: float, players: int = 4, tight: bool = False
) -> Counter[str]:
    """`players` servers write and read for `seconds`; returns what was counted."""
    if tight:
        plan = Plan(store, 80 * TIGHT_PAGE_BYTES, 1, 16, 1, TIGHT_PAGE_BYTES, aborts=0.0)
    else:
        keys = 1000
        pages = keys * sum(BLOCK_PAGES) // len(BLOCK_PAGES)
        plan = Plan(store, pages // 10 * PAGE_BYTES, 2, keys, 1, PAGE_BYTES, aborts=0.005)
    nursery = Nursery(plan)
    for n in range(players):
        nursery.start(seed * 1000 + n, seconds)
    nursery.wait(seconds + 60)
    counts = nursery.counts
    for what in nursery.wrong:
        sys.stderr.write(f"seed {seed}: {what}\n")
        counts["wrong"] += 1
    counts.update(check_store(plan))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tight", action="store_true", help="a store of hardly one large block")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        counts = run(f"{directory}/store", args.seed, args.seconds, tight=args.tight)
    for name, count in sorted(counts.items()):
        sys.stdout.write(f"{name:20} {count}\n")
    sys.stdout.write(f"evictions a second   {counts['evictions'] / args.seconds:.0f}\n")
    reads = counts["loaded"] + counts["lost_races"]
    sys.stdout.write(f"reads lost to races  {100 * counts['lost_races'] / max(1, reads):.3f}%\n")
    sys.exit(1 if counts["wrong"] or counts["hangs"] or counts["check problems"] else 0)


if __name__ == "__main__":
    main()
