"""`service.check()`: three outcomes; and the tools on a store that servers are using."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from light_mem import InvalidArgumentError, State, StoreDamagedError
from light_mem.engine.base import Outcome
from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.maintenance import (
    blocks,
    check,
    evict,
    export_store,
    import_store,
    inspect,
    rebuild,
    verify,
    verifying,
)
from light_mem.maintenance.repairing import Repair
from light_mem.maintenance.report import plain
from light_mem.maintenance.store import Store
from tests.children import ROOT, line
from tests.conftest import wait_until
from tests.maintenance_helpers import BLOCKS, flip, index_of, key_of, make_store, opened
from tests.service_rig import WAIT, Rig, rig

PAGE = 4096


def serving(tmp_path: Path) -> AbstractContextManager[Rig]:
    return rig(tmp_path, slots=160, shards=2, workers=2, pages=64)


def spoil_page(store: Path, name: str) -> str:
    """Damage the stored page of a hash; returns its key, "" when it is not stored any more."""
    low, high = keymath.as_key(name)
    shard = keymath.shard_of(keymath.mix_one(low, high), 2)
    with Store(store).held(shard):  # nobody evicts it, and gives its slot away, meanwhile
        found = next(blocks(store, [name]), None)
        if found is None:
            return ""
        with (store / f"shard-{found.shard:03}.data").open("r+b") as file:
            file.seek(fmt.SHARD_HEADER_BYTES + found.slot * PAGE + 17)
            file.write(b"damage")
    return found.key


# --- three outcomes -------------------------------------------------------------------------------


def test_a_sound_store_is_clean(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        assert served.service.check().blocks == 0
        served.write(["a", "b", "c"], [0, 1, 2])
        report = served.service.check()
        assert report.clean
        assert (report.blocks, report.nbytes) == (3, 3 * PAGE)
        client = served.service.client()
        assert client.check().blocks == 3
        client.close()


def test_damage_is_raised_and_named(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        served.write(["a", "b", "c"], [0, 1, 2])
        key = spoil_page(tmp_path / "store", "b")
        with pytest.raises(StoreDamagedError, match=key) as error:
            served.service.check()
        report = error.value.report  # type: ignore[attr-defined]
        assert [block.key for block in report.damaged] == [key]
        again = pickle.loads(pickle.dumps(error.value))
        assert again.report == report
        assert json.loads(json.dumps(plain(report)))["damaged"][0]["key"] == key
        assert served.service.stats()["blocks"] == 3  # nothing was changed


def test_damage_is_repaired_on_request(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        served.write(["a", "b", "c"], [0, 1, 2])
        key = spoil_page(tmp_path / "store", "b")
        report = served.service.check(repair=True)
        assert report.repaired == 1
        assert report.sound
        assert not report.clean
        assert [block.key for block in report.damaged] == [key]
        assert served.service.check().clean
        assert served.service.query(["a", "b", "c"]) == [True, False, True]
        assert inspect(tmp_path / "store").damaged == 1
        served.write(["b"], [5])
        served.read(["b"], [6])
        assert served.holds("b", [6])


def test_what_cannot_be_repaired_is_raised(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    other = make_store(tmp_path / "other")
    (store / "shard-001.slots").write_bytes((other / "shard-001.slots").read_bytes())
    for repair in (False, True):
        with pytest.raises(StoreDamagedError, match="another store"):
            check(store, repair)


def test_an_index_lost_under_a_server_is_damage_until_it_leaves(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        r.write(["a"], [0])
        (tmp_path / "store" / "index").rename(tmp_path / "index")
        with pytest.raises(StoreDamagedError, match="missing"):
            r.service.check(repair=True)
        assert r.service.query("a")
    report = check(tmp_path / "store", repair=True)
    assert report.repaired
    assert check(tmp_path / "store").blocks == 1


def test_hits_and_look_ups_are_counted_for_inspect(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        served.write(["a", "b"], [0, 1])
        assert served.service.query(["a", "b", "c"]) == [True, True, False]
        assert served.service.match_prefix(["a", "x", "b"]) == 1
        assert not served.service.query("nothing")
        report = inspect(tmp_path / "store")
        assert (report.lookups, report.hits) == (7, 3)


# --- a store in use -------------------------------------------------------------------------------


class Busy:
    """A server that writes and evicts all the time, in a thread."""

    def __init__(self, served: Rig) -> None:
        self._served = served
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.written = 0

    def _run(self) -> None:
        while not self._stop.is_set():
            names = [f"block {self.written + n}" for n in range(16)]
            self._served.service.create("write", names, list(range(16))).wait(WAIT)
            self.written += 16

    def __enter__(self) -> Busy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def test_a_store_in_use_gives_no_false_alarm(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        store = tmp_path / "store"
        changed = 0
        with Busy(served) as busy:
            for n in range(60):
                report = verify(store, jobs=1 + n % 3)
                assert report.clean, (report.damaged, report.findings)
                assert report.unfinished == ()
                changed += report.changed
                inspect(store)
                list(blocks(store))
            assert busy.written > 160, "the store never had to evict"
        assert served.service.stats()["evictions"] > 0
        assert served.service.check().clean


def test_a_busy_store_is_exported_whole_and_imported(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        target = make_store_for_pages(tmp_path / "target")
        with Busy(served) as busy:
            wait_until(lambda: busy.written > 0)
            for _ in range(10):
                report = export_store(tmp_path / "store", tmp_path / "x", overwrite=True)
                assert not report.damaged
                imported = import_store(target, tmp_path / "x")
                assert not imported.damaged
                assert not imported.problems
        assert check(target).blocks > 0


def make_store_for_pages(path: Path) -> Path:
    from tests.engine_helpers import open_local

    open_local(path, 4096, page_bytes=PAGE).close()
    return path


def test_a_busy_store_is_repaired_evicted_and_rebuilt_without_harm(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with serving(tmp_path) as served:
        repaired = read = 0
        with Busy(served) as busy:
            for n in range(300):
                if n >= 12 and repaired and read:  # where there is one core, most were evicted
                    break
                served.write([f"kept {n}", f"spoilt {n}"], [20, 21])
                key = spoil_page(store, f"spoilt {n}")
                report = verify(store, repair=True)
                assert report.remaining == ()
                assert {block.key for block in report.damaged} <= {key}  # or it was evicted
                repaired += report.repaired
                assert not served.service.query(f"spoilt {n}")
                evict(store, 0.05)
                rebuild(store, force=True)
                served.write([f"more {n}"], [22])
                if served.read([f"more {n}"], [30]).state() == [State.Finished]:
                    assert served.holds(f"more {n}", [30])
                    read += 1  # else it was evicted by the other thread
        assert busy.written
        assert repaired
        assert read
        assert served.service.check().clean


STOPPED = """
from light_mem.index.locks import PathLock
with PathLock(path / "shard-000.lock").hold():
    say("held")
    sys.stdin.read()
"""


def test_a_lock_that_is_never_let_go_is_said_and_not_waited_for_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from light_mem import cli
    from tests.children import child

    store = make_store(tmp_path / "store")
    (store / "shard-000.lock").touch()
    index_of(store).control["blocks"][0] += 1  # something that needs a second look
    held = Store.held
    monkeypatch.setattr(Store, "held", lambda self, shard: held(self, shard, timeout=0.1))
    with child(STOPPED, store) as process:
        assert line(process) == "held"
        assert cli.main(["verify", str(store)]) == 2
        assert "shard-000.lock" in capsys.readouterr().err
    assert cli.main(["verify", str(store)]) == 1


def test_the_tools_need_no_torch(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    flip(store, BLOCKS[0])
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from light_mem.maintenance import check\n"
        "print(check(sys.argv[1], repair=True).repaired)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(store)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "1"
    assert key_of(BLOCKS[0]) not in {b.key for b in blocks(store)}


def test_a_damaged_block_that_a_server_drops_first_is_put_right(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(store, BLOCKS[0])

    def after_a_read(directory: Path) -> Repair:
        server = opened(directory)
        assert server.read(BLOCKS[0]) == [Outcome.DAMAGED]
        server.engine.close()
        return Repair(directory)

    monkeypatch.setattr(verifying, "Repair", after_a_read)
    report = check(store, repair=True)
    assert (len(report.damaged), report.repaired, report.sound) == (1, 1, True)
    assert check(store).clean


def test_functions_of_the_tools_refuse_what_makes_no_sense(store: Path, exported: Path) -> None:
    new = store.parent / "new"
    before = sorted(store.parent.iterdir())
    for call, named in (
        (lambda: blocks(store, "prefix"), "one str"),  # not six hashes of a letter each
        (lambda: export_store(store, new, "prefix"), "one str"),
        (lambda: export_store(store, new, 1000), "one int"),
        (lambda: import_store(new, exported, storage_size="1G"), "storage_size"),
        (lambda: import_store(new, exported, storage_size=2.0**20), "storage_size"),
        (lambda: import_store(new, exported, storage_size=1 << 20, shards=0), "shards"),
        (lambda: import_store(new, exported, storage_size=1 << 20, shards="2"), "shards"),
        (lambda: check(store, repair="no"), "repair"),
    ):
        with pytest.raises(InvalidArgumentError, match=named):
            call()  # type: ignore[no-untyped-call]
    assert sorted(store.parent.iterdir()) == before
