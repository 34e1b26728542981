"""What vLLM's scheduler waits for in the LightMem tier: microseconds a call.

    python tools/bench_vllm_tier.py [--seconds 5] [--workers 4] [--busy] [--json FILE]

No vLLM is needed: the logic of the tier is called as vLLM calls it, from one thread, on a service
with running workers, while jobs are under way. A store of one chunk that is there already
(`store, present`) and one that evicts (`store, new`) are a job each. `load 64` submits a load of 64
keys; `poll, idle` and `poll, busy` ask for finished jobs. Run it on an idle machine that has a
processor for each worker beside the scheduler's: else the figures show who waited for a processor.

Between two steps the scheduler sleeps, as one that waits for a model does. With `--busy` it
computes in Python instead and never lets go of the interpreter by itself: what the tier's threads
take from it shows as `2 ms of Python`, and as calls that met a change of threads.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from light_mem import allocate_kvcache
from light_mem.integrations.namespace import Namespace
from light_mem.integrations.vllm.opening import open_service
from light_mem.integrations.vllm.transfers import TierTransfers

ROW_BYTES = 128 << 10
ROWS = 1024
STORED = 4096  # chunks in the store, all of its room
LIMIT_US = 50.0


def key(n: int) -> bytes:
    return sha256(n.to_bytes(8, "big")).digest() + bytes(4)


class Bench:
    """The tier's calls, each timed."""

    def __init__(self, directory: Path, workers: int, busy: bool = False) -> None:
        kv = allocate_kvcache(ROWS, ROW_BYTES)
        service = open_service(
            memoryview(kv.numpy()),
            directory,
            STORED * ROW_BYTES,
            num_of_shard=8,
            num_workers=workers,
            verify=True,
            durability="kernel",
        )
        self.tier = TierTransfers(
            service, Namespace({"bench": 1}), max_queued=ROWS // 2, load_timeout=60
        )
        self.keys = [key(n) for n in range(2 * STORED)]
        self.times: dict[str, list[int]] = defaultdict(list)
        self.jobs = 0
        self.under_way = 0
        self.rng = np.random.default_rng(0)
        self.rounds = rounds_in(0.002) if busy else 0

    def call(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        started = time.perf_counter_ns()
        result = function(*arguments)
        self.times[name].append(time.perf_counter_ns() - started)
        return result

    def submit(self, name: str, keys: list[bytes], load: bool) -> None:
        self.jobs += 1
        self.under_way += 1
        rows = self.rng.permutation(ROWS)[: len(keys)]
        call = self.tier.load if load else self.tier.store
        self.call(name, call, self.jobs, keys, rows, "r")

    def poll(self) -> None:
        name = "poll, busy" if self.under_way else "poll, idle"
        self.under_way -= len(self.call(name, self.tier.finished))

    def settle(self) -> None:
        while self.under_way:
            self.poll()
            time.sleep(0.001)

    def fill(self) -> None:
        for start in range(0, STORED, 256):
            self.submit("fill", self.keys[start : start + 256], load=False)
            self.settle()
        self.times.clear()

    def step(self, new: int) -> None:
        """One step of a scheduler: what it asks of a tier, in its order."""
        some = self.rng.integers(0, 2 * STORED, 32).tolist()
        for n in some:
            self.call("lookup", self.tier.lookup, self.keys[n], "r")
        self.poll()
        self.submit("store, present", [self.keys[some[0] % STORED]], load=False)
        self.submit("store, new", [key(10**9 + new)], load=False)
        if new % 8 == 0:
            self.call("touch 64", self.tier.touch, self.keys[:64])
            first = int(self.rng.integers(0, STORED - 64))
            self.submit("load 64", self.keys[first : first + 64], load=True)
        if new % 50 == 0:
            self.settle()
            self.poll()
        # A model step takes milliseconds; a short one keeps more jobs under way than there are.
        if self.rounds:
            self.call("2 ms of Python", compute, self.rounds)
        else:
            time.sleep(0.002)

    def run(self, seconds: float) -> dict[str, dict[str, float]]:
        self.fill()
        deadline, steps = time.monotonic() + seconds, 0
        while time.monotonic() < deadline:
            self.step(steps)
            steps += 1
        self.settle()
        dropped = self.tier.counters["dropped_blocks"]
        self.tier.close(10)
        if dropped:
            raise SystemExit(f"{dropped} blocks were dropped: the disk is slower than the stores")
        return {name: figures(np.array(t) / 1e3) for name, t in sorted(self.times.items())}


def compute(rounds: int) -> int:
    total = 0
    for n in range(rounds):
        total += n & 3
    return total


def rounds_in(seconds: float) -> int:
    """How many rounds of `compute` take so long when nobody interferes."""

    def once() -> float:
        started = time.perf_counter()
        compute(10_000)
        return time.perf_counter() - started

    return int(10_000 * seconds / min(once() for _ in range(50)))


def figures(us: np.ndarray[Any, Any]) -> dict[str, float]:
    p50, p99 = np.percentile(us, [50, 99])
    return {"calls": len(us), "p50": float(p50), "p99": float(p99), "max": float(us.max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--busy", action="store_true", help="a scheduler that computes in Python")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="lightmem-bench-"))
    try:
        found = Bench(directory / "store", chosen.workers, chosen.busy).run(chosen.seconds)
    finally:
        shutil.rmtree(directory)
    print(f"{'call':16}{'calls':>9}{'p50 us':>9}{'p99 us':>9}{'max us':>9}")
    for name, f in found.items():
        print(f"{name:16}{f['calls']:>9.0f}{f['p50']:>9.1f}{f['p99']:>9.1f}{f['max']:>9.1f}")
    calls = [name for name in found if name not in ("load 64", "2 ms of Python")]
    worst = max(found[name]["p99"] for name in calls)
    print(f"largest p99, load of 64 keys excluded: {worst:.1f} us (wanted: {LIMIT_US:g} or less)")
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
