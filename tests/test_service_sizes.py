"""Sizes of pages, blocks and stores, and the numbers that a service gives of itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from light_mem import InvalidArgumentError, State
from tests.service_rig import WAIT, rig


@pytest.mark.parametrize("page_bytes", [1, 7, 4095, 4097, 12_289, 100_003, 700_001])
def test_pages_of_any_size_come_back(tmp_path: Path, page_bytes: int) -> None:
    straight, scattered = ([2, 3, 4, 5], [6, 7, 8, 9]), ([5, 0, 8, 2], [1, 9, 3, 4])
    with rig(tmp_path, pages=10, page_bytes=page_bytes, slots=64) as r:
        for key, (pages, back) in {"straight": straight, "scattered": scattered}.items():
            r.fill(key, pages)
            assert r.service.create("w", [key], pages).wait(WAIT)
            r.blank(range(10))
            task = r.service.create("r", [key], back)
            assert task.wait(WAIT)
            assert task.state() == [State.Finished]
            assert r.holds(key, back)
            assert r.is_blank([page for page in range(10) if page not in back])


def test_more_blocks_than_room_lose_the_oldest_and_never_a_byte(tmp_path: Path) -> None:
    with rig(tmp_path, slots=128, shards=2, workers=2) as r:
        keys = [f"k{n}" for n in range(384)]
        for first in range(0, 384, 32):
            r.write(keys[first : first + 32], range(32))
        stored = r.service.query(keys)
        assert 112 <= sum(stored) <= 128
        assert not any(stored[:192])
        for first in range(0, 384, 32):
            part = keys[first : first + 32]
            task = r.read(part, range(32))
            for page, (key, state) in enumerate(zip(part, task.state(), strict=True)):
                assert (state is State.Finished) is stored[first + page]
                assert r.holds(key, [page]) if state is State.Finished else r.is_blank([page])
        assert r.service.stats()["evictions"] == 384 - sum(stored)


def test_stats_say_what_happened(tmp_path: Path) -> None:
    with rig(tmp_path, shards=2, workers=2, slots=128) as r:
        r.write(["a", "b", "c"], [0, 1, 2])
        r.write(["a"], [0])
        r.read(["a", "b", "no"], [5, 6, 7])
        r.service.query(["a", "no"])
        r.service.query("no")
        r.service.match_prefix(["a", "no", "b"])
        r.service.delete("c")
        found = r.service.stats()
        expected = {
            "blocks": 2,
            "used_slots": 2,
            "slots": 128,
            "shards": 2,
            "page_bytes": 4096,
            "inserts": 3,
            "removals": 1,
            "evictions": 0,
            "write_tasks": 2,
            "read_tasks": 1,
            "present": 1,
            "missing": 1,
            "queried": 6,
            "hits": 2,
            "misses": 4,
            "blocks_written": 3,
            "bytes_written": 3 * 4096,
            "blocks_read": 2,
            "bytes_read": 2 * 4096,
            "damaged": 0,
            "lost_races": 0,
            "no_room": 0,
            "failed": 0,
            "restarts": 0,
            "read_queue": 0,
            "write_queue": 0,
            "active_read_tasks": 0,
            "active_write_tasks": 0,
            "workers": 2,
        }
        assert {name: found.get(name) for name in expected} == expected
        assert json.loads(json.dumps(found)) == found  # plain values


@pytest.mark.parametrize(
    ("value", "page_bytes", "expected"),
    [
        (None, 1 << 20, 64),
        ("", 1 << 20, 64),
        ("64", 1 << 20, 64),
        ("65", 1 << 20, 64),
        (" 5 ", 1 << 20, 5),
        ("1", 300_000, 3),
        ("1", 1 << 20, 1),
        ("1", (1 << 20) + 1, 1),  # a page is never split
    ],
)
def test_pages_per_block_follow_the_variable(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    value: str | None,
    page_bytes: int,
    expected: int,
) -> None:
    if value is None:
        monkeypatch.delenv("LIGHTMEM_MAX_BLOCK_SIZE_MB", raising=False)
    else:
        monkeypatch.setenv("LIGHTMEM_MAX_BLOCK_SIZE_MB", value)
    with rig(tmp_path, pages=2, page_bytes=page_bytes, slots=expected, run=False) as r:
        monkeypatch.setenv("LIGHTMEM_MAX_BLOCK_SIZE_MB", "2")  # read when the service is made
        assert r.service.pages_per_block == expected
        assert r.service.page_size() == page_bytes
        assert r.service.block_size() == expected * page_bytes
        assert r.service.num_pages == 2


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "64MB", "nonsense", "0x40"])
def test_a_senseless_block_size_is_an_error_that_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("LIGHTMEM_MAX_BLOCK_SIZE_MB", value)
    with (
        pytest.raises(InvalidArgumentError, match="LIGHTMEM_MAX_BLOCK_SIZE_MB") as caught,
        rig(tmp_path, run=False),
    ):
        pass
    assert value in str(caught.value)
    assert not (tmp_path / "store").exists()
