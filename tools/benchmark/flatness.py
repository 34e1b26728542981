"""What growth costs: throughput by entries, shards and servers as shares of the smallest number."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmark.ratios import between

Row = dict[str, float]

# Figures of `entries`, and whether more is better. A share below 1 is a loss in any case.
_OF_ENTRIES = {
    "write us a block": "blocks written a second",
    "read us a block": "blocks read a second",
    "query 1,024, hex hit, us a hash": "look-ups of 1,024, hit",
    "query 1,024, hex miss, us a hash": "look-ups of 1,024, miss",
    "query one, hit, us": "look-ups of one, hit",
    "query one, miss, us": "look-ups of one, miss",
    "open ms": "opens",
}


def of(results: dict[str, Any]) -> dict[str, Row]:
    """By what grows: number -> share of the rate at the smallest one. 1: growth costs nothing."""
    found: dict[str, Row] = {}
    entries = results.get("entries", {})
    for figure, name in _OF_ENTRIES.items():
        times = {number: column[figure] for number, column in entries.items() if figure in column}
        if len(times) > 1:
            first = next(iter(times.values()))
            found[f"entries: {name}"] = {number: first / t for number, t in times.items()}
    for part in ("shards", "servers"):
        for shape, of_shape in results.get(part, {}).items():
            for work in ("write", "read"):
                first = next(iter(of_shape.values()))[work]
                found[f"{part}: {work} of {shape}"] = {
                    name.rsplit(", ", 1)[1]: share.median
                    for name, works in of_shape.items()
                    if (share := between(works[work], first))
                }
    return found


def write_csv(results: dict[str, Any], path: Path) -> None:
    """Every number of the results, a line each: its part, what it is of, its name, the number."""
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["part", "of", "figure", "value"])
        for keys, value in _numbers(results, ()):
            out.writerow([keys[0], " / ".join(keys[1:-1]), keys[-1], value])


def _numbers(found: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], float]]:
    if isinstance(found, dict):
        for key, value in found.items():
            yield from _numbers(value, (*keys, str(key)))
    elif isinstance(found, (int, float)) and not isinstance(found, bool):
        yield keys, found
