"""The tables of `copies`: shares first, then GB/s, and LightMem against each bound and the best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmark import rivals
from benchmark.copies import AGAIN, CLEAN, WORK
from benchmark.ratios import Ratio, between

_OURS = "LightMem"
_HEADS = {AGAIN: "write,\nagain", CLEAN: "write,\nclean slots"}


def show(console: Console, shape: str, found: dict[str, Any]) -> None:
    """All contestants at one block shape."""
    console.print(_shares(shape, found))
    console.print(_rates(found))


def _shares(shape: str, found: dict[str, Any]) -> Table:
    works_shown = (AGAIN, CLEAN, "read", "mixed")
    table = Table(title=f"blocks of {shape}", title_justify="left", caption_justify="left")
    table.add_column(f"share of\n{rivals.BASE}", no_wrap=True)
    for work in works_shown:
        table.add_column(_HEADS.get(work, work), justify="right", no_wrap=True)
    table.add_column("cold read\nof plain", justify="right", no_wrap=True)
    base = found["contestants"].get(rivals.BASE, {})
    plain = max(found["plain cold reads"].values(), key=lambda way: way["GBps"], default=None)
    for name, works in found["contestants"].items():
        shares = [between(works.get(work), base.get(work)) for work in works_shown]
        shares.append(between(works.get("cold read"), plain))
        table.add_row(name, *(_text(share) for share in shares))
    table.caption = (
        "Medians of the ratios of each round (their quartiles). ~: no round in which both samples "
        "were without other load."
    )
    return table


def _rates(found: dict[str, Any]) -> Table:
    table = Table(caption_justify="left")
    table.add_column("GB/s", no_wrap=True)
    for work in WORK:
        table.add_column(_HEADS.get(work, work.replace(" ", "\n")), justify="right")
    table.add_column("CPU s/GB\nwr.  read", justify="right", no_wrap=True)
    table.add_column("dropped", justify="right")
    for name, works in found["contestants"].items():
        each = [works[work] for work in WORK if work in works]
        table.add_row(
            name,
            *(_rate(works.get(work)) for work in WORK),
            " ".join(_cpu(works.get(work)) for work in (AGAIN, "read")),
            f"{sum(w['dropped'] for w in each)}/{sum(w['samples'] for w in each)}",
        )
    ways = ", ".join(f"{way} {of['GBps']:.2f}" for way, of in found["plain cold reads"].items())
    table.caption = f"Medians. Plain cold reads: {ways or 'none'}"
    return table


def _text(share: Ratio | None) -> str:
    return "-" if share is None else str(share)


def _cpu(summary: dict[str, Any] | None) -> str:
    return f"{summary['cpu_s_per_GB']:.2f}" if summary else "-"


def _rate(summary: dict[str, Any] | None) -> str:
    return f"{summary['GBps']:.2f}{'~' if summary['noisy'] else ''}" if summary else "-"


def against(results: dict[str, Any]) -> list[str]:
    """LightMem against what bounds it and against the best other store, by block shape."""
    lines = []
    for shape, found in results.get("copies", {}).items():
        all_of_them = found["contestants"]
        ours = all_of_them.get(_OURS)
        if not ours:
            continue
        if bare := all_of_them.get(rivals.BARE):
            parts = _parts(ours, WORK, lambda work, bare=bare: ("", bare.get(work)))
            lines.append(f"LightMem as a share of {rivals.BARE}, {shape}: " + ", ".join(parts))
        others = {
            name: works
            for name, works in all_of_them.items()
            if name not in rivals.BOUNDS and not name.startswith(_OURS)
        }

        def best(work: str, others: dict[str, Any] = others) -> tuple[str, Any]:
            rates = {n: works[work]["GBps"] for n, works in others.items() if work in works}
            name = max(rates, key=lambda n: rates[n], default="")
            return f" of {name}", others.get(name, {}).get(work)

        if others:
            parts = _parts(ours, [work for work in WORK if work != "mixed"], best)
            lines.append(
                f"LightMem against the fastest of {len(others)} others, {shape}: "
                + ", ".join(parts)
            )
    return lines


def _parts(ours: dict[str, Any], works: Any, other: Callable[[str], tuple[str, Any]]) -> list[str]:
    parts = []
    for work in works:
        said, theirs = other(work)
        share = between(ours.get(work), theirs)
        if share is not None:
            parts.append(f"{work.replace(', ', ' ')} {share}{said}")
    return parts
