"""Time to first token of the example server: cold, warm, after a restart.

    pip install -e '.[examples,bench]'
    python tools/bench_ttft.py --plot docs/plots/ttft.png    # the figures of the README
    python tools/bench_ttft.py --model tiny --tokens 250 1000 --rounds 1

Every round has a prompt of its own for each length, random tokens that no other prompt begins with:

cold           the prompt is new to the store: all of it is computed
warm           the same prompt to the same process, after its pages were stored
after restart  the same prompt to a new process: the old one was killed with SIGKILL. The page cache
               of the store's files is warm, as after any restart but a boot; with
               --drop-page-cache a second restart comes from the device

Measured by the client: from sending the request to the first event of its stream. Each process
answers two short prompts first, which nobody measures: torch allocates and starts threads. The
tokens of all answers to a prompt are compared. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from examples.server.client import RunningServer, generate, wait_stored  # noqa: E402
from light_mem.demo.report import drop_page_cache  # noqa: E402

Samples = dict[str, dict[int, list[float]]]  # kind -> tokens -> milliseconds
Prompts = dict[tuple[int, int], list[int]]  # (round, tokens) -> prompt


class Bench:
    def __init__(self, args: argparse.Namespace, store: Path) -> None:
        self.args = args
        self.store = store
        rounds, lengths = range(args.rounds), args.tokens
        self.prompts: Prompts = {
            (r, n): np.random.default_rng([args.seed, r, n]).integers(0, 256, n).tolist()
            for r in rounds
            for n in lengths
        }
        self.answers: dict[tuple[int, int], list[int]] = {}
        self.samples: Samples = {}

    def run(self) -> None:
        with self.server() as server:
            for key in self.prompts:
                self.ask(server, "cold", key)
                wait_stored(server.url, server.pids)
                self.ask(server, "warm", key)
                wait_stored(server.url, server.pids)
            server.kill()
        self.again("after restart")
        if self.args.drop_page_cache:
            drop_page_cache(self.store)
            self.again("from the device")

    def again(self, kind: str) -> None:
        """A new process on the store that the last one left."""
        with self.server() as server:
            for key in self.prompts:
                self.ask(server, kind, key)
            server.kill()

    def server(self) -> RunningServer:
        args = self.args
        server = RunningServer(
            *("--model", args.model, "--store", self.store, "--storage-gb", args.storage_gb),
            *("--tokens-per-page", args.tokens_per_page, "--copy-workers", args.copy_workers),
            *("--threads", args.threads),
        )
        for seed in (1, 2):
            generate(server.url, tokens=np.random.default_rng(seed).integers(0, 256, 64).tolist())
        return server

    def ask(self, server: RunningServer, kind: str, key: tuple[int, int]) -> None:
        answer = generate(server.url, tokens=self.prompts[key], max_tokens=self.args.answer)
        cached, size = answer.result["cached_tokens"], self.args.tokens_per_page
        expected = 0 if kind == "cold" else (key[1] - 1) // size * size
        if cached != expected:
            raise RuntimeError(f"{kind}, {key[1]} tokens: {cached} from the store, not {expected}")
        tokens = answer.result["tokens"]
        if self.answers.setdefault(key, tokens) != tokens:
            raise RuntimeError(f"{kind}, {key[1]} tokens: other tokens than cold")
        milliseconds = answer.first_token_seconds * 1000
        self.samples.setdefault(kind, {}).setdefault(key[1], []).append(milliseconds)


def medians(samples: Samples) -> dict[str, dict[int, float]]:
    return {
        kind: {tokens: statistics.median(times) for tokens, times in by_tokens.items()}
        for kind, by_tokens in samples.items()
    }


def show(found: dict[str, dict[int, float]]) -> None:
    kinds = list(found)
    print(
        f"{'tokens':>8}"
        + "".join(f"{kind + ' ms':>20}" for kind in kinds)
        + f"{'restart faster':>16}"
    )
    for tokens, cold in found["cold"].items():
        times = "".join(f"{found[kind][tokens]:20,.0f}" for kind in kinds)
        print(f"{tokens:8,}{times}{cold / found['after restart'][tokens]:15.1f}x")


def plot(found: dict[str, dict[int, float]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    styles = {"cold": "o-", "warm": "s--", "after restart": "D-", "from the device": "^:"}
    for kind, times in found.items():
        axes.plot(list(times), list(times.values()), styles[kind], label=kind, markersize=5)
    lengths = list(found["cold"])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{tokens:,}" for tokens in lengths])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("time to first token, ms")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="small")
    add("--tokens", type=int, nargs="+", default=[250, 500, 1000, 2000, 4000, 8000])
    add("--rounds", type=int, default=3)
    add("--answer", type=int, default=8, help="tokens of each answer")
    add("--threads", type=int, default=os.cpu_count() or 1)
    add("--copy-workers", type=int, default=2)
    add("--tokens-per-page", type=int, default=32)
    add("--storage-gb", type=float, default=4.0, help="must hold all prompts of all rounds")
    add("--seed", type=int, default=0)
    add("--drop-page-cache", action="store_true")
    add("--directory", type=Path, help="where the store is made; default: the temporary directory")
    add("--plot", type=Path, help="a PNG; needs matplotlib")
    add("--json", type=Path, help="all samples")
    return parser.parse_args()


def main() -> None:
    args = parse()
    load = psutil.cpu_percent(1.0)
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
    print(f"{machine}\nother load before: {load:.0f}% of the CPUs")
    print(
        f"model {args.model}, {args.threads} threads; medians of {args.rounds} rounds\n", flush=True
    )
    with tempfile.TemporaryDirectory(prefix="light-mem-ttft-", dir=args.directory) as directory:
        bench = Bench(args, Path(directory) / "store")
        bench.run()
    found = medians(bench.samples)
    show(found)
    print(f"\nthe {args.answer} tokens of every answer are those of the cold run")
    if args.plot:
        plot(found, f"Example server, model {args.model}, {os.cpu_count()} cores", args.plot)
    if args.json:
        report: dict[str, Any] = {"machine": machine, "load": load, "samples": bench.samples}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
