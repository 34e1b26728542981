"""ScansAhead: which shards are scanned, when, and the end of its thread."""

from __future__ import annotations

import itertools
import threading

import pytest

from light_mem.engine import scans_ahead
from light_mem.engine.scans_ahead import MOST_SECONDS, PART, ScansAhead
from light_mem.errors import LockTimeoutError
from tests.service_rig import WAIT


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Scans:
    """A ScansAhead whose scans are noted and take a second each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failure: Exception | None = None) -> None:
        self.clock = Clock()
        monkeypatch.setattr(scans_ahead, "time", self.clock)
        self.made: list[int] = []
        self.settled = threading.Event()
        self.failure = failure
        self.ahead = ScansAhead(self.scan)

    def scan(self, shard: int) -> None:
        if shard < 0:
            self.settled.set()
            return
        self.clock.now += 1
        self.made.append(shard)
        if self.failure is not None:
            raise self.failure

    def settle(self) -> list[int]:
        """Have everything that is wanted scanned; returns which that was."""
        self.settled.clear()
        self.ahead._queue.put((-1, None))
        assert self.settled.wait(WAIT)
        made, self.made = self.made, []
        return made


def test_a_shard_is_scanned_once_however_often_it_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scans = Scans(monkeypatch)
    for shard in (3, 5, 3, 3, 5):
        scans.ahead.refused(shard)
    assert scans.made == []  # nobody but its thread scans
    scans.ahead.start()
    scans.ahead.start()
    assert scans.settle() == [3, 5]
    scans.ahead.close()


def test_writes_that_go_on_have_a_shard_scanned_only_when_it_runs_low(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scans = Scans(monkeypatch)
    scans.ahead.start()
    for _ in range(5):
        scans.ahead.wrote(0)
        assert scans.settle() == []
        scans.ahead.wrote(0, lambda: scans.scan(1))  # 1: as it was given, without the lock
        assert scans.settle() == [1]
        scans.clock.now += PART
    scans.ahead.close()


def test_scans_that_do_not_help_become_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    scans = Scans(monkeypatch)
    scans.ahead.start()
    made = []
    for second in range(1000):
        scans.ahead.refused(0)
        if scans.settle():
            made.append(second)
        scans.clock.now += 1
    gaps = [later - sooner for sooner, later in itertools.pairwise(made)]
    assert gaps[0] >= PART
    assert gaps == sorted(gaps)
    assert gaps[-1] <= MOST_SECONDS + 1
    assert len(made) < 25
    scans.ahead.wrote(0)
    scans.clock.now += MOST_SECONDS
    scans.ahead.refused(0)
    assert scans.settle() == [0]
    scans.clock.now += PART  # it helped: as often as in the beginning
    scans.ahead.refused(0)
    assert scans.settle() == [0]
    scans.ahead.close()


def test_a_lock_that_is_not_to_be_had_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scans = Scans(monkeypatch, LockTimeoutError("held", path="", timeout=0.1))
    scans.ahead.start()
    scans.ahead.refused(0)
    assert scans.settle() == [0]
    scans.ahead.refused(1)
    assert scans.settle() == [1]
    scans.ahead.close()


def test_its_thread_ends_with_it_and_scans_nothing_more() -> None:
    begun, go_on, made = threading.Event(), threading.Event(), []

    def scan(shard: int) -> None:
        made.append((shard, threading.current_thread()))
        begun.set()
        assert go_on.wait(WAIT)

    ahead = ScansAhead(scan)
    ahead.start()
    ahead.refused(0)
    ahead.refused(1)
    assert begun.wait(WAIT)
    closing = threading.Thread(target=ahead.close)
    closing.start()
    while not ahead._closed:
        pass
    go_on.set()
    closing.join(WAIT)
    assert not closing.is_alive()
    [(shard, thread)] = made
    assert shard == 0
    assert not thread.is_alive()
    ahead.close()
    ahead.start()  # too late
    ahead.refused(2)
    assert len(made) == 1


def test_what_goes_wrong_in_one_shard_keeps_no_other_from_being_scanned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scans = Scans(monkeypatch, ValueError("damage"))
    scans.ahead.refused(1)
    scans.ahead.refused(2)
    scans.ahead.start()
    assert scans.settle() == [1, 2]
    scans.clock.now += MOST_SECONDS
    scans.ahead.refused(1)
    assert scans.settle() == [1]
    scans.ahead.close()


def _ends(ahead: ScansAhead) -> bool:
    thread = ahead._thread._first["it"]
    assert thread is not None
    thread.join(WAIT)
    return not thread.is_alive()


def test_its_thread_ends_although_it_closes_it_itself() -> None:
    """As where a garbage collection in the middle of a scan finds a dropped service."""
    ahead = ScansAhead(lambda _: ahead.close())
    ahead.start()
    ahead.refused(0)
    assert _ends(ahead)


def test_its_thread_ends_after_a_scan_that_nobody_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scans_ahead, "LOCK_TIMEOUT_SECONDS", 0)
    begun, go_on = threading.Event(), threading.Event()

    def slow(_: int) -> None:
        begun.set()
        go_on.wait(WAIT)

    ahead = ScansAhead(slow)
    ahead.start()
    ahead.refused(0)
    assert begun.wait(WAIT)
    ahead.close()
    go_on.set()
    assert _ends(ahead)
