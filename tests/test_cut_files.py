"""Shard files that somebody cuts short while a store is open: what they lose is a miss, the rest
goes on, and no server dies of it."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from light_mem import CacheTask, State
from light_mem.engine.base import Outcome
from light_mem.errors import StoreFullError
from tests.children import child, line
from tests.conftest import wait_until
from tests.engine_helpers import COPIED_AND_STORED, Block, Rig, open_local
from tests.service_rig import WAIT, rig

PAGES = 8
PAGE = 4096  # bytes, of the service's tensor
DATA = "shard-000.data"


@pytest.mark.parametrize("name", ["shard-000.data", "shard-000.slots"])
def test_a_file_cut_short_in_an_open_store_is_made_whole_by_who_maps_it(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = open_local(tmp_path / "store", PAGES)
    Rig(engine).write(Block(1), Block(2))
    engine.close()
    engine = open_local(tmp_path / "store", PAGES)
    whole = (tmp_path / "store" / name).stat().st_size
    os.truncate(tmp_path / "store" / name, 4600)
    rig = Rig(engine)
    assert rig.read(Block(1), Block(2)) == [Outcome.LOADED] * 2
    assert (tmp_path / "store" / name).stat().st_size == whole
    assert f"{name} was cut short, from {whole} to 4600 bytes" in caplog.text
    assert rig.write(Block(3), Block(4)) == [COPIED_AND_STORED] * 2
    assert engine.clear() == 4
    engine.close()


def test_a_file_cut_short_for_which_there_is_no_room_is_a_failure_and_no_bus_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    open_local(tmp_path / "store", PAGES).close()
    engine = open_local(tmp_path / "store", PAGES)
    os.truncate(tmp_path / "store" / "shard-000.data", 4600)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refuse)
        rig = Rig(engine)
        assert rig.write(Block(1), Block(2)) == [(Outcome.FAILED,)] * 2
        assert "shard-000.data needs" in caplog.text
        with pytest.raises(StoreFullError):
            engine.clear()
    assert rig.write(Block(1), Block(2)) == [COPIED_AND_STORED] * 2
    engine.close()


def test_who_finds_no_room_takes_none_from_those_who_have_lengthened_it_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_local(tmp_path / "store", PAGES).close()
    first, second = (Rig(open_local(tmp_path / "store", PAGES)) for _ in range(2))
    assert first.write(Block(1)) == [COPIED_AND_STORED]
    os.truncate(tmp_path / "store" / DATA, 4096)

    def refuse(*_: object) -> None:
        assert first.write(Block(2), Block(3)) == [COPIED_AND_STORED] * 2
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(StoreFullError):
            second.engine.file(0)  # type: ignore[attr-defined]
    assert first.read(Block(2), Block(3)) == [Outcome.LOADED] * 2
    for each in (first, second):
        each.engine.close()


@pytest.mark.parametrize("mapped", [True, False])
def test_workers_drop_what_a_cut_file_has_lost_and_serve_the_rest(
    tmp_path: Path, mapped: bool
) -> None:
    """Of the third block, as of each, the middle is in the page cache, and its last page is gone:
    SIGBUS for the worker that has it mapped."""
    hashes = list(range(5))
    pages = {n: list(range(4 * n, 4 * n + 4)) for n in hashes}
    regions = [[(4 * n * PAGE, 4 * PAGE)] for n in hashes]
    with rig(tmp_path, small_read_bytes=0, small_write_bytes=0) as r:

        def write() -> CacheTask:
            for n in hashes:
                r.fill(n, pages[n])
            task = r.service.create_regions("write", hashes, regions)
            assert task.wait(WAIT)
            return task

        def read() -> CacheTask:
            r.blank(range(20))
            task = r.service.create_regions("read", hashes, regions)
            assert task.wait(WAIT)
            assert all(r.holds(n, pages[n]) for n in hashes if task.state()[n] is State.Finished)
            return task

        assert write().state() == [State.Finished] * 5
        if not mapped:
            (worker,) = r.service.worker_pids
            os.kill(worker, signal.SIGKILL)
            wait_until(lambda: r.service.worker_pids not in ([], [worker]))
        else:
            read()
        restarts = r.service.stats()["restarts"]
        os.truncate(tmp_path / "store" / DATA, 4096 + 11 * PAGE)
        assert read().state() == [State.Finished] * 2 + [State.Aborted] * 3
        assert r.service.query(hashes) == [True, True, False, False, False]
        assert r.service.stats()["damaged"] == 3
        assert r.service.stats()["restarts"] - restarts <= mapped
        assert write().state() == [State.Finished] * 5
        assert read().state() == [State.Finished] * 5


CUT_AND_VIEW = """
import light_mem
kv = light_mem.allocate_kvcache(16, 4096)
service = light_mem.LocalCacheService(path / "store", 64 * 4096, 1, kv, 1, verify=VERIFY)
service.run()
for n in range(3):
    kv[:4] = n + 1
    assert service.create_regions("write", [n], [[(0, 4 * 4096)]]).wait(20)
if MAPPED:
    service.view(0).close()
os.truncate(path / "store" / "shard-000.data", 4096 + 11 * 4096)
views = [service.view(n) for n in range(3)]
say([view is not None and bool((view.tensor == n + 1).all()) for n, view in enumerate(views)])
say(service.query([0, 1, 2]))
say(service._engine.stats()["damaged"])
for view in views:
    if view is not None: view.close()
service.close()
say("closed")
"""


@pytest.mark.parametrize(("verify", "mapped"), [(True, True), (True, False), (False, True)])
def test_a_view_of_what_a_cut_file_has_lost_is_a_miss_and_ends_no_server(
    tmp_path: Path, verify: bool, mapped: bool
) -> None:
    code = CUT_AND_VIEW.replace("VERIFY", str(verify)).replace("MAPPED", str(mapped))
    with child(code, tmp_path) as process:
        assert line(process) == "[True, True, False]"
        assert line(process) == "[True, True, False]"
        assert line(process) == "1"
        assert line(process) == "closed"
