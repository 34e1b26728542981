"""Ranks with parts of their own in one store: keys that never meet, lengths that all agree on."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from light_mem import InvalidArgumentError, State, TaskTableFullError
from light_mem.ranks import (
    RankedCache,
    finished_prefix,
    match_ranks,
    rank_key,
    rank_keys,
)
from tests.ranks_child import PAGE, SHARDS, SLOTS
from tests.service_child import ROOT, Child
from tests.service_rig import WAIT, Rig, rig

WORLD = 3
HASHES = [f"h{n}" for n in range(8)]

WRITER = """
import light_mem
store, slots, page, shards = sys.argv[1], *map(int, sys.argv[2:])
kv = light_mem.allocate_kvcache(16, page)
service = light_mem.LocalCacheService(store, slots * page, shards, kv, 1)
service.run()
say("runs")
n = 0
while True:
    service.create("w", [f"flood {n + at}" for at in range(16)], range(16)).wait(30)
    n += 16
"""


class Together:
    """The least of the numbers of threads that call it: an `agree` for one process."""

    def __init__(self, ranks: int) -> None:
        self._barrier = threading.Barrier(ranks, timeout=WAIT)
        self._numbers: list[int] = []

    def __call__(self, mine: int) -> int:
        self._numbers.append(mine)
        self._barrier.wait()
        least = min(self._numbers)
        if self._barrier.wait() == 0:
            self._numbers.clear()
        self._barrier.wait()
        return least


@pytest.fixture
def rigs(tmp_path: Path) -> Iterator[list[Rig]]:
    with ExitStack() as stack:
        made = [stack.enter_context(rig(tmp_path)) for _ in range(WORLD)]
        yield made
        made.clear()  # pytest keeps the list for longer than the memory may live


@pytest.fixture
def caches(rigs: list[Rig]) -> Iterator[list[RankedCache]]:
    together = Together(WORLD)
    made = [RankedCache(r.service, rank, WORLD, together) for rank, r in enumerate(rigs)]
    yield made
    made.clear()


def everywhere(caches: list[RankedCache], call: Callable[[RankedCache], Any]) -> list[Any]:
    """What `call` gives on each rank; an error where it raised one."""
    found: list[Any] = [None] * len(caches)

    def one(cache: RankedCache) -> None:
        try:
            found[cache.rank] = call(cache)
        except Exception as error:
            found[cache.rank] = error

    threads = [threading.Thread(target=one, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def store_all(rigs: list[Rig], caches: list[RankedCache]) -> None:
    for r, cache in zip(rigs, caches, strict=True):
        for page, key in enumerate(cache.keys(HASHES)):
            r.fill(key, [page])
        assert cache.create("write", HASHES, range(8)).wait(WAIT)


# --- keys -----------------------------------------------------------------------------------------


def test_a_rank_key_is_blake2b_of_world_rank_and_key() -> None:
    low, high = 7, 9
    data = struct.pack("<IIQQ", 4, 3, low, high)
    digest = blake2b(data, digest_size=16, person=b"lightmem.rank").digest()
    value = high << 64 | low
    assert rank_key(value, 3, 4) == int.from_bytes(digest, "big")
    assert rank_key(f"{value:032x}", 3, 4) == rank_key(value, 3, 4)  # one hash, two spellings


def test_no_two_ranks_worlds_or_hashes_share_a_key() -> None:
    hashes = ["a", b"a", 0, 1, 1 << 64, (1 << 128) - 1, "0", *range(2, 50)]
    keys = [key for world in (1, 2, 3, 8) for rank in range(world)
            for key in rank_keys(hashes, rank, world)]  # fmt: skip
    assert len(set(keys)) == len(keys) == len(hashes) * (1 + 2 + 3 + 8)
    assert not set(keys) & set(range(50))


@pytest.mark.parametrize(("rank", "world"), [(-1, 2), (2, 2), (0, 0), (True, 2), (0, 1 << 17)])
def test_a_rank_that_there_is_not_is_refused(rank: int, world: int) -> None:
    with pytest.raises(InvalidArgumentError, match=r"rank|world_size"):
        rank_key("a", rank, world)


# --- the scheduler's side -------------------------------------------------------------------------


def test_the_prefix_of_all_ranks_ends_where_one_of_them_has_a_gap(
    rigs: list[Rig], caches: list[RankedCache]
) -> None:
    service = rigs[0].service
    assert match_ranks(service, HASHES, WORLD) == 0
    store_all(rigs, caches)
    assert match_ranks(service, HASHES, WORLD) == 8
    assert match_ranks(service, [*HASHES, "more"], WORLD) == 8
    assert match_ranks(service, [], WORLD) == 0
    assert match_ranks(service, HASHES, 2) == match_ranks(service, HASHES, 1) == 0
    service.delete(caches[2].keys(HASHES)[5])
    assert match_ranks(service, HASHES, WORLD) == 5
    service.delete(caches[0].keys(HASHES)[5])
    service.delete(caches[1].keys(HASHES)[0])
    assert match_ranks(service, HASHES, WORLD) == 0
    assert service.match_prefix(caches[2].keys(HASHES)) == 5  # what this rank alone would say


def test_a_prefix_longer_than_a_step_of_the_look_up(rigs: list[Rig]) -> None:
    hashes = [f"long {n}" for n in range(80)]
    service = rigs[0].service
    for start in range(0, 80, 32):
        part = hashes[start : start + 32]
        for rank in range(WORLD):
            task = service.create("write", rank_keys(part, rank, WORLD), range(len(part)))
            assert task.wait(WAIT)
    assert match_ranks(service, hashes, WORLD) == 80
    service.delete(rank_key(hashes[64], 1, WORLD))
    assert match_ranks(service, hashes, WORLD) == 64


def test_a_task_that_is_not_ready_has_no_prefix_that_may_be_used(tmp_path: Path) -> None:
    with rig(tmp_path, run=False) as r:
        task = r.service.create("write", ["a", "b"], [0, 1])
        with pytest.raises(InvalidArgumentError, match="not ready"):
            finished_prefix(task)
        r.service.run()
        assert task.wait(WAIT)
        assert finished_prefix(task) == 2
        task = r.service.create("read", ["a", "x", "b"], [2, 3, 4])
        assert task.wait(WAIT)
        assert task.state() == [State.Finished, State.Aborted, State.Finished]
        assert finished_prefix(task) == 1


# --- the ranks among themselves -------------------------------------------------------------------


def test_a_block_that_goes_between_the_answer_and_the_load_shortens_it_on_all_ranks(
    rigs: list[Rig], caches: list[RankedCache]
) -> None:
    store_all(rigs, caches)
    assert everywhere(caches, lambda cache: cache.match_prefix(HASHES)) == [8] * WORLD
    rigs[0].service.delete(caches[1].keys(HASHES)[3])
    pages = range(16, 24)
    assert everywhere(caches, lambda cache: cache.load(HASHES, pages, WAIT)) == [3] * WORLD
    for r, cache in zip(rigs, caches, strict=True):
        assert all(r.holds(key, [16 + at]) for at, key in enumerate(cache.keys(HASHES[:3])))
    assert everywhere(caches, lambda cache: cache.match_prefix(HASHES)) == [3] * WORLD


def test_ranks_that_poll_for_themselves_agree_on_what_was_loaded(
    rigs: list[Rig], caches: list[RankedCache]
) -> None:
    store_all(rigs, caches)
    rigs[0].service.delete(caches[2].keys(HASHES)[6])
    tasks = [cache.create("read", HASHES, range(8, 16)) for cache in caches]
    assert all(task.wait(WAIT) for task in tasks)
    assert [finished_prefix(task) for task in tasks] == [8, 8, 6]
    assert everywhere(caches, lambda cache: cache.loaded(tasks[cache.rank])) == [6] * WORLD


def test_a_rank_that_fails_takes_part_with_nothing_and_raises(
    rigs: list[Rig], caches: list[RankedCache]
) -> None:
    store_all(rigs, caches)

    def load(cache: RankedCache) -> int:
        return cache.load(HASHES, [99] if cache.rank == 1 else range(8, 16), WAIT)

    found = everywhere(caches, load)
    assert found[0] == found[2] == 0
    assert isinstance(found[1], InvalidArgumentError)
    assert everywhere(caches, lambda cache: cache.match_prefix(HASHES)) == [8] * WORLD


def test_a_rank_without_room_for_its_task_makes_the_load_a_miss(
    rigs: list[Rig], caches: list[RankedCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    store_all(rigs, caches)

    def full(*_: object) -> None:
        raise TaskTableFullError("full", blocks=1, capacity=1, timeout=0.0)

    monkeypatch.setattr(rigs[2].service, "create", full)
    assert everywhere(caches, lambda c: c.load(HASHES, range(8, 16), WAIT)) == [0] * WORLD


def test_a_load_that_takes_too_long_is_given_up_before_it_is_counted(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        r.write([rank_key("a", 0, 1)], [0])
        with rig(tmp_path, run=False) as waiting:  # no worker: the read stays where it is
            cache = RankedCache(waiting.service, 0, 1, lambda mine: mine)
            assert cache.load(["a"], [1], 0.05) == 0
            assert waiting.service.active_create_count("read") == 0


@pytest.mark.parametrize("timeout", ["1", float("nan"), -1.0])
def test_a_timeout_that_is_none_is_refused_before_anything_is_read(
    rigs: list[Rig], caches: list[RankedCache], timeout: Any
) -> None:
    store_all(rigs, caches)
    cache = RankedCache(rigs[0].service, 0, WORLD, lambda mine: mine)
    tasks = rigs[0].service.stats(ages=False)["read_tasks"]
    with pytest.raises(InvalidArgumentError, match="timeout"):
        cache.load(HASHES, range(8, 16), timeout)
    assert rigs[0].service.stats(ages=False)["read_tasks"] == tasks


def test_an_agreement_that_is_not_the_least_is_an_error(
    rigs: list[Rig], caches: list[RankedCache]
) -> None:
    store_all(rigs, caches)
    cache = RankedCache(rigs[0].service, 0, WORLD, lambda mine: mine + 1)
    with pytest.raises(InvalidArgumentError, match="least"):
        cache.match_prefix(HASHES)


# --- processes ------------------------------------------------------------------------------------


def run_ranks(directory: Path, world: int, rounds: int, agree: bool) -> list[list[list[int]]]:
    """Rank processes beside a writer that evicts; what each rank said in each round, then its end:
    [own match, own load, match, load] a round, and [pages used, wrong ones]."""
    store = directory / "store"
    with ExitStack() as stack:
        writer = stack.enter_context(Child(WRITER, store, SLOTS, PAGE, SHARDS))
        ranks = [
            stack.enter_context(
                Child(
                    "import runpy\nsys.argv[0] = ''\n"
                    "runpy.run_module('tests.ranks_child', run_name='__main__')",
                    *(store, directory / "group", rank, world, rounds, int(agree)),
                )
            )
            for rank in range(world)
        ]
        for child in (writer, *ranks):
            assert child.hear(150) == ["runs"]
        said = [[rank.hear(120)[1:] for rank in ranks] for _ in range(rounds + 1)]
        for rank in ranks:
            assert rank.end() == 0
    return said


@pytest.mark.timeout(400)  # four times torch, on a machine that may be busy
def test_four_rank_processes_agree_under_eviction_and_use_the_right_bytes(tmp_path: Path) -> None:
    *rounds, ends = run_ranks(tmp_path, 4, 30, agree=True)
    for said in rounds:
        assert len({tuple(one[2:]) for one in said}) == 1, said
        for mine, loaded, found, usable in said:
            assert usable <= min(found, loaded)
            assert found <= mine
    used = [used for used, _ in ends]
    assert [wrong for _, wrong in ends] == [0] * 4
    assert min(used) == max(used) > 100
    # The test is one only if ranks had something to agree on.
    for what, at in (("look-ups", 0), ("loads", 1)):
        assert any(len({one[at] for one in said}) > 1 for said in rounds), what
    evicted = [said for said in rounds[7::15] if said[0][2]]  # between the answer and the load
    assert all(min(one[1] for one in said) < said[0][2] for said in evicted)


def test_the_example_of_the_docs_runs_and_prints_what_it_says(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "ranks.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    printed = re.findall(r"^    (rank \d: .*)$", text, re.MULTILINE)
    assert len(printed) == 2
    (tmp_path / "example.py").write_text(program)
    (tmp_path / "data").mkdir()
    done = subprocess.run(
        [sys.executable, "example.py", str(tmp_path / "data")],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == printed
