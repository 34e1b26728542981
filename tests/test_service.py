"""What is written under a hash comes back under that hash, in every form of the arguments."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from light_mem import InvalidArgumentError, State
from tests.service_rig import WAIT, Rig, rig


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig(tmp_path_factory.mktemp("service"), pages=320, slots=800, shards=3, workers=2) as r:
        r.service.clear()  # opens what is opened when it is first used
        yield r


@pytest.fixture
def r(running: Rig) -> Rig:
    """A running service with an empty store."""
    running.service.clear()
    return running


def test_a_hash_a_page_comes_back_byte_for_byte(r: Rig) -> None:
    keys = [f"page {n}" for n in range(10)]
    r.write(keys, range(10))
    task = r.read(keys, list(range(29, 19, -1)))
    assert task.state() == [State.Finished] * 10
    assert all(r.holds(key, [29 - n]) for n, key in enumerate(keys))


@pytest.mark.parametrize("pages", [1, 63, 64, 65, 128, 150])
def test_a_hash_a_run_of_pages_whose_last_may_be_short(r: Rig, pages: int) -> None:
    assert r.service.pages_per_block == 64
    runs = [list(range(a, min(a + 64, pages))) for a in range(0, pages, 64)]
    keys = [f"run {n}" for n in range(len(runs))]
    for key, run in zip(keys, runs, strict=True):
        r.fill(key, run)
    task = r.service.create("w", keys, range(pages))
    assert task.wait(WAIT)
    assert task.state() == [State.Finished] * len(keys)
    assert [list(block.pages) for block in task.blocks] == runs
    assert r.service.stats()["used_slots"] == pages  # a short block wastes nothing

    target = list(reversed(range(160, 160 + pages)))
    r.blank(target)
    task = r.service.create("r", keys, target)
    assert task.wait(WAIT)
    assert task.state() == [State.Finished] * len(keys)
    for key, run in zip(keys, runs, strict=True):
        assert r.holds(key, [target[n] for n in run])


@pytest.mark.parametrize(("hashes", "pages"), [(2, 150), (4, 150), (149, 150), (0, 1), (1, 0)])
def test_lengths_that_do_not_fit_are_an_error_that_names_both(
    r: Rig, hashes: int, pages: int
) -> None:
    with pytest.raises(ValueError, match="do not fit") as caught:
        r.service.create("write", [f"h{n}" for n in range(hashes)], range(pages))
    accepted = (pages, -(-pages // 64))
    assert caught.value.accepted == accepted  # type: ignore[attr-defined]
    assert all(str(number) in str(caught.value) for number in accepted)
    assert r.service.active_create_count("write") == 0
    assert r.service.stats()["write_queue"] == 0


@pytest.mark.parametrize("pages", [[], np.empty(0, np.int64), torch.empty(0, dtype=torch.int64)])
def test_a_task_of_nothing_is_ready(r: Rig, pages: Any) -> None:
    for mode in ("write", "read"):
        task = r.service.create(mode, [], pages)
        assert task.ready()
        assert task.data_safe()
        assert task.state() == []


@pytest.mark.parametrize(
    "form",
    [
        list,
        tuple,
        *(
            lambda pages, t=t: np.array(pages, t)
            for t in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">i4")
        ),
        *(
            lambda pages, t=t: torch.tensor(pages, dtype=t)
            for t in (torch.int32, torch.int64, torch.uint8)
        ),
        lambda pages: np.repeat(pages, 2)[::2],  # strided
    ],
)
def test_pages_are_a_list_an_array_or_a_tensor(r: Rig, form: Any) -> None:
    keys = ["a", "b", "c"]
    for key, page in zip(keys, (5, 0, 31), strict=True):
        r.fill(key, [page])
    assert r.service.create("w", keys, form([5, 0, 31])).wait(WAIT)
    r.blank([9, 8, 7])
    assert r.service.create("r", keys, form([9, 8, 7])).wait(WAIT)
    assert all(r.holds(key, [page]) for key, page in zip(keys, (9, 8, 7), strict=True))


def test_hashes_that_differ_never_meet_and_equal_ones_do(r: Rig) -> None:
    digits = "00ff" * 8
    keys: list[Any] = [
        *("a", b"a", "", b"", "x" * 10_000, "x" * 10_001, "ü", "\ud800"),
        *(0, 1, 2**64, 2**128 - 1, "0", "1"),
        *(digits, digits.upper(), digits[:-1], digits.encode()),
    ]
    r.write(keys, range(len(keys)))
    assert r.service.stats()["blocks"] == len(keys)
    task = r.read(keys, range(len(keys)))
    assert task.state() == [State.Finished] * len(keys)
    assert all(r.holds(key, [page]) for page, key in enumerate(keys))
    same = [int(digits, 16), np.uint64(1), "0" * 31 + "1", bytearray(b"a")]
    assert r.service.query(same) == [True] * 4
    assert r.service.query("0" * 32) is True  # stands for the int 0
    assert r.service.query([digits.upper()[:-1], "A", "00FF" * 7 + "00fF"]) == [False] * 3


def test_a_write_of_a_stored_hash_is_finished_without_a_copy(r: Rig) -> None:
    r.write(["a", "b"], [0, 1])
    before = r.service.stats()
    r.fill("other bytes", [0])
    r.fill("c", [5])
    task = r.service.create("write", ["a", "c", "b"], [0, 5, 7])
    assert task.state()[0] is task.state()[2] is State.Finished
    assert task.get_page_already_list() == [0, 7]
    assert task.wait(WAIT)
    task.get_page_already_list().clear()  # a copy: the caller may keep or change it
    assert task.get_page_already_list() == [0, 7]  # "c" was not stored when it was made
    after = r.service.stats()
    assert after["bytes_written"] - before["bytes_written"] == r.page_bytes
    assert after["present"] - before["present"] == 2
    r.read(["a"], [9])
    assert r.holds("a", [9])


def test_pages_of_stored_runs_are_all_in_the_already_list(r: Rig) -> None:
    assert r.service.create("w", ["x", "y"], range(100)).wait(WAIT)
    task = r.service.create("w", ["x", "new", "y2"], range(130))
    assert task.get_page_already_list() == list(range(64))
    task = r.service.create("r", ["x", "y"], range(100))
    assert task.get_page_already_list() == []
    assert task.wait(WAIT)


def test_a_read_of_a_missing_hash_is_aborted_and_touches_no_page(r: Rig) -> None:
    r.write(["a", "b"], [0, 1])
    task = r.read(["nothing", "a", "neither", "b"], [10, 11, 12, 13])
    missing, found = State.Aborted, State.Finished
    assert task.state() == [missing, found, missing, found]
    assert r.holds("a", [11])
    assert r.holds("b", [13])
    assert r.is_blank([10, 12])


def test_a_read_of_another_length_than_stored_is_a_miss(r: Rig) -> None:
    r.fill("block", [0, 1, 2])
    assert r.service.create("w", ["block"], [0, 1, 2]).wait(WAIT)
    for pages in ([5], [5, 6], [5, 6, 7, 8]):
        r.blank([5, 6, 7, 8])
        task = r.service.create("r", ["block"], pages)
        assert task.wait(WAIT)
        assert task.state() == [State.Aborted]
        assert r.is_blank([5, 6, 7, 8])


def test_a_hash_twice_in_one_write_is_stored_once(r: Rig) -> None:
    r.fill("twin", [3])
    r.fill("twin", [4])
    task = r.service.create("w", ["twin", "twin"], [3, 4])
    assert task.wait(WAIT)
    assert task.state() == [State.Finished] * 2
    assert r.service.stats()["blocks"] == 1
    assert r.service.stats()["used_slots"] == 1
    assert r.read(["twin"], [9]).state() == [State.Finished]
    assert r.holds("twin", [9])


def test_query_match_prefix_delete_and_clear_agree(r: Rig) -> None:
    keys = ["a", "b", "c", "d"]
    s = r.service
    assert s.query("a") is False
    assert s.match_prefix(keys) == 0
    r.write(keys, range(4))
    assert s.query("a") is True
    assert s.query([]) == []
    assert s.query(["a", "no", "d"]) == [True, False, True]
    assert s.match_prefix(keys) == 4
    assert s.match_prefix([]) == 0
    assert s.match_prefix(["a", "b", "no", "c"]) == 2
    assert s.match_prefix(["no", *keys]) == 0
    assert s.match_prefix(keys * 20) == 80  # long enough for the vector path
    assert s.delete("b") == 1
    assert s.delete(["b", "no"]) == 0
    assert s.query(keys) == [True, False, True, True]
    assert s.match_prefix(keys) == 1
    assert r.read(["b"], [9]).state() == [State.Aborted]
    assert s.delete(["a", "a", "c"]) == 2
    assert s.clear() == 1
    assert s.query(keys) == [False] * 4
    assert s.clear() == 0
    assert s.stats()["used_slots"] == s.stats()["blocks"] == 0
    r.write(keys, range(4))
    assert s.query(keys) == [True] * 4


def test_a_write_of_another_length_replaces_what_is_stored(r: Rig) -> None:
    r.fill("block", [0, 1, 2])
    assert r.service.create("w", ["block"], [0, 1, 2]).wait(WAIT)
    r.fill("longer", [3, 4, 5, 6])
    task = r.service.create("w", ["block"], [3, 4, 5, 6])
    assert task.get_page_already_list() == []
    assert task.wait(WAIT)
    assert task.state() == [State.Finished]
    assert r.service.stats()["used_slots"] == 4
    r.blank([8, 9, 10, 11])
    assert r.service.create("r", ["block"], [8, 9, 10, 11]).wait(WAIT)
    assert r.holds("longer", [8, 9, 10, 11])


def test_one_thread_follows_many_tasks_by_the_mark_of_readiness(tmp_path: Path) -> None:
    with rig(tmp_path, run=False) as waiting:
        service = waiting.service
        mark = service.ready_mark()
        tasks = [service.create("w", [f"k{n}"], [n]) for n in range(8)]
        service.wait_ready(mark, 0.01)  # nobody works: nothing happens
        assert service.ready_mark() == mark
        service.run()
        deadline = time.monotonic() + WAIT
        while not all(task.ready() for task in tasks):
            mark = service.ready_mark()
            if not all(task.ready() for task in tasks):
                service.wait_ready(mark, 2 * WAIT)  # a change that was missed would make it late
        assert time.monotonic() < deadline
        with pytest.raises(InvalidArgumentError, match="timeout"):
            service.wait_ready(mark, -1)
