"""Where workers run: nodes and cores are dealt out, what was asked for is what the kernel says."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import psutil
import pytest

from light_mem import InvalidArgumentError
from light_mem.engine import affinity
from light_mem.engine.affinity import cores_of, place_workers, text_of
from tests.conftest import wait_until
from tests.service_rig import rig

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="this system binds no process to CPUs"
)


@pytest.fixture
def two_sockets(tmp_path: Path) -> Path:
    """Two nodes of two cores of two threads: siblings are n and n + 4."""
    for node, cpus in enumerate(("0-1,4-5", "2-3,6-7")):
        (tmp_path / f"node/node{node}").mkdir(parents=True)
        (tmp_path / f"node/node{node}/cpulist").write_text(cpus + "\n")
    for cpu in range(8):
        (tmp_path / f"cpu/cpu{cpu}/topology").mkdir(parents=True)
        siblings = tmp_path / f"cpu/cpu{cpu}/topology/thread_siblings_list"
        siblings.write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    return tmp_path


def allow(monkeypatch: pytest.MonkeyPatch, *cpus: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cpus))


def test_cores_come_from_the_nodes_in_turn_with_their_threads(two_sockets: Path) -> None:
    assert cores_of(range(8), two_sockets) == [(0, 4), (2, 6), (1, 5), (3, 7)]


def test_only_allowed_cpus_are_used(two_sockets: Path) -> None:
    assert cores_of([1, 2, 3, 7], two_sockets) == [(1,), (2,), (3, 7)]
    assert cores_of([5], two_sockets) == [(5,)]


def test_a_system_that_says_nothing_has_a_core_a_cpu(tmp_path: Path) -> None:
    assert cores_of([0, 1, 9], tmp_path) == [(0,), (1,), (9,)]


@pytest.mark.parametrize(
    ("workers", "places"),
    [
        (1, [(0, 4)]),
        (3, [(0, 4), (2, 6), (1, 5)]),
        (6, [(0, 4), (2, 6), (1, 5), (3, 7), (0, 4), (2, 6)]),
    ],
)
def test_spread_deals_cores_and_begins_again(
    two_sockets: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    places: list[tuple[int, ...]],
) -> None:
    allow(monkeypatch, *range(8))
    assert place_workers("spread", workers, two_sockets) == places


def test_a_list_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, 0, 1, 2, 5)
    assert place_workers([5, 0], 2) == [(5,), (0,)]
    assert place_workers([[2, 1, 2], range(2)], 2) == [(1, 2), (0, 1)]
    assert place_workers((5, {0, 1}), 2) == [(5,), (0, 1)]
    assert place_workers(None, 2) is None


def test_cpus_that_are_not_ours_are_an_error_with_the_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allow(monkeypatch, 0, 1, 2, 5)
    with pytest.raises(InvalidArgumentError, match=r"\[3, 9\].*0-2,5") as caught:
        place_workers([[0, 9], [3]], 2)
    assert (caught.value.missing, caught.value.allowed) == ([3, 9], [0, 1, 2, 5])  # type: ignore[attr-defined]
    with pytest.raises(InvalidArgumentError, match="3 elements for 2 workers"):
        place_workers([0, 1, 2], 2)


def test_without_affinity_in_the_system_spread_is_no_error_and_a_list_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(os, "sched_setaffinity")
    assert place_workers("spread", 2) is None
    assert "binds no process" in caplog.text
    with pytest.raises(InvalidArgumentError, match="binds no process"):
        place_workers([0, 0], 2)


def test_numbers_are_written_as_the_kernel_does() -> None:
    assert text_of([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert text_of([]) == ""


def test_workers_run_where_they_were_put_and_so_do_those_that_replace_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    first, last = allowed[0], allowed[-1]
    caplog.set_level(logging.INFO, "light_mem")
    with rig(tmp_path, workers=3, worker_cpus=[first, last, [first, last]]) as r:
        wanted = [[first], [last], sorted({first, last})]
        assert [psutil.Process(pid).cpu_affinity() for pid in r.service.worker_pids] == wanted
        assert f"on CPUs [{first}] [{last}]" in caplog.text
        dead = r.service.worker_pids[1]
        os.kill(dead, signal.SIGKILL)
        wait_until(lambda: r.service.stats()["restarts"] == 1)
        wait_until(lambda: r.service.stats()["workers"] == 3)
        now = [psutil.Process(pid).cpu_affinity() for pid in r.service.worker_pids]
        assert sorted(now) == sorted(wanted)
        assert dead not in r.service.worker_pids
        r.write(["a"], [0])
    assert sorted(os.sched_getaffinity(0)) == allowed  # the server's own is as it was


def test_spread_workers_have_a_core_each(tmp_path: Path) -> None:
    cores = cores_of(os.sched_getaffinity(0))
    with rig(tmp_path, workers=len(cores) + 1, worker_cpus="spread") as r:
        found = [psutil.Process(pid).cpu_affinity() for pid in r.service.worker_pids]
        assert found == [list(core) for core in (*cores, cores[0])]


def test_a_worker_whose_cpus_are_gone_works_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("light_mem.service_settings.place_workers", lambda *_: [(8191,)])
    with rig(tmp_path) as r:
        r.write(["a"], [0])
        wait_until(lambda: "not bound to CPUs [8191]" in caplog.text)


def test_binding_says_what_fails(caplog: pytest.LogCaptureFixture) -> None:
    affinity.bind([8191])
    assert "not bound" in caplog.text
