"""What the processes of a service cost: start, idle CPU and wake-ups, memory."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmark.machine import cpu_of
from benchmark.plan import Shape
from benchmark.run import Run


def bench_process(run: Run) -> dict[str, Any]:
    """By number of workers."""
    import light_mem

    plan = run.plan(Shape(61440, 64))
    out: dict[str, Any] = {}
    for workers in (run.workers,) if run.quick else (1, run.workers, 8):
        place = run.place()
        with run.tensor(plan) as (kv, _):
            own = psutil.Process()
            before = _private(own.pid)
            with light_mem.LocalCacheService(
                place, (plan.blocks + 4) * plan.shape.block_bytes, 4, kv, workers
            ) as service:
                started = time.perf_counter()
                service.run()
                found = {"run() s": time.perf_counter() - started}
                found.update(_memory(run, service, plan.blocks, own, before))
                found.update(_idle(service, 1.0 if run.quick else 10.0))
                report = service.check()
                run.note_check(f"process, {workers} workers", {"blocks": report.blocks})
        out[str(workers)] = found
        shutil.rmtree(place)
    return out


def _memory(
    run: Run, service: Any, blocks: int, own: psutil.Process, before: int
) -> dict[str, Any]:
    """The most private memory while blocks are written and read, looked at some 50 times a second.

    Anonymous memory: neither the KV tensor nor the page cache of the store counts. (USS would count
    pages of the mapped shards, as long as no other process has mapped the same ones.)
    """
    workers = service.worker_pids
    most = {"worker": 0, "server": 0}
    stop = threading.Event()

    def look() -> None:
        at_work = True
        while at_work:
            at_work = not stop.wait(0.02)  # once more at the end: it may not have taken that long
            most["worker"] = max(most["worker"], *map(_private, workers))
            most["server"] = max(most["server"], _private(own.pid) - before)

    watcher = threading.Thread(target=look)
    watcher.start()
    pages = np.random.default_rng(run.seed).permutation(service.num_pages)
    for n in range(2 if run.quick else 8):
        hashes = [(n << 32) + at for at in range(blocks)]
        for mode in ("write", "read"):
            service.create(mode, hashes, pages).wait(600)
    stop.set()
    watcher.join()
    return {
        "most private memory of a worker MB": most["worker"] / 1e6,
        "most private memory that the service adds to its server MB": most["server"] / 1e6,
    }


def _private(pid: int) -> int:
    """Bytes of a process's private memory that no file lies behind; 0 when it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _idle(service: Any, seconds: float) -> dict[str, Any]:
    workers = [psutil.Process(pid) for pid in service.worker_pids]
    own = psutil.Process()
    time.sleep(0.5)
    cpu, wakes = sum(map(cpu_of, [own, *workers])), sum(map(_wakes, workers))
    server = _wakes(own)
    started = time.perf_counter()
    time.sleep(seconds)
    span = time.perf_counter() - started
    return {
        "idle, % of a core": 100 * (sum(map(cpu_of, [own, *workers])) - cpu) / span,
        "idle, wake-ups of all workers a second": (sum(map(_wakes, workers)) - wakes) / span,
        "idle, wake-ups of the server a second": (_wakes(own) - server) / span,
    }


def _wakes(process: psutil.Process) -> int:
    """Voluntary context switches of all threads of a process."""
    total = 0
    tasks = Path(f"/proc/{process.pid}/task")
    for thread in os.listdir(tasks):
        for line in (tasks / thread / "status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches"):
                total += int(line.split()[1])
    return total
