"""A store that is too small: the least recently used goes first, and no byte is ever wrong."""

from __future__ import annotations

import os
import random
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from light_mem import State
from light_mem.index.keys import as_keys
from tests.service_rig import WAIT, Rig, rig

SLOTS = 64


def fill_in_order(r: Rig, keys: list[str]) -> None:
    """Write blocks one after the other, so that each was used later than the one before."""
    for key in keys:
        assert r.service.create("w", [key], [0]).wait(WAIT)


USES: dict[str, Callable[[Rig, list[str]], object]] = {
    "query of one": lambda r, keys: [r.service.query(key) for key in keys],
    "query of many": lambda r, keys: r.service.query(keys),
    "match_prefix": lambda r, keys: r.service.match_prefix([*keys, "gap", "k20"]),
    "read": lambda r, keys: r.read(keys, range(len(keys))),
    "write of what is stored": lambda r, keys: r.service.create("w", keys, range(len(keys))),
}


@pytest.mark.parametrize("use", USES)
def test_what_was_used_stays_and_the_oldest_goes(tmp_path: Path, use: str) -> None:
    with rig(tmp_path, slots=SLOTS) as r:
        keys = [f"k{n}" for n in range(SLOTS)]
        fill_in_order(r, keys)
        assert r.service.stats()["evictions"] == 0
        USES[use](r, keys[:10])
        fill_in_order(r, [f"new {n}" for n in range(10)])
        found = r.service._engine.find(as_keys(keys), touch=False).tolist()
        assert found == [True] * 10 + [False] * 10 + [True] * 44
        assert r.service.stats()["evictions"] == 10


def test_a_long_block_pushes_out_as_many_old_ones_as_it_needs(tmp_path: Path) -> None:
    with rig(tmp_path, pages=64, slots=128) as r:
        keys = [f"k{n}" for n in range(128)]
        fill_in_order(r, keys)
        r.fill("run", range(64))
        task = r.service.create("w", ["run"], range(64))
        assert task.wait(WAIT)
        assert task.state() == [State.Finished]
        assert r.service.stats()["used_slots"] <= 128
        assert r.service.query(keys) == [False] * 64 + [True] * 64
        r.blank(range(64))
        assert r.service.create("r", ["run"], range(64)).wait(WAIT)
        assert r.holds("run", range(64))


def stamp(key: int, length: int, page_bytes: int) -> np.ndarray:
    """Cheap payload of a block, uint64 [length, page_bytes / 8]: key, page and position in it."""
    words = np.arange(length * page_bytes // 8, dtype=np.uint64) + np.uint64(key << 32)
    return words.reshape(length, -1)


def test_readers_and_writers_of_ten_times_the_room_never_see_a_wrong_byte(tmp_path: Path) -> None:
    page_bytes, threads, own = 8192, 4, 64
    store = tmp_path / "store"
    seconds = 4.0
    seen: dict[str, int] = {"read": 0, "missed": 0, "written": 0, "wrong": 0}
    failures: list[BaseException] = []
    guard = threading.Lock()

    def length_of(key: int) -> int:
        return 1 + key * 7919 % 16

    def race(r: Rig, number: int) -> None:
        try:
            numbers = r.kv.numpy().view(np.uint64)  # [pages, page_bytes / 8]
            first, rng = number * own, random.Random(number)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                key = int(rng.triangular(0, 320, 0))  # 2,720 pages wanted, room for 272
                length = length_of(key)
                pages = rng.sample(range(first, first + own), length)
                if rng.random() < 0.5:
                    numbers[pages] = stamp(key, length, page_bytes)
                    task = r.service.create("w", [key], pages)
                    assert task.wait(WAIT)
                    kind = "written"
                else:
                    numbers[pages] = 0
                    task = r.service.create("r", [key], pages)
                    assert task.wait(WAIT)
                    kind = "missed"
                    if task.state() == [State.Finished]:
                        right = np.array_equal(numbers[pages], stamp(key, length, page_bytes))
                        kind = "read" if right else "wrong"
                with guard:
                    seen[kind] += 1
        except BaseException as error:
            failures.append(error)

    shape = {"pages": threads * own, "page_bytes": page_bytes, "slots": 272, "shards": 2}
    with rig(tmp_path, **shape, workers=2) as one, rig(tmp_path, **shape, workers=1) as two:
        racers = [
            threading.Thread(target=race, args=(one if n % 2 else two, n)) for n in range(threads)
        ]
        for racer in racers:
            racer.start()
        while any(racer.is_alive() for racer in racers):
            size = sum(p.stat().st_size for p in store.iterdir())
            assert size <= bound(272, 2, page_bytes)
            assert one.service.stats()["used_slots"] <= 272
            time.sleep(0.05)
        for racer in racers:
            racer.join()
        assert failures == []
        assert seen["wrong"] == 0
        assert min(seen["read"], seen["missed"], seen["written"]) > 20
        one.service._engine.reclaim()
        stats = one.service.stats()
        assert stats["damaged"] == 0
        assert stats["evictions"] > 20
        blocks = one.service.query(list(range(320)))
        assert sum(blocks) == stats["blocks"]
        assert stats["used_slots"] == sum(length_of(k) for k in range(320) if blocks[k])


def bound(slots: int, shards: int, page_bytes: int) -> int:
    """What docs/format.md promises of the size of all files."""
    return slots * (page_bytes + 144) + shards * 12544 + (4 << 20) + (17 << 10)


@pytest.mark.parametrize(("slots", "shards", "page_bytes"), [(64, 1, 64), (4096, 7, 512)])
def test_the_files_take_no_more_than_the_stated_overhead(
    tmp_path: Path, slots: int, shards: int, page_bytes: int
) -> None:
    with rig(tmp_path, slots=slots, shards=shards, page_bytes=page_bytes) as r:
        r.write([f"k{n}" for n in range(32)], range(32))
        files = list((tmp_path / "store").iterdir())
        limit = bound(slots, shards, page_bytes)
        assert sum(path.stat().st_size for path in files) <= limit
        assert sum(path.stat().st_blocks * 512 for path in files) <= limit + 4096 * len(files)


def test_files_are_the_users_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with rig(tmp_path, shards=2) as r:
            r.write(["a", "b", "c"], [0, 1, 2])
            r.service.delete("a")
    finally:
        os.umask(before)
    store = tmp_path / "store"
    assert stat.S_IMODE(store.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in store.iterdir()}
    assert set(modes.values()) == {0o600}, modes
