"""Members of a store whose `owners` file is removed or replaced: none takes himself to be alone."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from light_mem import StoreBusyError, WorkerStartError, maintenance
from light_mem.engine.base import Outcome
from light_mem.engine.local import LocalStorageEngine
from light_mem.index import members
from light_mem.index.locks import RangeLock
from light_mem.index.owners import Owners
from tests.children import child, line
from tests.conftest import wait_until
from tests.engine_helpers import Block, Rig, let_go, open_local
from tests.service_rig import WAIT, rig

SLOTS = 8
MEMBER = (
    "from light_mem.index.owners import Owners\n"
    "owners = Owners(path)\n"
    "owners.join('server')\n"
    "say('joined')\n"
)


def remove(owners: Path) -> None:
    owners.unlink()


def replace(owners: Path) -> None:
    """As a backup that is restored does."""
    shutil.copy(owners, owners.with_name("copy"))
    owners.with_name("copy").rename(owners)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "_DYING_SECONDS", 0.05)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.mark.parametrize("lose", [remove, replace])
def test_a_store_whose_owners_are_lost_is_not_opened_under_its_members(
    store: Path, lose: Callable[[Path], None]
) -> None:
    one = Rig(open_local(store, SLOTS))
    one.write(*map(Block, range(SLOTS)))
    data = store / "shard-000.data"
    size = data.stat().st_size
    lose(store / "owners")
    before = sorted(path.name for path in store.iterdir())
    for slots in (SLOTS, SLOTS // 2):  # half of it would be cut
        with pytest.raises(StoreBusyError, match="owners was removed or replaced"):
            open_local(store, slots)
    for kind in ("worker", "client"):
        with pytest.raises(StoreBusyError, match="owners was removed or replaced"):
            LocalStorageEngine(store, kind=kind)
    assert sorted(path.name for path in store.iterdir()) == before
    assert data.stat().st_size == size
    assert one.read(*map(Block, range(SLOTS))) == [Outcome.LOADED] * SLOTS
    one.engine.close()
    two = Rig(open_local(store, SLOTS))
    assert two.read(*map(Block, range(SLOTS))) == [Outcome.LOADED] * SLOTS
    two.engine.close()


@pytest.mark.parametrize("lose", [remove, replace])
def test_tools_that_need_the_store_alone_do_not_have_it_then(
    store: Path, lose: Callable[[Path], None]
) -> None:
    engine = open_local(store, SLOTS, page_bytes=4096)
    lose(store / "owners")
    calls: list[Callable[[], object]] = [
        lambda: maintenance.rebuild(store),
        lambda: maintenance.rebuild(store, force=True),
        lambda: maintenance.resize(store, 1 << 20),
        lambda: maintenance.clear(store),
    ]
    for call in calls:
        with pytest.raises(StoreBusyError, match="owners was removed or replaced"):
            call()
    maintenance.inspect(store)
    engine.close()
    for call in calls:
        call()


def test_a_worker_is_not_replaced_beside_owners_that_were_made_anew(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        r.write(["a"], [0])
        (tmp_path / "store" / "owners").unlink()
        os.kill(r.service.worker_pids[0], signal.SIGKILL)
        wait_until(lambda: r.service._pool.failure)
        with pytest.raises(WorkerStartError, match="owners was removed or replaced"):
            r.service.create("w", ["b"], [0])
        assert not (tmp_path / "store" / "owners").exists()


def test_the_dead_and_their_forked_children_are_no_members(tmp_path: Path) -> None:
    code = (
        MEMBER + "if os.fork() == 0:\n"
        "    say('child')\n"
        "    sys.stdin.readline()\n"
        "    os._exit(0)\n"
        "time.sleep(60)\n"
    )
    with child(code, tmp_path) as process:
        assert [line(process), line(process)] == ["joined", "child"]
        (tmp_path / "owners").unlink()
        with pytest.raises(StoreBusyError):
            Owners(tmp_path)
        process.kill()
        process.wait()
        owners = Owners(tmp_path)
        assert not owners.others()
        owners.close()
        let_go(owners)


def test_who_leaves_is_no_member_any_more(tmp_path: Path) -> None:
    owners = Owners(tmp_path)
    me = owners.join("server")
    me.leave()
    (tmp_path / "owners").unlink()
    other = Owners(tmp_path)
    assert not other.others()
    for each in (owners, other):
        each.close()
    let_go(owners, other)


def test_who_dies_in_between_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a process that is killed one lock may go before the other."""
    monkeypatch.setattr(members, "_DYING_SECONDS", WAIT)
    with child(MEMBER + "sys.stdin.readline()\n", tmp_path) as process:
        assert line(process) == "joined"
        (tmp_path / "owners").unlink()
        looked: list[float] = []

        def sleep(seconds: float) -> None:
            looked.append(seconds)
            if len(looked) == 3:
                process.kill()
                process.wait()

        monkeypatch.setattr(members.time, "sleep", sleep)
        owners = Owners(tmp_path)
        assert len(looked) == 3
        owners.close()
        let_go(owners)


def test_a_file_system_without_locks_on_directories_has_the_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RangeLock.locked_by_another

    def refuse(lock: RangeLock, *_: int) -> None:
        raise OSError(22, "Invalid argument")

    def ask(lock: RangeLock, at: int, length: int = 1) -> bool:
        if os.path.isdir(lock.path):
            refuse(lock)
        return real(lock, at, length)

    monkeypatch.setattr(RangeLock, "share", refuse)
    monkeypatch.setattr(RangeLock, "locked_by_another", ask)
    one, other = Owners(tmp_path), Owners(tmp_path)
    me = one.join("server")
    assert other.others()
    assert other.join("server").number == 2
    me.leave()
    for each in (one, other):
        each.close()
    let_go(one, other)


def test_a_shared_lock_is_beside_others_and_seen_by_all(tmp_path: Path) -> None:
    locks = [RangeLock(tmp_path, os.open(tmp_path, os.O_RDONLY)) for _ in range(3)]
    one, two, three = locks
    one.share(5)
    two.share(5)
    assert three.locked_by_another(5)
    assert not three.locked_by_another(6)
    one.close()
    assert three.locked_by_another(5)
    assert not two.locked_by_another(0, 10)  # its own does not count
    two.unlock(5)
    assert not three.locked_by_another(0, 10)
    for lock in locks:
        lock.close()
