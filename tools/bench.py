"""Measures the data path against memory-to-memory copies of the same run.

    python tools/bench.py                  # the figures of the README
    python tools/bench.py --gib 0.25 --rounds 3 --json out.json

Baseline: as many processes as there are workers gather (or scatter) the same pages of the same
shared tensor, block by block in the same random order, into private memory. Rounds of baseline
and LightMem alternate; printed are medians, and ratios of one run. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

PAGES_PER_BLOCK = 64
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def baseline_worker(config: dict[str, Any]) -> None:
    """One process of the baseline: copies its share each time it is told to."""
    from light_mem.engine.kvmemory import MemorySource, attach

    memory = attach(MemorySource(**config["memory"])).reshape(-1, config["page_bytes"])
    order = np.random.default_rng(config["seed"]).permutation(len(memory))
    blocks = order.reshape(-1, PAGES_PER_BLOCK)[config["share"] :: config["shares"]]
    # On a page boundary, as a mapping is: numpy's own arrays begin 16 bytes behind one, which slows
    # copies of whole pages down (4 KiB aliasing) and would flatter us.
    private = np.frombuffer(mmap.mmap(-1, blocks.size * config["page_bytes"]), np.uint8)
    private = private.reshape(blocks.size, config["page_bytes"])
    private[:] = 1
    for line in sys.stdin:
        for at, rows in enumerate(blocks):
            piece = private[at * PAGES_PER_BLOCK : (at + 1) * PAGES_PER_BLOCK]
            if line.strip() == "gather":
                np.take(memory, rows, axis=0, out=piece, mode="clip")
            else:
                memory[rows] = piece
        print("done", flush=True)


class Baseline:
    """The baseline processes of one tensor."""

    def __init__(self, source: Any, page_bytes: int, workers: int, seed: int) -> None:
        config = {
            "memory": source._asdict(),
            "page_bytes": page_bytes,
            "shares": workers,
            "seed": seed,
        }
        self._processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--baseline", json.dumps({**config, "share": n})],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=[source.fd],
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )
            for n in range(workers)
        ]

    def run(self, what: str) -> float:
        """Seconds for one pass over the whole tensor."""
        started = time.perf_counter()
        for process in self._processes:
            process.stdin.write(what + "\n")
            process.stdin.flush()
        for process in self._processes:
            process.stdout.readline()
        return time.perf_counter() - started

    def close(self) -> None:
        for process in self._processes:
            process.stdin.close()
            process.wait()
            process.stdout.close()


def bench_copies(directory: Path, page_bytes: int, args: argparse.Namespace) -> dict[str, Any]:
    """Writes and reads of 64-page blocks of one page size."""
    import torch

    import light_mem
    from light_mem.engine.kvmemory import close_source, share_tensor

    blocks = max(args.workers, int(args.gib * 2**30) // (page_bytes * PAGES_PER_BLOCK))
    total = blocks * PAGES_PER_BLOCK * page_bytes
    os.sync()
    kv = light_mem.allocate_kvcache(blocks * PAGES_PER_BLOCK, page_bytes)
    kv.copy_(torch.randint(0, 256, kv.shape, dtype=torch.uint8))
    source = share_tensor(kv)
    pages = np.random.default_rng(args.seed).permutation(len(kv))
    seconds: dict[str, list[float]] = {k: [] for k in ("gather", "write", "scatter", "read")}
    shards = 4
    # A round evicts the one before. Not larger than that: the kernel throttles writers to the speed
    # of the disk once a tenth to a fifth of the memory is dirty, and that is another measurement.
    storage = (blocks + shards) * PAGES_PER_BLOCK * page_bytes
    with light_mem.LocalCacheService(
        directory / f"store-{page_bytes}", storage, shards, kv, args.workers
    ) as service:
        service.run()
        baseline = Baseline(source, page_bytes, args.workers, args.seed)
        baseline.run("gather"), baseline.run("scatter")

        def move(mode: str, round_number: int) -> float:
            hashes = spread(round_number << 32, blocks, shards)
            started = time.perf_counter()
            task = service.create(mode, hashes, pages)
            assert task.wait(600)
            taken = time.perf_counter() - started
            assert all(s == light_mem.State.Finished for s in task.state())
            return taken

        first_fill = move("write", 0)
        # Steady: every write evicts, and each worker has written most slots before. The rounds on
        # the way there are slower: a worker's first writes to a slot go by pwrite, the next ones
        # fault the mapping in.
        filled = 1 + args.warm
        warming = [total / move("write", n) / 1e9 for n in range(1, filled)]
        for n in range(filled, filled + args.rounds):
            seconds["gather"].append(baseline.run("gather"))
            seconds["write"].append(move("write", n))
            seconds["scatter"].append(baseline.run("scatter"))
            seconds["read"].append(move("read", n))
        baseline.close()
    close_source(source)
    rate = {k: total / statistics.median(v) / 1e9 for k, v in seconds.items()}
    return {
        "block_bytes": page_bytes * PAGES_PER_BLOCK,
        "total_bytes": total,
        **{f"{k}_GBps": v for k, v in rate.items()},
        "first_fill_GBps": total / first_fill / 1e9,
        "slowest_warming_GBps": min(warming),
        "write_ratio": rate["write"] / rate["gather"],
        "read_ratio": rate["read"] / rate["scatter"],
        "rounds": args.rounds,
    }


def spread(first: int, count: int, shards: int) -> list[int]:
    """`count` hashes from `first` on, as many on each shard: few large blocks fall unevenly."""
    from light_mem.index import keys

    candidates = np.arange(first, first + 64 * count, dtype=np.uint64)
    mixed = keys.mix(np.stack([candidates, np.zeros_like(candidates)], axis=1))
    of = keys.shards_of(mixed, shards)
    share = [candidates[of == n][: -(-(count - n) // shards)] for n in range(shards)]
    return [int(h) for h in np.random.default_rng(first).permutation(np.concatenate(share))]


def bench_queries(directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Look-ups in a store of 100,000 entries, and how long it takes to open it."""
    import light_mem

    entries, page_bytes = 100_000, 256
    kv = light_mem.allocate_kvcache(entries, page_bytes)
    path = directory / "queries"
    hashes = [os.urandom(16).hex() for _ in range(entries)]
    out: dict[str, Any] = {"entries": entries}
    with light_mem.LocalCacheService(path, 2 * entries * page_bytes, 4, kv, args.workers) as s:
        s.run()
        for at in range(0, entries, 20_000):
            task = s.create("write", hashes[at : at + 20_000], range(at, at + 20_000))
            assert task.wait(600)
        some = [hashes[i] for i in np.random.default_rng(1).permutation(entries)[:1024]]
        texts = [f"prompt-{n}" for n in range(1024)]
        for name, asked in (
            ("hex hit", some),
            ("int hit", [int(h, 16) for h in some]),
            ("text miss", texts),
        ):
            out[f"query 1,024 {name} us/hash"] = 1e6 * median_of(lambda a=asked: s.query(a)) / 1024
        out["query one us"] = 1e6 * median_of(lambda: s.query(some[5]), 2001)
        done = s.create("read", some, range(1024))
        done.wait()
        out["ready() us"] = 1e6 * median_of(done.ready, 2001)
        out["create to ready, one page us"] = 1e6 * median_of(
            lambda: s.create("r", [some[7]], [0]).wait(), 501
        )
    opened = []
    for _ in range(args.rounds):
        started = time.perf_counter()
        service = light_mem.LocalCacheService(path, 2 * entries * page_bytes, 4, kv, 1)
        opened.append(time.perf_counter() - started)
        assert all(service.query(hashes[:100]))
        service.close()
    out["open 100,000 entries ms"] = 1e3 * statistics.median(opened)
    return out


def bench_workers(directory: Path) -> dict[str, Any]:
    """Start time, memory and idle use of eight workers."""
    import light_mem

    kv = light_mem.allocate_kvcache(64, 65536)
    with light_mem.LocalCacheService(directory / "idle", 64 << 20, 4, kv, 8) as service:
        started = time.perf_counter()
        service.run()
        start = time.perf_counter() - started
        service.create("w", range(64), range(64)).wait()
        time.sleep(0.5)
        family = [psutil.Process(), *map(psutil.Process, service.worker_pids)]

        def used() -> float:
            return sum(sum(p.cpu_times()[:2]) for p in family)

        def switches() -> int:
            return sum(p.num_ctx_switches().voluntary for p in family[1:])

        cpu, wakes, at = used(), switches(), time.perf_counter()
        time.sleep(5)
        span = time.perf_counter() - at
        private = max(p.memory_full_info().uss for p in family[1:])
        return {
            "run() with 8 workers s": start,
            "idle, % of a core": 100 * (used() - cpu) / span,
            "idle, wake-ups of all workers a second": (switches() - wakes) / span,
            "largest private memory of a worker MB": private / 1e6,
        }


def median_of(call: Any, times: int = 101) -> float:
    """Median seconds of a call."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gib", type=float, default=0.75, help="bytes moved a round, in GiB")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warm", type=int, default=8, help="rounds of writing before")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pages", type=int, nargs="*", default=[3840, 61440, 983040])
    parser.add_argument("--directory", type=Path, help="where the stores go (default: temporary)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=["copies", "queries", "workers"])
    parser.add_argument("--baseline", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.baseline:
        baseline_worker(json.loads(args.baseline))
        return
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
    machine += f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    print(f"{machine}\nother load before: {psutil.cpu_percent(1.0):.0f}% of the CPUs\n")
    results: dict[str, Any] = {"machine": machine, "workers": args.workers}
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        if args.only in (None, "copies"):
            print(
                f"{'block':>9} {'gather':>7} {'write':>7} {'ratio':>6} {'scatter':>8} "
                f"{'read':>7} {'ratio':>6} {'first fill':>11}   GB/s, {args.workers} workers"
            )
            for page_bytes in args.pages:
                r = bench_copies(Path(directory), page_bytes, args)
                results[f"copies {page_bytes}"] = r
                print(
                    f"{r['block_bytes'] / 1e6:7.2f}MB {r['gather_GBps']:7.2f} "
                    f"{r['write_GBps']:7.2f} {r['write_ratio']:6.2f} {r['scatter_GBps']:8.2f} "
                    f"{r['read_GBps']:7.2f} {r['read_ratio']:6.2f} {r['first_fill_GBps']:11.2f}",
                    flush=True,
                )
        for name, bench in (
            ("queries", lambda: bench_queries(Path(directory), args)),
            ("workers", lambda: bench_workers(Path(directory))),
        ):
            if args.only in (None, name):
                results[name] = bench()
                print()
                for key, value in results[name].items():
                    print(
                        f"{key:42} {value:10.2f}"
                        if isinstance(value, float)
                        else f"{key:42} {value:10}"
                    )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
