"""What `close` does with what is queued, and what tells who asks at the wrong time."""

from __future__ import annotations

import pickle
import threading
from contextlib import closing
from pathlib import Path

import pytest

import light_mem
from light_mem import InvalidArgumentError, ServiceClosedError, State
from light_mem.engine.local import LocalStorageEngine
from tests.service_rig import WAIT, rig

KEYS = list(range(200))


def test_what_is_queued_is_stored_before_a_close_that_drains(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with rig(tmp_path, pages=256, small_write_bytes=0) as r:
        with r.service._engine.change(0):  # no block can be given room meanwhile
            tasks = [r.service.create("write", [key], [key]) for key in KEYS]
            closer = threading.Thread(target=r.service.close, kwargs={"drain": WAIT})
            closer.start()
            while not r.service._closed:
                pass
            with pytest.raises(ServiceClosedError):
                r.service.create("write", ["late"], [0])
            assert closer.is_alive()
        closer.join(WAIT)
        assert all(task.state() == [State.Finished] for task in tasks)
    assert "not stored" not in caplog.text
    with rig(tmp_path, run=False) as r:
        assert all(r.service.query(KEYS))


@pytest.mark.parametrize("drain", [0.0, 0.05])
def test_what_a_close_leaves_unwritten_is_counted_in_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, drain: float
) -> None:
    with rig(tmp_path, pages=256, run=False) as r:
        tasks = [r.service.create("write", [key], [key]) for key in KEYS]
        reads = r.service.create("read", KEYS, KEYS)
        r.service.close(drain)  # nobody is there to do them: it does not wait
    assert all(task.state() == [State.Aborted] for task in tasks)
    assert reads.ready()
    assert "200 blocks that waited to be written are not stored: the service is closed" in (
        caplog.text
    )


def test_a_close_that_drains_ends_in_time(tmp_path: Path) -> None:
    with rig(tmp_path, small_write_bytes=0) as r:
        held = threading.Event()
        with closing(LocalStorageEngine(tmp_path / "store", kind="test")) as other, other.change(0):
            task = r.service.create("write", ["a"], [0])
            waiting = threading.Thread(target=lambda: (r.service.close(drain=0.1), held.set()))
            waiting.start()
            assert not task.ready()
        assert held.wait(WAIT)
        waiting.join()
    with pytest.raises(InvalidArgumentError, match="drain"):
        r.service.close(drain=-1)


def test_after_the_workers_were_ended_it_says_what_is_left(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        r.write(["a"], [0])
        r.service.end_workers()
        for call in (lambda: r.service.query("a"), lambda: r.service.create("r", ["a"], [1])):
            with pytest.raises(ServiceClosedError, match="delete, stats, check"):
                call()
        assert r.service.delete("a") == 1
        assert r.service.check().clean


def test_a_service_says_what_it_is_and_does_not_leave_its_process(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        assert repr(r.service) == f"<LocalCacheService {str(tmp_path / 'store')!r}, 1 workers>"
        with pytest.raises(InvalidArgumentError, match="hand service"):
            pickle.dumps(r.service)
    assert repr(r.service).endswith("closed>")


def test_a_prefix_of_blocks_of_another_length_is_none(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        three = r.service.create("write", ["a"], [0, 1, 2])
        one = r.service.create("write", ["b"], [3])
        assert three.wait(WAIT)
        assert one.wait(WAIT)
        assert r.service.match_prefix(["a", "b", "c"]) == 2
        assert r.service.match_prefix(["a", "b", "c"], pages=[3, 1, 1]) == 2
        assert r.service.match_prefix(["a", "b"], pages=[3, 2]) == 1
        assert r.service.match_prefix(["a", "b"], pages=[2, 1]) == 0
        for hashes, pages in (("a", [1, 2]), ("a", [[1, 2]]), ("ab", [[1], [1, 2]])):
            with pytest.raises(InvalidArgumentError, match="pages"):
                r.service.match_prefix(list(hashes), pages=pages)  # type: ignore[arg-type]


def test_a_block_of_another_length_is_not_found_by_who_asks_for_it_alone(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        assert r.service.create("write", ["a"], [0, 1, 2]).wait(WAIT)
        asked = [r.service.query("a", pages=[n]) for n in (1, 2, 3, 4)]
        assert asked == [False, False, True, False]
        assert r.service.query("a") is True
        assert r.service.stats()["hits"] == 2
        for pages in (3, [3, 3], [], [3.0]):
            with pytest.raises(InvalidArgumentError, match="pages"):
                r.service.query("a", pages=pages)  # type: ignore[arg-type]


def test_the_finished_prefix_of_a_read_ends_at_the_first_that_is_not_there(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        r.write(["a", "b", "d"], [0, 1, 3])
        task = r.service.create("read", ["a", "b", "c", "d"], [4, 5, 6, 7])
        assert task.wait(WAIT)
        assert task.finished_prefix() == 2
        assert r.service.create("read", ["x"], [8]).finished_prefix() == 0
        assert r.service.create("read", ["b", "a"], [8, 9]).wait(WAIT)


@pytest.mark.parametrize(
    "call",
    [
        lambda s, t: t.wait("1"),
        lambda s, t: t.count("Finished"),
        lambda s, t: s.wait_ready("mark", 0.1),
        lambda s, t: s.wait_ready(-1, 0.1),
        lambda s, t: s.count_dropped(-1),
        lambda s, t: s.count_dropped(1.5),
        lambda s, t: light_mem.allocate_kvcache(True, 4),
    ],
)
def test_wrong_arguments_of_small_calls_are_errors_of_ours(tmp_path: Path, call: object) -> None:
    with rig(tmp_path, run=False) as r:
        task = r.service.create("write", ["a"], [0])
        with pytest.raises(InvalidArgumentError):
            call(r.service, task)  # type: ignore[operator]
        assert r.service.stats()["dropped_stores"] == 0
