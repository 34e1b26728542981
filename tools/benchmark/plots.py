"""PNG plots of a run's figures, with matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmark import rivals
from benchmark.copies import AGAIN

_OURS, _BASE = "LightMem", rivals.BASE
_COLOURS = {_OURS: "#c2410c", _BASE: "#9ca3af"}


def draw(results: dict[str, Any], directory: Path) -> str:
    """Draw what the results have into `directory`; says which files, or why none."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as err:
        return f"no plots: {err} (pip install 'light-mem[bench]')"
    directory.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update(
        {
            "axes.spines.top": False,
            "axes.spines.right": False,
            "font.size": 9,
            "axes.axisbelow": True,
        }
    )
    drawn = []
    for part, name, plot in (
        ("copies", "throughput.png", _throughput),
        ("workers", "workers.png", _workers),
        ("entries", "open.png", _opening),
        ("latency", "latency.png", _latency),
    ):
        if results.get(part):
            figure = plot(plt, results)
            figure.text(0.01, 0.005, _footer(results), fontsize=6.5, color="#6b7280")
            figure.savefig(directory / name, dpi=130)
            plt.close(figure)
            drawn.append(str(directory / name))
    return "drawn: " + ", ".join(drawn) if drawn else "no plots: nothing to draw"


def _footer(results: dict[str, Any]) -> str:
    of = results["machine"]
    return (
        f"{of['cpu']}, {of['cores']} cores, {of['system']}, {of['file_system']}; "
        f"{results['worker_count']} workers"
    )


def _throughput(plt: Any, results: dict[str, Any]) -> Any:
    """Writes, again and again, and cached reads by block size, a bar a contestant."""
    shapes = results["copies"]
    names = list(next(iter(shapes.values()))["contestants"])
    others = [n for n in names if n not in (_BASE, _OURS)]
    names = [n for n in (_BASE, _OURS) if n in names] + others
    shades = plt.get_cmap("tab10")
    figure, axes = plt.subplots(2, 1, figsize=(9, 6.4), sharex=True)
    width = 0.84 / len(names)
    for axis, work in zip(axes, (AGAIN, "read"), strict=True):
        for at, name in enumerate(names):
            rates = [
                found["contestants"].get(name, {}).get(work, {}).get("GBps", 0.0)
                for found in shapes.values()
            ]
            places = [n - 0.42 + width * (at + 0.5) for n in range(len(shapes))]
            axis.bar(places, rates, width, label=name, color=_colour(name, others, shades))
        axis.set_ylabel(f"{'cached read' if work == 'read' else work}, GB/s")
        axis.set_xticks(range(len(shapes)), list(shapes))
        axis.grid(axis="y", color="#e5e7eb")
    axes[1].set_xlabel("block")
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=5, loc="upper center", frameon=False)
    figure.tight_layout(rect=(0, 0.02, 1, 0.92))
    return figure


def _colour(name: str, others: list[str], shades: Any) -> Any:
    return _COLOURS[name] if name in _COLOURS else shades(others.index(name) % 10)


def _workers(plt: Any, results: dict[str, Any]) -> Any:
    """GB/s by number of workers, with the baseline of as many processes."""
    shapes = results["workers"]
    figure, axes = plt.subplots(1, len(shapes), figsize=(9, 3.6), squeeze=False)
    for axis, (shape, found) in zip(axes[0], shapes.items(), strict=True):
        for kind in (_BASE, _OURS):
            for work, style in (("write", "-o"), ("read", "--s")):
                points = [
                    (int(name.rsplit(", ", 1)[1]), works[work]["GBps"])
                    for name, works in found.items()
                    if name.startswith(kind)
                ]
                axis.plot(
                    *zip(*points, strict=True), style, color=_COLOURS[kind], label=f"{kind}, {work}"
                )
        axis.set_xscale("log", base=2)
        numbers = sorted({int(name.rsplit(", ", 1)[1]) for name in found})
        axis.set_xticks(numbers, [str(n) for n in numbers])
        axis.set_ylim(bottom=0)
        axis.set_title(f"blocks of {shape}", fontsize=9)
        axis.set_xlabel("workers")
        axis.set_ylabel("GB/s")
        axis.grid(color="#e5e7eb")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure


def _opening(plt: Any, results: dict[str, Any]) -> Any:
    """How long opening a store and a look-up take, by entries."""
    entries = results["entries"]
    numbers = [int(n) for n in entries]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    left.plot(numbers, [e["open ms"] for e in entries.values()], "-o", color=_COLOURS[_OURS])
    left.set_ylabel("open, ms")
    for row, style in (
        ("query 1,024, hex hit, us a hash", "-o"),
        ("query 1,024, hex miss, us a hash", "--s"),
        ("query one, hit, us", ":^"),
    ):
        values = [e[row] for e in entries.values()]
        right.plot(
            numbers, values, style, color=_COLOURS[_OURS], label=row.replace(", us a hash", "")
        )
    right.set_ylabel("us a hash")
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_ylim(bottom=0)
        axis.set_xlabel("entries in the store")
        axis.grid(color="#e5e7eb")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure


def _latency(plt: Any, results: dict[str, Any]) -> Any:
    """Share of single-block calls that took at most so long, a line a contestant."""
    shapes = results["latency"]
    wanted = [s for s in shapes if s in ("983 KB, one page", "3.93 MB")] or list(shapes)[:2]
    first = shapes[wanted[0]]
    others = [n for n in first if isinstance(first[n], dict) and n not in _COLOURS]
    shades = plt.get_cmap("tab10")
    figure, axes = plt.subplots(len(wanted), 2, figsize=(9, 3 * len(wanted) + 0.8), squeeze=False)
    for row, shape in zip(axes, wanted, strict=True):
        for axis, mode in zip(row, ("write", "read"), strict=True):
            for name, modes in shapes[shape].items():
                if not isinstance(modes, dict):
                    continue
                us = modes[mode]["percentiles_us"]
                share = [100 * n / (len(us) - 1) for n in range(len(us))]
                axis.plot(us, share, color=_colour(name, others, shades), label=name,
                          linewidth=2.2 if name == _OURS else 1.2)  # fmt: skip
            axis.set_xscale("log")
            axis.set_title(f"{mode}, block of {shape}", fontsize=9)
            axis.set_xlabel("us, call to done")
            axis.set_ylabel("% of calls")
            axis.grid(color="#e5e7eb")
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), ncols=5, loc="upper center", frameon=False
    )
    figure.tight_layout(rect=(0, 0.02, 1, 1 - 0.5 / figure.get_figheight()))
    return figure
