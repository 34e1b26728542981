"""Counts what a batch of blocks shares with other processes: locks, system calls, cache lines.

    python tools/count_sharing.py                    # batches of 1, 8 and 96 blocks, one shard
    python tools/count_sharing.py --shards 4 --json out.json

The counts depend on the code alone, not on the machine or its load.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmark.sharing import measure
from rich.console import Console
from rich.table import Table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 8, 96], help="of a batch")
    parser.add_argument("--shards", type=int, default=1, help="of the store (%(default)s)")
    parser.add_argument("--json", type=Path, help="write all counts there")
    options = parser.parse_args()
    table = Table(
        title=f"one batch, a store of {options.shards} shards, full", title_justify="left"
    )
    for name in ("", "blocks", "shard locks", "queue locks", "system calls", "cache lines changed"):
        table.add_column(
            name, justify="right" if name not in ("", "cache lines changed") else "left"
        )
    found = {}
    for blocks in options.blocks:
        for what, counts in measure(blocks, options.shards).items():
            lines = {name: n for name, n in counts.lines.items() if n}
            found[f"{what}, {blocks}"] = {
                "shard locks": counts.shard_locks,
                "queue locks": counts.queue_locks,
                "system calls": dict(counts.calls),
                "cache lines": lines,
            }
            table.add_row(
                what,
                str(blocks),
                str(counts.shard_locks),
                str(counts.queue_locks),
                f"{counts.calls.total()}",
                ", ".join(f"{name} {n}" for name, n in lines.items()),
            )
        table.add_section()
    console = Console(width=None if Console().is_terminal else 150, highlight=False)
    console.print(table)
    for what, counts_of in found.items():
        calls = ", ".join(f"{n} {name}" for name, n in counts_of["system calls"].items())
        console.print(f"{what}: {calls or 'no system call'}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
