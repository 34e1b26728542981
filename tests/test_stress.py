"""A short round of each stress run; `python -m tests.stress.kills --seconds 600` is a long one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.stress import eviction, kills, servers

SEED = 20261124


def nothing_wrong(counts: Counter[str]) -> None:
    assert not counts["wrong"], counts
    assert not counts["hangs"], counts
    assert not counts["check problems"], counts
    assert not counts["damaged"], counts
    assert counts["loaded"] > 0, counts
    assert counts["checked"] > 0, counts


def test_blocks_are_right_or_absent_after_kills_at_random_moments(tmp_path: Path) -> None:
    counts = kills.run(str(tmp_path / "store"), SEED, seconds=60, rounds=4)
    nothing_wrong(counts)
    assert counts["rounds"] == 4
    assert counts["workers killed"] + counts["servers killed"] + counts["killed at the end"] >= 4


@pytest.mark.parametrize("small_bytes", ["0", "262144"])
def test_readers_against_eviction_never_get_wrong_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_bytes: str
) -> None:
    monkeypatch.setenv("LIGHTMEM_SMALL_READ_BYTES", small_bytes)
    monkeypatch.setenv("LIGHTMEM_SMALL_WRITE_BYTES", small_bytes)
    counts = eviction.run(str(tmp_path / "store"), SEED, seconds=3, players=2)
    nothing_wrong(counts)
    assert counts["evictions"] > 100
    assert counts["looks at views"] > 0, counts
    assert counts["pinned"] > 0, counts


def test_blocks_that_are_evicted_while_they_are_read_are_never_believed(tmp_path: Path) -> None:
    counts = eviction.run(str(tmp_path / "store"), SEED, seconds=3, players=3, tight=True)
    nothing_wrong(counts)
    assert counts["evictions"] > 20


def test_servers_that_come_go_die_and_are_stopped_share_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTMEM_SMALL_READ_BYTES", "262144")
    monkeypatch.setenv("LIGHTMEM_SMALL_WRITE_BYTES", "262144")
    counts = servers.run(str(tmp_path / "store"), SEED, seconds=6, stop_seconds=0.2)
    nothing_wrong(counts)
    assert counts["joins"] >= 3
