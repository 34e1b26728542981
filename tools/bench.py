"""Measures LightMem beside a memory-to-memory baseline and what people use instead.

    python tools/bench.py                               # everything
    python tools/bench.py --quick                       # a minute or so; figures are rough
    python tools/bench.py --only copies --gib 0.75 --contestants baseline lightmem
    python tools/bench.py --json out.json --plots docs/plots

What each figure means, and what the contestants do and lack: docs/benchmarks.md. Run it on an idle
machine. Exit code 0: every part ran and every store passed its check.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import psutil
from benchmark import (
    beside,
    flatness,
    growth,
    latency,
    machine,
    plots,
    process,
    queries,
    report,
    rivals,
    tasks,
)
from benchmark.copies import bench_shape
from benchmark.plan import SHAPES
from benchmark.run import Run

PARTS = tuple(
    "copies latency beside tasks sizes bounds entries workers shards servers process".split()
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    add(
        "--contestants",
        nargs="+",
        choices=rivals.ALL,
        metavar="NAME",
        help=f"of copies, latency, beside and tasks: {', '.join(rivals.ALL)} "
        f"(all but {', '.join(rivals.ASKED_FOR)}; with --cpp-lightmem only: "
        f"{', '.join(rivals.BESIDE_CPP)})",
    )
    add("--quick", action="store_true", help="small sizes, few rounds")
    add("--rounds", type=int, help="samples of each kind (9; quick: 2)")
    add("--gib", type=float, help="GiB a pass (0.25; quick: 0.03)")
    add("--workers", type=int, default=2, help="processes or threads (%(default)s)")
    add("--warm", type=int, help="passes of writing before (8; quick: 2)")
    shapes = ", ".join(f"{n}: {shape.name}" for n, shape in enumerate(SHAPES))
    add("--shapes", type=int, nargs="+", choices=range(len(SHAPES)), metavar="N", help=shapes)
    add("--max-entries", type=int, help="largest index (10,000,000; quick: 10,000)")
    add("--max-seconds", type=float, default=900.0, help="of entries, about (%(default)s)")
    add("--entry-bytes", type=int, default=64, help="block size of entries (%(default)s)")
    add("--seed", type=int, default=0, help="of the page order (%(default)s)")
    add("--cpp-lightmem", metavar="PATH", help="folder that holds the C++ package light_mem")
    add("--directory", type=Path, help="where the stores go (default: temporary)")
    add("--json", type=Path, help="write all figures there")
    add("--csv", type=Path, help="write all figures there, one a line")
    add("--plots", type=Path, metavar="DIR", help="draw PNG files there")
    args = parser.parse_args()
    if args.contestants is None:
        cpp = bool(args.cpp_lightmem)
        left = {*rivals.ASKED_FOR, *(() if cpp else rivals.BESIDE_CPP)}
        args.contestants = [kind for kind in rivals.ALL if kind not in left]
    return args


def main() -> None:
    args = parse()
    quick = args.quick

    def default(given: float | None, full: float, small: float) -> float:
        return given if given is not None else small if quick else full

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="light-mem-bench-", dir=args.directory) as directory:
        run = Run(
            directory=Path(directory),
            kinds=args.contestants,
            workers=args.workers,
            gib=default(args.gib, 0.25, 0.03),
            rounds=int(default(args.rounds, 9, 2)),
            warm=int(default(args.warm, 8, 2)),
            seed=args.seed,
            quick=quick,
            cpp_lightmem=args.cpp_lightmem,
            max_entries=int(default(args.max_entries, 10**7, 10**4)),
            max_seconds=args.max_seconds,
            entry_bytes=args.entry_bytes,
        )
        run.results["machine"] = machine.describe(run.directory)
        run.results["options"] = {k: str(v) for k, v in vars(args).items()}
        run.results["worker_count"] = run.workers
        run.results["load_before_percent"] = psutil.cpu_percent(1.0)
        report.show_machine(run)
        for part in args.only:
            run.say(f"{part} ...")
            if part == "copies":
                shapes = [SHAPES[n] for n in args.shapes or range(2 if quick else len(SHAPES))]
                of_shapes = run.results["copies"] = {}
                for shape in shapes:
                    of_shapes[shape.name] = bench_shape(run, shape)
                    report.show_shape(run, shape.name)
            elif part == "latency":
                run.results[part] = latency.bench_latency(run)
            elif part == "beside":
                run.results[part] = beside.bench_beside(run)
            elif part == "tasks":
                run.results[part] = tasks.bench_tasks(run)
            elif part == "entries":
                run.results[part] = queries.bench_entries(run)
            elif part == "sizes":
                run.results[part] = growth.bench_sizes(run)
            elif part == "bounds":
                run.results[part] = growth.bench_bounds(run)
            elif part == "process":
                run.results[part] = process.bench_process(run)
            else:
                run.results[part] = growth.bench_growth(run, part)
            report.show_part(run, part)
    run.results["flatness"] = flatness.of(run.results)
    run.results["seconds"] = time.perf_counter() - started
    report.show_flatness(run)
    report.show_end(run)
    if args.json:
        args.json.write_text(json.dumps(run.results, indent=1) + "\n")
    if args.csv:
        flatness.write_csv(run.results, args.csv)
    if args.plots:
        run.say(plots.draw(run.results, args.plots))


if __name__ == "__main__":
    main()
