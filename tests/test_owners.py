"""Who has a store open: joining, leaving, dying, and being taken back from once."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from light_mem.engine.process import is_alive
from light_mem.errors import StoreBusyError
from light_mem.index import format as fmt
from light_mem.index.format import ShardSlot
from light_mem.index.owners import Owners, process_start, started_at
from tests.children import child, line
from tests.engine_helpers import let_go


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Owners, Owners]]:
    """The file as two processes would have it open."""
    pair = Owners(tmp_path), Owners(tmp_path)
    yield pair
    for owners in pair:
        owners.close()
    let_go(*pair)


Pair = tuple[Owners, Owners]
Reclaimed = list[tuple[int, list[ShardSlot]]]


def reclaimed(owners: Owners) -> Reclaimed:
    taken: Reclaimed = []
    count = owners.reclaim(lambda owner, intents: taken.append((owner, intents)) is None)
    assert count == len(taken)
    return taken


def test_an_owner_is_seen_by_others_until_it_leaves(pair: Pair) -> None:
    one, other = pair
    me = one.join("server")
    assert (me.number, one.others(), one.alive()) == (1, False, [])
    assert other.others()
    seen = other.alive()
    assert [(o.owner, o.pid, o.kind) for o in seen] == [(1, os.getpid(), "server")]
    assert abs(seen[0].started - psutil.Process().create_time()) < 1.5
    assert other.join("worker").number == 2
    assert reclaimed(other) == []
    me.leave()
    assert not other.others()
    assert reclaimed(other) == []
    assert one.join("client").number == 1


def test_the_intents_of_an_owner_are_those_it_named_last(pair: Pair) -> None:
    one, other = pair
    me = one.join("worker")
    me.announce(0, (0, 5))
    me.announce(1, (3, 2**31 - 3))
    me.announce(0, (7, 0))
    me.announce(fmt.MAX_INTENTS - 1, (1, 0))
    me.withdraw(0)
    assert reclaimed(other) == []
    one.locks.close()  # as when the process dies
    assert reclaimed(other) == [(1, [(3, 2**31 - 3), (1, 0)])]
    assert reclaimed(other) == []


def test_a_process_killed_with_sigkill_is_reclaimed_once(pair: Pair, tmp_path: Path) -> None:
    one, other = pair
    code = (
        "from light_mem.index.owners import Owners\n"
        "owners = Owners(path)\n"
        "owners.join('worker').announce(0, (2, 7))\n"
        "say('joined')\n"
        "time.sleep(60)\n"
    )
    with child(code, tmp_path) as process:
        assert line(process) == "joined"
        assert one.others()
        assert reclaimed(one) == []
        process.kill()
        process.wait()
        assert not one.others()
        assert one.join("server").number == 2  # the dead one's slots are not given back yet
        assert reclaimed(other) == [(1, [(2, 7)])]
        assert reclaimed(one) == []


def test_a_record_of_one_who_joins_and_dies_as_another_joins_is_not_overwritten(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes between the look at the record and the lock of its byte."""
    one, other = pair
    third, try_lock = Owners(tmp_path), one.locks.try_lock

    def late(number: int) -> bool:
        if number == 1:
            other.join("worker").announce(0, (2, 7))
            other.locks.close()  # as when the process dies
        return try_lock(number)

    with monkeypatch.context() as patch:
        patch.setattr(one.locks, "try_lock", late)
        assert one.join("server").number == 2
    assert [o.owner for o in third.alive()] == [2]  # no lock of its byte is left
    assert reclaimed(third) == [(1, [(2, 7)])]
    third.close()
    let_go(third)


def test_what_another_process_reclaims_at_the_same_time_is_taken_back_once(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes between the look at the records and the lock of this one's byte."""
    one, other = pair
    one.join("worker").announce(0, (2, 7))
    one.locks.close()
    third, try_lock = Owners(tmp_path), other.locks.try_lock
    taken: list[Reclaimed] = []

    def late(number: int) -> bool:
        taken.append(reclaimed(third))
        return try_lock(number)

    with monkeypatch.context() as patch:
        patch.setattr(other.locks, "try_lock", late)
        assert reclaimed(other) == []
    assert taken == [[(1, [(2, 7)])]]
    assert third.locks.try_lock(1)  # no lock of its byte is left
    third.close()
    let_go(third)


def test_threads_that_reclaim_at_once_take_back_once(pair: Pair) -> None:
    one, other = pair
    for number in range(1, 9):
        one.join("worker").announce(0, (0, number))
    one.locks.close()
    taken: list[int] = []
    second = threading.Event()

    def take_back(owner: int, _: list[ShardSlot]) -> bool:
        taken.append(owner)
        if len(taken) > 1:
            second.set()
        second.wait(0.2)  # long enough for another thread, were it let in
        return True

    def work() -> None:
        other.reclaim(take_back)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(1, 9))


def test_leaving_and_closing_in_the_middle_of_reclaiming_waits_for_its_end(
    pair: Pair, tmp_path: Path
) -> None:
    one, other = pair
    for number in range(1, 4):
        one.join("worker").announce(0, (0, number))
    one.locks.close()
    me = other.join("server")
    taken: list[int] = []

    def take_back(owner: int, _: list[ShardSlot]) -> bool:
        taken.append(owner)
        assert other.reclaim(take_back) == 0  # not in the middle of itself
        me.leave()
        other.close()
        assert not third.locks.try_lock(owner)  # the record is not another's before it is empty
        assert not third.records["pid"][me.number]
        return True

    third = Owners(tmp_path)
    try:
        assert other.reclaim(take_back) == 1
        assert taken == [1]
        assert third.locks.try_lock(1)  # all locks went with the file
        assert reclaimed(third) == [(2, [(0, 2)]), (3, [(0, 3)])]
    finally:
        third.close()
        let_go(third)


def test_a_membership_that_has_ended_is_not_ended_again(pair: Pair) -> None:
    one, other = pair
    me = one.join("server")
    me.leave()
    assert other.join("server").number == me.number
    me.leave()
    assert other.records["pid"][me.number] == os.getpid()


def test_what_could_not_be_taken_back_is_tried_again(pair: Pair) -> None:
    one, other = pair
    one.join("worker").announce(0, (0, 3))
    one.locks.close()

    def fail(*_: object) -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        other.reclaim(fail)
    assert other.reclaim(lambda *_: False) == 0  # not all of it
    assert reclaimed(other) == [(1, [(0, 3)])]


def test_a_full_house_is_a_clear_error(pair: Pair) -> None:
    one, other = pair
    one.records["pid"][1:] = 1
    for number in range(1, fmt.MAX_OWNERS):
        assert one.locks.try_lock(number)
    with pytest.raises(StoreBusyError) as caught:
        other.join("server")
    assert str(fmt.MAX_OWNERS - 1) in str(caught.value)


def test_the_file_is_made_whole_and_kept(tmp_path: Path) -> None:
    (tmp_path / "owners").write_bytes(b"")
    owners = Owners(tmp_path)
    path = tmp_path / "owners"
    assert path.stat().st_size == fmt.MAX_OWNERS * fmt.OWNER.itemsize
    inode = path.stat().st_ino
    assert not np.count_nonzero(owners.records["pid"])
    owners.close()
    Owners(tmp_path).close()
    assert path.stat().st_ino == inode


def test_the_start_of_a_process_is_its_identity() -> None:
    assert abs(started_at(os.getpid()) - psutil.Process().create_time()) < 1.5
    assert process_start(2**22 + 1) == started_at(2**22 + 1) == 0.0


def test_a_process_stays_who_it_is_when_the_clock_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux moves btime along (`getboottime64`), and with it what is counted from it."""
    started, read = process_start(os.getpid()), Path.read_bytes
    lines = read(Path("/proc/stat")).splitlines()
    boot = next(int(line.split()[1]) for line in lines if line.startswith(b"btime"))
    moved = [b"btime %d" % (boot + 60) if line.startswith(b"btime") else line for line in lines]
    stat = b"\n".join(moved)
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: stat if str(path) == "/proc/stat" else read(path)
    )
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 60)
    assert is_alive(os.getpid(), started)
    assert process_start(os.getpid()) == started
