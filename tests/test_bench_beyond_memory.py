"""The benchmark beyond memory runs, compares the bytes, and says what stays in the cache."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cached import can_forget

pytestmark = pytest.mark.timeout(900)  # some 30 s by itself, minutes beside other work

BENCH = Path(__file__).resolve().parent.parent / "tools" / "bench_beyond_memory.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny run, without the limit: what that does is the kernel's business."""
    place = tmp_path_factory.mktemp("beyond")
    if not can_forget(place):
        pytest.skip("this file system drops no pages")
    ran = subprocess.run(
        [
            *[sys.executable, str(BENCH), "--limited", "--limit", "32", "--rounds", "1"],
            *["--directory", str(place), "--json", str(place / "out.json")],
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "bystander kept" in ran.stdout
    assert [p.name for p in place.iterdir()] == ["out.json"]
    result: dict[str, Any] = json.loads((place / "out.json").read_text())
    return result


def test_each_way_has_its_figures(found: dict[str, Any]) -> None:
    for name in ("plain", "plain, direct", "keep", "drop"):
        for work in ("write", "read"):
            row = found["summary"][name][work]
            assert row["GBps"] > 0
            assert row["bystander before"] == 1.0
            assert 0 <= row["bystander after"] <= 1
    best = max(found["summary"][name]["read"]["of the device"] for name in found["summary"])
    assert best >= 1.0


def test_the_policies_differ_in_what_stays(found: dict[str, Any]) -> None:
    assert found["summary"]["keep"]["write"]["store in cache"] > 0.5
    # Reads go past the page cache with both; "keep" brings blocks in when its workers rest.
    for work in ("write", "read"):
        assert found["summary"]["drop"][work]["store in cache"] < 0.05


def test_the_store_was_checked(found: dict[str, Any]) -> None:
    assert found["check"]["blocks"] > 10
    assert found["check"]["damaged"] == 0
