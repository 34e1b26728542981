"""The benchmark suite runs, finds every store sound, and writes what its tables and plots need."""

from __future__ import annotations

import json
import subprocess
import sys
from csv import DictReader
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(900)  # some 30 s by itself, minutes beside other work

BENCH = Path(__file__).resolve().parent.parent / "tools" / "bench.py"
# The others work like these.
PARTS = ["copies", "latency", "beside", "tasks", "sizes", "bounds", "entries", "servers", "process"]


def run_bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH), *arguments], capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny run, with the contestants that need no package."""
    place = tmp_path_factory.mktemp("bench")
    ran = run_bench(
        *[
            "--only",
            *PARTS,
            "--quick",
            "--rounds",
            "1",
            "--warm",
            "1",
            "--gib",
            "0.002",
            "--max-entries",
            "1000",
        ],
        *[
            "--shapes",
            "0",
            "--contestants",
            "baseline",
            "lightmem",
            "bare",
            "plain",
            "cpp-lightmem",
        ],
        *["--directory", str(place), "--json", str(place / "out.json")],
        *["--csv", str(place / "out.csv")],
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "checks of stores passed" in ran.stdout
    # Nothing but what was asked for stays: the stores are gone.
    assert sorted(p.name for p in place.iterdir()) == ["out.csv", "out.json"]
    with (place / "out.csv").open() as file:
        lines = {(row["part"], row["of"], row["figure"]): row["value"] for row in DictReader(file)}
    found: dict[str, Any] = json.loads((place / "out.json").read_text())
    assert float(lines["entries", "1000", "open ms"]) == found["entries"]["1000"]["open ms"]
    return found


def test_every_part_has_figures(results: dict[str, Any]) -> None:
    for part in PARTS:
        assert results[part], part
    assert results["machine"]["cores"] >= 1
    assert results["machine"]["versions"]["numpy"]


def test_each_work_of_a_shape_has_rate_ratio_and_samples(results: dict[str, Any]) -> None:
    found = results["copies"]["246 KB"]
    assert found["bytes"] % found["block_bytes"] == 0
    for name in ("memory to memory", "LightMem", "copies alone", "pwritev/preadv"):
        for work in ("first fill", "write, again", "write, clean slots", "read", "mixed"):
            figures = found["contestants"][name][work]
            assert figures["lowest"] <= figures["GBps"] <= figures["highest"]
            assert 0 <= figures["dropped"] <= figures["samples"] == 1
            assert figures["noisy"] == (figures["dropped"] == figures["samples"])
            assert figures["ratio"] > 0
    base = found["contestants"]["memory to memory"]
    assert base["write, again"]["ratio"] == base["read"]["ratio"] == 1.0
    ours = found["contestants"]["LightMem"]
    again = "write, again"
    assert ours[again]["ratio"] == ours[again]["GBps"] / base[again]["GBps"]
    assert ours[again]["ratio_low"] == ours[again]["ratio"] == ours[again]["ratio_high"]
    # A cold read is one whose pages were dropped: the closed service maps none of them.
    assert ours["cold read"]["stayed in page cache"] < 0.2
    assert "preadv of 8 MiB" in found["plain cold reads"]


def test_every_store_was_checked(results: dict[str, Any]) -> None:
    parts = " ".join(check["part"] for check in results["checks"])
    for part in PARTS:
        assert part in parts
    assert all(check["blocks"] > 0 and not check.get("damaged") for check in results["checks"])


def test_what_is_missing_is_said(results: dict[str, Any]) -> None:
    about = results["contestants"]
    assert about["cpp-lightmem"] == {"missing": "give its path with --cpp-lightmem"}
    assert about["plain"]["lacks"]
    assert "C++ LightMem" not in results["copies"]["246 KB"]["contestants"]


def test_reads_beside_writes_say_how_much_is_queued(results: dict[str, Any]) -> None:
    [(name, case)] = results["beside"].items()
    assert name.endswith(f"{case['queued_bytes'] / 1e6:,.0f} MB queued")
    assert case["LightMem"]["calls"] > 0


def test_latencies_say_what_is_moved(results: dict[str, Any]) -> None:
    assert list(results["latency"]) == ["65.5 KB, one page", "983 KB, one page"]
    for of_shape in results["latency"].values():
        assert of_shape["LightMem"]["moved_bytes"] == of_shape["block_bytes"]
        assert 0 < of_shape["LightMem"]["read"]["p50_us"] <= of_shape["LightMem"]["read"]["p99_us"]


def test_tasks_of_each_size_have_rates(results: dict[str, Any]) -> None:
    found = results["tasks"]["246 KB"]
    assert list(found) == [
        f"LightMem, {size} a task, {number} under way" for size in (1, 16) for number in (1, 2)
    ]
    assert all(works[work]["GBps"] > 0 for works in found.values() for work in ("write", "read"))


def test_entries_and_growth_have_their_rows(results: dict[str, Any]) -> None:
    row = results["entries"]["1000"]
    for name in (
        "open ms",
        "query one, hit, us",
        "ready() us",
        "ready() of a pending task us",
        "write us a block",
        "create of 1,024 blocks, write, ms",
    ):
        assert row[name] > 0, name
    by_servers = results["servers"]["246 KB"]
    assert list(by_servers) == ["LightMem, 1", "LightMem, 2"]
    by_size = results["sizes"]["in turn"]
    assert list(by_size) == ["LightMem, 3.93 MB", "LightMem, 983 KB in one page"]
    bounds = results["bounds"]["in turn"]
    assert list(bounds) == [
        f"{name}, {shape}"
        for shape in ("3.93 MB", "983 KB in one page")
        for name in ("LightMem", "copies alone", "memory to memory")
    ]
    for works in [*by_servers.values(), *by_size.values(), *bounds.values()]:
        assert works["write"]["GBps"] > 0 < works["read"]["GBps"]
        assert works["write"]["samples"] == 2


def test_what_growth_costs_is_a_share_of_the_smallest_number(results: dict[str, Any]) -> None:
    by_servers = results["servers"]["246 KB"]
    one, two = (works["write"]["rates"] for works in by_servers.values())
    low, high = sorted(b / a for a, b in zip(one, two, strict=True))
    found = results["flatness"]["servers: write of 246 KB"]
    assert found["1"] == 1.0
    assert low <= found["2"] <= high


def test_private_memory_is_not_that_of_the_mapped_shards(results: dict[str, Any]) -> None:
    [column] = results["process"].values()
    assert 5 < column["most private memory of a worker MB"] < 60


def test_plots_are_drawn_or_said_to_be_missing(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCH.parent))
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    from benchmark import plots

    said = plots.draw(results, tmp_path / "plots")
    assert said.startswith("no plots:")
    assert not (tmp_path / "plots").exists()


def test_a_ratio_is_one_of_rounds_in_which_both_were_clean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCH.parent))
    from benchmark.ratios import between

    ours = {"rates": [2.0, 6.0, 1.0], "clean": [True, False, True]}
    theirs = {"rates": [1.0, 1.0, 1.0], "clean": [True, True, True]}
    found = between(ours, theirs)
    assert found is not None
    assert (found.median, found.low, found.high, found.noisy) == (1.5, 1.25, 1.75, False)
    assert str(found) == "1.50 (1.25-1.75)"
    noisy = between({**ours, "clean": [False] * 3}, theirs)
    assert noisy is not None
    assert noisy.noisy
    assert str(noisy) == "2.00~ (1.50-4.00)"
    assert between(ours, None) is None


def test_what_cannot_work_is_refused_at_once(tmp_path: Path) -> None:
    for arguments in (
        ["--rounds", "0"],
        ["--workers", "-1"],
        ["--gib", "0"],
        ["--entry-bytes", "0"],
        ["--json", str(tmp_path / "nowhere" / "out.json")],
        ["--gib", "1000000"],
    ):
        ran = run_bench(*arguments)
        assert ran.returncode == 2, arguments
        assert "usage" in ran.stderr
