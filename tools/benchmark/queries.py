"""Look-ups, `create`, `ready`, opening a store, and blocks a second: by entries in the store."""

from __future__ import annotations

import gc
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_recovery import make_store

from benchmark.run import Run
from benchmark.samples import median_of

_MOVED = 8192  # blocks a pass


def bench_entries(run: Run) -> dict[str, Any]:
    """By number of entries, 1e3 upwards; the stores are written by `bench_recovery.make_store`.

    A size is left out when ten times what the last one took more than the first would go beyond
    `max_seconds`.
    """
    out: dict[str, Any] = {}
    expected, base = 0.0, 0.0
    begun = time.perf_counter()
    for entries in (10**n for n in range(3, 8) if 10**n <= run.max_entries):
        if time.perf_counter() - begun + expected > run.max_seconds:
            run.say(f"  {entries:>10,} entries: left out, some {expected:.0f} s (--max-seconds)")
            break
        place = run.place()
        started = time.perf_counter()
        make_store(place / "store", entries, run.entry_bytes, 1)
        made = time.perf_counter() - started
        try:
            out[str(entries)] = _of_store(run, place / "store", entries)
        finally:
            shutil.rmtree(place)
        taken = time.perf_counter() - started
        base = base or taken
        expected = base + 10 * max(0.0, taken - base)
        run.say(f"  {entries:>10,} entries: made in {made:.1f} s, {taken:.0f} s in all")
    return out


def _of_store(run: Run, path: Path, entries: int) -> dict[str, Any]:
    import light_mem

    # The keys that make_store chose, and the size that it gave the store.
    keys = np.random.default_rng(1).integers(0, 2**64, (entries, 2), np.uint64)
    some = np.random.default_rng(2).permutation(entries)[:1024]
    hashes = [f"{int(high):016x}{int(low):016x}" for low, high in keys[some]]
    kv = light_mem.allocate_kvcache(max(_MOVED, 1024), run.entry_bytes)
    size = sum(p.stat().st_size for p in path.glob("shard-*.data"))

    def opened() -> light_mem.LocalCacheService:
        return light_mem.LocalCacheService(path, size, 4, kv, run.workers)

    found: dict[str, Any] = {"entries": entries, "store_bytes": _bytes_of(path)}
    started = time.perf_counter()
    opened().close()  # makes the index anew, which the store was left without
    found["index made anew s"] = time.perf_counter() - started
    seconds = []
    for _ in range(3 if run.quick else 9):
        started = time.perf_counter()
        service = opened()
        seconds.append(time.perf_counter() - started)
        if not all(service.query(hashes)):
            raise RuntimeError(f"a store of {entries} entries lacks some")
        service.close()
    found["open ms"] = 1e3 * statistics.median(seconds)
    with opened() as service:
        started = time.perf_counter()
        service.run()
        found["run() ms"] = 1e3 * (time.perf_counter() - started)
        found.update(_lookups(service, hashes, run.quick))
        found.update(_calls(service, hashes, run.quick))
        found.update(_blocks_a_second(service, entries, run.rounds))
        started = time.perf_counter()
        report = service.check()
        run.note_check(f"entries, {entries}", {"blocks": report.blocks, "damaged": 0})
        found["check() s"] = time.perf_counter() - started
    return found


def _bytes_of(path: Path) -> int:
    return sum(p.stat().st_blocks * 512 for p in path.iterdir())


def _lookups(service: Any, hashes: list[str], quick: bool) -> dict[str, float]:
    times = 20 if quick else 200
    missing = [os.urandom(16).hex() for _ in hashes]
    ways = {
        "hex hit": hashes,
        "hex miss": missing,
        "int hit": [int(h, 16) for h in hashes],
        "text miss": [f"prompt-{n}" for n in range(len(hashes))],
    }
    found = {}
    for name, asked in ways.items():
        taken = median_of(lambda asked=asked: service.query(asked), times)
        found[f"query 1,024, {name}, us a hash"] = 1e6 * taken / len(asked)
    # One after the other over all of them: the same hash again would be in the CPU's cache.
    for name, asked in (("hit", hashes), ("miss", missing)):
        each = iter(asked * 3)
        found[f"query one, {name}, us"] = 1e6 * median_of(
            lambda each=each: service.query(next(each)), 1024 if quick else 3000
        )
    return found


def _calls(service: Any, hashes: list[str], quick: bool) -> dict[str, float]:
    pages = np.arange(1024)
    taken: dict[str, list[float]] = {"read": [], "write": []}
    rounds = 5 if quick else 25
    gc.collect()
    for n in range(rounds):
        new = [f"{n + 1:016x}{at:016x}" for at in range(1024)]
        for mode, asked in (("read", hashes), ("write", new)):
            started = time.perf_counter()
            task = service.create(mode, asked[: len(pages)], pages[: len(asked)])
            taken[mode].append(time.perf_counter() - started)
            _finish(task)
            if mode == "write":
                service.delete(new)  # keeps what the other figures look up
    found = {
        f"create of 1,024 blocks, {m}, ms": 1e3 * statistics.median(t) for m, t in taken.items()
    }
    done = service.create("read", hashes[:1024], pages[: len(hashes)])
    _finish(done)
    found["ready() us"] = 1e6 * median_of(done.ready, 2001)
    return found


def _finish(task: Any) -> None:
    if not task.wait(600):
        raise RuntimeError("a task was not ready within ten minutes")


def _blocks_a_second(service: Any, entries: int, rounds: int) -> dict[str, float]:
    """Blocks of one tiny page: what a block costs, whatever its bytes. Writes evict."""
    count = min(_MOVED, entries // 2)
    pages = np.random.default_rng(3).permutation(count)
    seconds: dict[str, list[float]] = {"write": [], "read": []}
    # Short passes of small stores count as often as it takes to move as many blocks.
    for n in range(rounds * max(1, _MOVED // count // 4)):
        hashes = [f"{n + 1:08x}{at:024x}" for at in range(count)]
        for mode, all_of_it in seconds.items():
            started = time.perf_counter()
            _finish(service.create(mode, hashes, pages))
            all_of_it.append(time.perf_counter() - started)
    return {f"{m} us a block": 1e6 * statistics.median(s) / count for m, s in seconds.items()}
