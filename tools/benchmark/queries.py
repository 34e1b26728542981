"""Look-ups, `create`, `ready`, opening a store, and blocks a second: by entries in the store."""

from __future__ import annotations

import gc
import math
import os
import shutil
import statistics
import time
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import numpy as np
from bench_recovery import make_store

from benchmark.run import Run
from benchmark.samples import median_of

_A_TASK = 500  # blocks, at every size: half of the smallest store
_MOVED = 8192  # blocks a round, about
# Lists of hashes to look up, one after the other: what the same list finds again is in the CPU's
# caches.
_LISTS = 64
_LIST = 1024  # hashes, or as many as there are


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
    chance = np.random.default_rng(2)
    lists = []
    for _ in range(_LISTS):
        some = chance.choice(entries, min(_LIST, entries), replace=False, shuffle=False)
        lists.append([f"{int(high):016x}{int(low):016x}" for low, high in keys[some]])
    hashes = lists[0]
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
        found.update(_lookups(service, lists, run.quick))
        found.update(_calls(service, lists, run.quick))
        found.update(_blocks_a_second(service, run.rounds))
        found["ready() of a pending task us"] = _ready_while_pending(service)
        started = time.perf_counter()
        report = service.check()
        run.note_check(f"entries, {entries}", {"blocks": report.blocks, "damaged": 0})
        found["check() s"] = time.perf_counter() - started
    return found


def _bytes_of(path: Path) -> int:
    return sum(p.stat().st_blocks * 512 for p in path.iterdir())


def _lookups(service: Any, lists: list[list[str]], quick: bool) -> dict[str, float]:
    missing = [[os.urandom(16).hex() for _ in hashes] for hashes in lists]
    ways: dict[str, list[list[Any]]] = {
        "hex hit": lists,
        "hex miss": missing,
        "int hit": [[int(h, 16) for h in hashes] for hashes in lists],
        "text miss": [
            [f"prompt-{n}-{at}" for at in range(len(hashes))] for n, hashes in enumerate(lists)
        ],
    }
    found = {}
    for name, asked in ways.items():
        each = cycle(asked)
        taken = median_of(lambda each=each: service.query(next(each)), _LISTS * (1 if quick else 3))
        found[f"query 1,024, {name}, us a hash"] = 1e6 * taken / len(asked[0])
    for name, asked in (("hit", lists), ("miss", missing)):
        one = chain.from_iterable(asked)
        found[f"query one, {name}, us"] = 1e6 * median_of(
            lambda one=one: service.query(next(one)), 1024 if quick else 3000
        )
    return found


def _calls(service: Any, lists: list[list[str]], quick: bool) -> dict[str, float]:
    pages = np.arange(1024)
    taken: dict[str, list[float]] = {"read": [], "write": []}
    rounds = 5 if quick else 25
    gc.collect()
    for n in range(rounds):
        new = [f"{n + 1:016x}{at:016x}" for at in range(1024)]
        for mode, asked in (("read", lists[n]), ("write", new)):
            started = time.perf_counter()
            task = service.create(mode, asked, pages[: len(asked)])
            taken[mode].append(time.perf_counter() - started)
            _finish(task)
            if mode == "write":
                service.delete(new)  # keeps what the other figures look up
    found = {
        f"create of 1,024 blocks, {m}, ms": 1e3 * statistics.median(t) for m, t in taken.items()
    }
    done = service.create("read", lists[0], pages[: len(lists[0])])
    _finish(done)
    found["ready() us"] = 1e6 * median_of(done.ready, 2001)
    return found


def _finish(task: Any) -> None:
    if not task.wait(600):
        raise RuntimeError("a task was not ready within ten minutes")


def _blocks_a_second(service: Any, rounds: int) -> dict[str, float]:
    """Blocks of one tiny page: what a block costs, whatever its bytes. Writes evict."""
    pages = np.random.default_rng(3).permutation(_A_TASK)
    seconds: dict[str, list[float]] = {"write": [], "read": []}
    for n in range(rounds * (_MOVED // _A_TASK)):
        hashes = [f"{n + 1:08x}{at:024x}" for at in range(_A_TASK)]
        for mode, all_of_it in seconds.items():
            started = time.perf_counter()
            _finish(service.create(mode, hashes, pages))
            all_of_it.append(time.perf_counter() - started)
    return {f"{m} us a block": 1e6 * statistics.median(s) / _A_TASK for m, s in seconds.items()}


def _ready_while_pending(service: Any) -> float:
    """Of a task that is being worked on: a done one is told from a flag. A pass of writes at a
    time, until enough were asked, or as many passes have gone."""
    seconds: list[float] = []
    for n in range(20):
        hashes = [f"{n + 1:016x}{at:016x}" for at in range(_MOVED)]
        task = service.create("write", hashes, np.arange(_MOVED))
        while True:
            started = time.perf_counter()
            done = task.ready()
            if done:
                break
            seconds.append(time.perf_counter() - started)
        _finish(task)
        if len(seconds) > 2000:
            break
    return 1e6 * statistics.median(seconds or [math.nan])
