"""Measures a store that is larger than the memory given: page_cache "keep" and "drop".

    python tools/bench_beyond_memory.py                    # 1 GiB of memory, a store of 2 GiB
    python tools/bench_beyond_memory.py --limit 512 --rounds 1 --json out.json

All work is done in a control group with a memory limit (as root, or with --limited in one that has
a limit already). In turn, round by round, each moves every byte of a store's worth:

plain          one thread, pieces of 8 MiB, front to back: pwrite and a last fdatasync, to a file
               of the store's size beside it; preadv of what was written of the store's data files
plain, direct  the same by O_DIRECT
keep, drop     a service of each policy: all blocks under new hashes, evicting, and a last
               fdatasync of the data files; all blocks in random order

Before each, the files are written out and dropped from the page cache, and another file, the
bystander, is read twice: what of it is in the page cache afterwards says what the work did to the
rest of a server's page cache. Bytes read are compared with those written. Medians of the rounds.
Needs disk for twice the store and the bystander: 4.3 GiB with these sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmark import machine
from benchmark.beyond_memory import MIB, Plain, Store
from benchmark.memory_limit import memory_limit
from benchmark.resident import resident, write_out
from rich.console import Console
from rich.table import Table


def warm(bystander: Path) -> None:
    """Have a file in the page cache, as one that is used."""
    buffer = bytearray(MIB)
    for _ in range(2):
        with bystander.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds; runs inside the group."""
    directory = options.directory
    bystander = directory / "bystander"
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    files: list[Path] = []

    def take(name: str, work: str, call: Callable[[], tuple[float, int]]) -> None:
        for path in files:
            write_out(path, forget=True)
        warm(bystander)
        before = resident(bystander)
        seconds, nbytes = call()
        sample = {
            "GBps": nbytes / seconds / 1e9,
            "bystander before": before,
            "bystander after": resident(bystander),
            "store in cache": statistics.fmean(resident(p) for p in files if p.name != "plain"),
        }
        found.setdefault(name, {}).setdefault(work, []).append(sample)
        text = ", ".join(f"{key} {value:.2f}" for key, value in sample.items())
        print(f"  {name}, {work}: {text}", file=sys.stderr, flush=True)

    generation = 1
    first = Store(options, "drop", generation)
    first.write(generation)  # the first fill of preallocated room is another work
    report = first.service.check()
    first.close()
    plain = {
        "plain": Plain(directory, options.store, 0),
        "plain, direct": Plain(directory, options.store, os.O_DIRECT),
    }
    files += [*sorted((directory / "store").glob("shard-*.data")), directory / "plain"]
    for _ in range(options.rounds):
        for name, device in plain.items():
            take(name, "write", device.write)
            take(name, "read", device.read)
        for policy in ("keep", "drop"):
            generation += 1
            store = Store(options, policy, generation)
            take(policy, "write", lambda s=store, g=generation: s.write(g))
            take(policy, "read", lambda s=store, g=generation: s.read(g))
            store.close()
    store = Store(options, "drop", generation)
    report = store.service.check()
    store.close()
    return {"samples": found, "check": {"blocks": report.blocks, "damaged": len(report.damaged)}}


def summary(samples: dict[str, Any]) -> dict[str, Any]:
    """Medians, and shares of the better of the two plain ways."""
    out: dict[str, Any] = {}
    for name, works in samples.items():
        for work, each in works.items():
            middle = {key: statistics.median(s[key] for s in each) for key in each[0]}
            out.setdefault(name, {})[work] = middle
    for work in ("write", "read"):
        best = max(out[name][work]["GBps"] for name in out if name.startswith("plain"))
        for name in out:
            out[name][work]["of the device"] = out[name][work]["GBps"] / best
    return out


def show(found: dict[str, Any], options: argparse.Namespace) -> None:
    table = Table(
        title=f"{options.limit} MiB of memory, {options.store // MIB} MiB of blocks of "
        f"{options.pages * options.page_bytes / 1e6:.3g} MB, {options.workers} workers",
        title_justify="left",
    )
    for name in ("", "GB/s", "of the device", "bystander kept", "store in cache"):
        table.add_column(name, justify="right" if name else "left")
    for work in ("write", "read"):
        for name, works in found.items():
            row = works[work]
            kept = row["bystander after"] / max(row["bystander before"], 1e-9)
            table.add_row(
                f"{work}, {name}",
                f"{row['GBps']:.2f}",
                f"{row['of the device']:.2f}",
                f"{100 * kept:.0f}%",
                f"{100 * row['store in cache']:.0f}%",
            )
        table.add_section()
    Console(width=None if Console().is_terminal else 110, highlight=False).print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--limit", type=int, default=1024, help="MiB of memory (%(default)s)")
    add("--times", type=float, default=2.0, help="the store is so many times the limit")
    add("--bystander", type=int, help="MiB of the other file (a quarter of the limit)")
    add("--kv", type=int, help="MiB of the KV tensor (an eighth of the limit)")
    add("--page-bytes", type=int, default=61440, help="(%(default)s)")
    add("--pages", type=int, default=64, help="of a block (%(default)s)")
    add("--workers", type=int, default=2, help="(%(default)s)")
    add("--rounds", type=int, default=3, help="(%(default)s)")
    add("--limited", action="store_true", help="this process has the limit already")
    add("--directory", type=Path, help="where the files go (default: temporary)")
    add("--json", type=Path, help="write all figures there")
    add("--inside", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    options.bystander = options.bystander or options.limit // 4
    options.kv = options.kv or options.limit // 8
    options.store = int(options.limit * options.times * MIB)
    if options.inside:
        if options.inside != "-":
            Path(options.inside).write_text(str(os.getpid()))
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory(prefix="light-mem-bench-", dir=options.directory) as name:
        directory = Path(name)
        with (directory / "bystander").open("wb") as file:
            for _ in range(options.bystander):
                file.write(os.urandom(MIB))
        write_out(directory / "bystander", forget=True)  # its pages belong to who reads it first
        with nullcontext("-") if options.limited else memory_limit(options.limit * MIB) as group:
            given = [a for a in sys.argv[1:] if a != "--limited" and not a.startswith("--json")]
            if options.json:
                given = [a for a in given if a != str(options.json)]
            ran = subprocess.run(
                [sys.executable, __file__, *given, "--directory", name, "--inside", str(group)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
        found = json.loads(ran.stdout)
        found["machine"] = machine.describe(directory)
    found["summary"] = summary(found["samples"])
    show(found["summary"], options)
    print(f"check: {found['check']}")
    if options.json:
        found["options"] = {k: str(v) for k, v in vars(options).items()}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
