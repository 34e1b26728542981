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
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from benchmark import extents, machine
from benchmark.memory_limit import memory_limit
from benchmark.resident import resident, write_out
from rich.console import Console
from rich.table import Table

from light_mem.engine.maps import private_memory

MIB = 1 << 20
PIECE = 8 * MIB
SHARDS = 4


class Plain:
    """The device by itself."""

    def __init__(self, directory: Path, nbytes: int, flags: int) -> None:
        self._path = directory / "plain"
        self._nbytes = nbytes - nbytes % PIECE
        self._files = sorted((directory / "store").glob("shard-*.data"))
        self._flags = flags
        self._buffer = private_memory(PIECE)
        self._buffer[:] = np.frombuffer(os.urandom(PIECE), np.uint8)
        if not self._path.exists():
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT)
            os.posix_fallocate(descriptor, 0, self._nbytes)
            os.close(descriptor)
            self.write()  # the first write of preallocated room is another work

    def write(self) -> tuple[float, int]:
        descriptor = os.open(self._path, os.O_WRONLY | self._flags)
        started = time.perf_counter()
        for at in range(0, self._nbytes, PIECE):
            if os.pwrite(descriptor, self._buffer, at) != PIECE:
                raise RuntimeError("a write was cut short")
        os.fdatasync(descriptor)
        taken = time.perf_counter() - started
        os.close(descriptor)
        return taken, self._nbytes

    def read(self) -> tuple[float, int]:
        total = 0
        started = time.perf_counter()
        for path in self._files:
            descriptor = os.open(path, os.O_RDONLY | self._flags)
            for at, length in extents.pieces(path, PIECE):
                whole = length + -length % mmap.PAGESIZE
                total += os.preadv(descriptor, [self._buffer[:whole]], at)
            os.close(descriptor)
        return time.perf_counter() - started, total


class Store:
    """A service on the store, and a KV tensor through whose halves all blocks go in turn."""

    def __init__(self, options: argparse.Namespace, policy: str, generation: int) -> None:
        import torch

        import light_mem

        self._wanted = light_mem.State.Finished
        pages = options.pages
        self._block = pages * options.page_bytes
        self._half = max(1, options.kv * MIB // self._block // 2)
        self._blocks = options.store // self._block
        kv = light_mem.allocate_kvcache(2 * self._half * pages, options.page_bytes)
        random = np.random.default_rng(0)
        for row in kv.numpy():
            row[:] = random.integers(0, 256, len(row), np.uint8)
        self._kv: torch.Tensor = kv
        self._rows = random.permutation(len(kv)).reshape(2 * self._half, pages)
        self._order = np.random.default_rng(generation)
        self._files = options.directory / "store"
        self.service = light_mem.LocalCacheService(
            self._files,
            # Hashes do not fall on the shards evenly, and a shard must hold a whole block.
            int(1.1 * options.store) + SHARDS * self._block,
            SHARDS,
            kv,
            options.workers,
            page_cache=policy,
        )
        self.service.run()

    def _hashes(self, generation: int) -> list[int]:
        return [(generation << 32) + n for n in range(self._blocks)]

    def _move(self, mode: str, parts: list[list[tuple[int, int]]]) -> int:
        """Move parts of (hash, place in the tensor), the even ones in one half of the tensor, the
        odd ones in the other: two tasks are in work at any time. Returns the bytes moved."""
        tasks: list[Any] = []
        moved = 0
        for part in parts:
            hashes = [key for key, _ in part]
            rows = self._rows[[at for _, at in part]].ravel()
            if len(tasks) == 2:
                moved += self._finished(tasks.pop(0))
            tasks.append(self.service.create(mode, hashes, rows))
        return moved + sum(map(self._finished, tasks))

    def _finished(self, task: Any) -> int:
        if not task.wait(600):
            raise RuntimeError("a task was not ready within ten minutes")
        blocks = len(task.state())
        if task.count(self._wanted) != blocks:
            raise RuntimeError(f"{blocks - task.count(self._wanted)} of {blocks} blocks aborted")
        return blocks * self._block

    def _parts(self, hashes: list[int]) -> list[list[tuple[int, int]]]:
        placed = [(key, n % (2 * self._half)) for n, key in enumerate(hashes)]
        return [placed[at : at + self._half] for at in range(0, len(placed), self._half)]

    def write(self, generation: int) -> tuple[float, int]:
        started = time.perf_counter()
        moved = self._move("write", self._parts(self._hashes(generation)))
        for path in sorted(self._files.glob("shard-*.data")):
            write_out(path, forget=False)
        return time.perf_counter() - started, moved

    def read(self, generation: int) -> tuple[float, int]:
        parts = self._parts(self._hashes(generation))
        stored = [self.service.query([key for key, _ in part]) for part in parts]
        kept = [
            [block for block, there in zip(part, found, strict=True) if there]
            for part, found in zip(parts, stored, strict=True)
        ]
        # Any order, as long as the halves of the tensor alternate.
        even, odd = kept[::2], kept[1::2]
        shuffled = []
        for n, m in zip(
            self._order.permutation(len(even)).tolist(),
            [*self._order.permutation(len(odd)).tolist(), *[-1] * (len(even) - len(odd))],
            strict=True,
        ):
            shuffled += [even[n], odd[m]] if m >= 0 else [even[n]]
        shuffled = [[part[n] for n in self._order.permutation(len(part))] for part in shuffled]
        before = self._digests()
        self._kv.zero_()
        started = time.perf_counter()
        moved = self._move("read", [part for part in shuffled if part])
        taken = time.perf_counter() - started
        touched = {at for part in kept for _, at in part}
        after = self._digests()
        if any(before[row] != after[row] for row in self._rows[sorted(touched)].ravel().tolist()):
            raise RuntimeError("other bytes came back than were written")
        return taken, moved

    def _digests(self) -> list[int]:
        return [xxhash.xxh3_64_intdigest(row.data) for row in self._kv.numpy()]

    def close(self) -> None:
        self.service.close()


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
