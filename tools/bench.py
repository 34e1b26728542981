"""Measures LightMem beside a memory-to-memory baseline and what people use instead.

    python tools/bench.py                               # everything
    python tools/bench.py --quick                       # a minute or so; figures are rough
    python tools/bench.py --only copies --gib 0.75 --contestants baseline lightmem
    python tools/bench.py --json out.json --plots docs/plots

What each figure means, and what the contestants do and lack: docs/benchmarks.md. Run it on an idle
machine. Exit code 0: every part ran and every store passed its check; 1: not so, or nothing was
measured; 130: interrupted. What was measured until then is in --json and --csv.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

import psutil
from benchmark import (
    beside,
    flatness,
    growth,
    latency,
    machine,
    options,
    plots,
    process,
    queries,
    report,
    tasks,
)
from benchmark.copies import bench_shape
from benchmark.plan import SHAPES
from benchmark.run import Run


def main() -> int:
    args = options.parse(__doc__)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    with tempfile.TemporaryDirectory(prefix="light-mem-bench-", dir=args.directory) as directory:
        run = _run(args, Path(directory))
        part = "the start"
        try:
            _describe(run, args)
            for part in args.only:
                run.say(f"{part} ...")
                _measure(run, part, args)
                report.show_part(run, part)
                _save(run, args)
        except KeyboardInterrupt:
            kept = f"; what was measured is in {args.json}" if args.json else ""
            print(f"interrupted in {part}{kept}", file=sys.stderr)
            return 130
        finally:
            _save(run, args)
    report.show_flatness(run)
    report.show_end(run)
    if args.plots:
        run.say(plots.draw(run.results, args.plots))
    if not any(_has_figures(part, run.results.get(part, {})) for part in args.only):
        print("nothing was measured: no contestant of these parts is there", file=sys.stderr)
        return 1
    return 0


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _run(args: argparse.Namespace, directory: Path) -> Run:
    quick = args.quick

    def default(given: int | None, full: int, small: int) -> int:
        return given if given is not None else small if quick else full

    return Run(
        directory=directory,
        kinds=args.contestants,
        workers=args.workers,
        gib=args.gib,
        rounds=default(args.rounds, 9, 2),
        warm=default(args.warm, 8, 2),
        seed=args.seed,
        quick=quick,
        cpp_lightmem=args.cpp_lightmem,
        max_entries=default(args.max_entries, 10**7, 10**4),
        max_seconds=args.max_seconds,
        entry_bytes=args.entry_bytes,
    )


def _describe(run: Run, args: argparse.Namespace) -> None:
    run.results["machine"] = machine.describe(run.directory)
    run.results["options"] = {k: str(v) for k, v in vars(args).items()}
    run.results["worker_count"] = run.workers
    run.results["load_before_percent"] = psutil.cpu_percent(1.0)
    report.show_machine(run)


def _measure(run: Run, part: str, args: argparse.Namespace) -> None:
    found: dict[str, Any] = {}
    if part == "copies":
        run.results[part] = found
        for n in args.shapes or range(2 if run.quick else len(SHAPES)):
            shape = SHAPES[n]
            found[shape.name] = bench_shape(run, shape)
            report.show_shape(run, shape.name)
            _save(run, args)
        return
    parts = {
        "latency": latency.bench_latency,
        "beside": beside.bench_beside,
        "tasks": tasks.bench_tasks,
        "entries": queries.bench_entries,
        "sizes": growth.bench_sizes,
        "bounds": growth.bench_bounds,
        "process": process.bench_process,
    }
    bench = parts.get(part)
    run.results[part] = bench(run) if bench else growth.bench_growth(run, part)


def _save(run: Run, args: argparse.Namespace) -> None:
    """Write what there is by now: a file is whole at any moment."""
    run.results["flatness"] = flatness.of(run.results)
    run.results["seconds"] = time.perf_counter() - run.started
    if args.json:
        beside = args.json.with_name(args.json.name + ".part")
        beside.write_text(json.dumps(run.results, indent=1) + "\n")
        os.replace(beside, args.json)
    if args.csv:
        flatness.write_csv(run.results, args.csv)


def _has_figures(part: str, found: dict[str, Any]) -> bool:
    if part == "copies":
        return any(of_shape["contestants"] for of_shape in found.values())
    if part in ("latency", "beside"):
        return any(isinstance(of, dict) for case in found.values() for of in case.values())
    return any(found.values())


if __name__ == "__main__":
    sys.exit(main())
