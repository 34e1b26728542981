"""Views: a block in place, left alone by eviction, for as long as its viewer lives."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import light_mem
from light_mem import BlockView, LeaseLimitError, ServiceClosedError, maintenance
from light_mem.engine import keeping, writing
from light_mem.engine.base import Outcome
from light_mem.engine.keeping import Leased
from light_mem.errors import LockTimeoutError
from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.index.locks import PathLock, lock_path
from tests.children import child, line
from tests.conftest import wait_until
from tests.deaths import interleave
from tests.engine_helpers import Block, assert_consistent, let_go
from tests.payload import block_bytes_of
from tests.retention_helpers import Store
from tests.service_rig import Rig, rig

A, B, C, D = (Block(key, 2) for key in range(1, 5))


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Store, Store]]:
    """Two processes' engines on a full store of A to D, used in this order."""
    two = Store(tmp_path / "store", 8), Store(tmp_path / "store", 8)
    two[0].write(A, B, C, D)
    yield two
    for store in two:
        store.close()
    assert maintenance.verify(tmp_path / "store").clean


Two = tuple[Store, Store]


def lease(store: Store, block: Block) -> Leased:
    found = store.engine.lease(*keymath.as_key(block.key))
    assert found is not None
    return found


def holds(store: Store, leased: Leased, block: Block) -> bool:
    """Whether the slots of a lease are the bytes of its block."""
    [(start, length)] = leased.runs
    found = store.engine.file(0).read_only(start, length)
    return bool(np.array_equal(found, block_bytes_of(block.key, block.pages, 64).reshape(-1)))


def test_eviction_passes_leased_blocks_over(two: Two) -> None:
    viewer, writer = two
    leased = lease(viewer, A)
    viewer.rig.find(B, C, D, touch=True)  # A is the oldest
    assert writer.write(Block(5, 2), Block(6, 2)) == ["STORED"] * 2
    assert writer.stored(A, B, C, D) == [1, 4]
    assert holds(viewer, leased, A)
    viewer.engine.end_lease(leased)
    assert writer.write(Block(7, 4)) == ["STORED"]  # its end counted as a use
    assert writer.stored(A, D, Block(5), Block(6), Block(7)) == [1, 6, 7]
    writer.write(Block(8, 4))
    assert A.key not in writer.stored(A)


@pytest.mark.parametrize("how", ["delete", "clear", "replace", "damage"])
def test_a_block_taken_out_under_a_lease_keeps_its_slots_until_the_last_one_ends(
    two: Two, how: str
) -> None:
    viewer, other = two
    first, second, third = lease(viewer, A), lease(viewer, A), lease(other, A)
    if how == "delete":
        assert other.rig.delete(A) == 1
    elif how == "clear":
        assert other.engine.clear() == 4
    elif how == "replace":
        other.rig.delete(D)
        assert other.write(Block(A.key, 1)) == ["STORED"]
        assert other.rig.delete(Block(A.key)) == 1
    else:
        low, high = keymath.as_key(A.key)
        entry = other.engine.lookup.find_one(low, high)
        other.engine.drop_damaged(0, first.slot, other.engine.lookup.tag(entry), low, high)
    assert other.stored(A) == []
    assert other.states()[fmt.HELD - 1] == 1
    assert_consistent(other.engine._index)
    blocks = [Block(key) for key in range(20, 40)]
    other.write(*blocks)
    assert len(other.stored(*blocks)) == 6  # all the room but that of A
    for leased in (first, third):
        assert holds(viewer, leased, A)
        (viewer if leased is first else other).engine.end_lease(leased)
        assert other.states()[fmt.HELD - 1] == 1
    viewer.engine.end_lease(second)
    assert other.states()[fmt.HELD - 1] == 0
    assert other.engine.free_slots(0) == 2
    other.write(A)
    assert other.rig.read(A) == [Outcome.LOADED]


def test_a_block_deleted_under_a_lease_can_be_written_and_viewed_again(two: Two) -> None:
    viewer, other = two
    old = lease(viewer, A)
    other.rig.delete(A, D)
    assert other.write(A) == ["STORED"]
    new = lease(viewer, A)
    assert old.slot != new.slot
    assert holds(viewer, old, A)
    assert holds(viewer, new, A)
    viewer.engine.end_lease(old)
    assert other.states()[fmt.HELD - 1] == 0
    assert other.stored(A) == [1]
    viewer.engine.end_lease(new)


@pytest.mark.parametrize("spoil", ["nothing", "entries"])
def test_a_forced_rebuild_leaves_what_is_held(two: Two, tmp_path: Path, spoil: str) -> None:
    viewer, other = two
    gone, stays = lease(viewer, A), lease(viewer, C)
    other.rig.delete(A)
    if spoil == "entries":  # the records say where the others lie
        slots = [n for n in range(8) if n not in (gone.slot, gone.slot + 1)]
        other.engine._index.entries["low"][slots] += np.uint64(1000)
    maintenance.rebuild(tmp_path / "store", force=True)
    assert other.stored(A, B, C, D) == [2, 3, 4] or spoil == "entries"
    for leased, block in ((gone, A), (stays, C)):
        other.write(Block(7, 2), Block(8, 2), Block(9, 2))
        assert holds(viewer, leased, block)
        viewer.engine.end_lease(leased)
    assert other.states()[fmt.HELD - 1] == 0
    assert_consistent(other.engine._index)


def test_half_of_a_shard_may_be_leased_and_each_block_counts_once(two: Two) -> None:
    viewer, other = two
    open_now = [(viewer, lease(viewer, A)), (viewer, lease(viewer, A)), (other, lease(other, A))]
    open_now.append((other, lease(other, B)))
    with pytest.raises(LeaseLimitError) as caught:
        viewer.engine.lease(*keymath.as_key(C.key))
    error = caught.value
    assert (error.shard, error.leased, error.needed, error.limit) == (0, 4, 2, 4)  # type: ignore[attr-defined]
    assert int(viewer.engine._index.control["dirty"][0]) == 0
    for store, leased in open_now:
        store.engine.end_lease(leased)
    viewer.engine.end_lease(lease(viewer, C))


def test_a_process_has_room_for_so_many_leases(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", 4 * fmt.MAX_LEASES)
    blocks = [Block(key) for key in range(fmt.MAX_LEASES + 1)]
    store.write(*blocks)
    leased = [lease(store, block) for block in blocks[:-1]]
    leased.append(lease(store, blocks[0]))  # once more on one block takes no room
    with pytest.raises(LeaseLimitError) as caught:
        store.engine.lease(*keymath.as_key(blocks[-1].key))
    assert caught.value.shard == -1  # type: ignore[attr-defined]
    for each in leased:
        store.engine.end_lease(each)
    store.engine.end_lease(lease(store, blocks[-1]))
    store.close()


def test_a_shard_without_leases_is_not_looked_at_for_them(two: Two) -> None:
    viewer, writer = two
    asked = 0
    real = writer.engine.leases.of_shard

    def counted(*args: int, **more: int) -> set[int]:
        nonlocal asked
        asked += 1
        return real(*args, **more)

    writer.engine._open._indexes.clear()  # made anew below, over what counts
    writer.engine.leases.of_shard = counted  # type: ignore[method-assign]
    writer.write(Block(5))
    assert asked == 0
    viewer.engine.end_lease(lease(viewer, D))
    writer.write(Block(6), Block(7))
    assert asked == 1  # found none, and says so in the control page
    writer.write(Block(8), Block(9))
    assert asked == 1
    del writer.engine.leases.of_shard


def test_a_damaged_block_is_no_view_and_is_dropped(two: Two) -> None:
    viewer, _ = two
    low, high = keymath.as_key(A.key)
    slot = viewer.engine.lookup.find_one(low, high)
    viewer.engine.file(0).bytes(slot, 1)[5] ^= 1
    assert viewer.engine.lease(low, high) is None
    assert viewer.stored(A) == []
    assert viewer.engine.stats()["damaged"] == 1
    assert viewer.states()[fmt.HELD - 1] == 0
    assert viewer.engine.leases.open == 0


def test_a_lease_whose_shard_is_not_to_be_had_ends_later(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    viewer, other = two
    leased = lease(viewer, A)
    other.rig.delete(A)

    def busy(*_: object, **__: object) -> None:
        raise LockTimeoutError("busy")

    with monkeypatch.context() as patch:
        patch.setattr(viewer.engine, "change", busy)
        viewer.engine.end_lease(leased)
    assert viewer.engine.leases.open == 1
    assert holds(viewer, leased, A)
    viewer.engine.end_lease(lease(viewer, B))
    assert viewer.engine.leases.open == 0
    assert other.states()[fmt.HELD - 1] == 0


def test_a_process_that_leaves_with_a_lease_it_cannot_end_leaves_as_the_dead_do(
    tmp_path: Path,
) -> None:
    viewer, other = Store(tmp_path / "store", 8), Store(tmp_path / "store", 8)
    viewer.write(A, B)
    leased = lease(viewer, A)
    other.rig.delete(A)
    lock = PathLock(lock_path(tmp_path / "store", "shard-000"))
    with lock.hold(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeping, "LOCK_TIMEOUT_SECONDS", 0)
        viewer.engine.end_lease(leased)
        viewer.engine.close()
    viewer.close()
    assert other.states()[fmt.HELD - 1] == 1
    assert other.engine.reclaim() == 1
    assert other.states()[fmt.HELD - 1] == 0
    other.close()


@pytest.mark.parametrize("change", ["evict", "delete and write", "view as well"])
def test_a_lease_is_of_the_right_bytes_whatever_happens_while_it_is_taken(
    two: Two, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process acts after each opcode of taking, and of ending, a lease; not while the
    shard is locked, when it would have to wait."""
    monkeypatch.setattr(writing, "ROOM_SECONDS", 0.01)  # a write beside leased blocks finds none
    viewer, other = two
    lock = PathLock(lock_path(viewer.engine.directory, "shard-000"))
    fresh, count = Block(9, 8), 0

    def act() -> None:
        nonlocal count
        try:
            with lock.hold(timeout=0):
                pass
        except LockTimeoutError:
            return
        count += 1
        if change == "evict":
            other.write(fresh)
        elif change == "delete and write":
            other.rig.delete(A)
            other.write(Block(7), Block(8), A)
        else:
            leased = other.engine.lease(*keymath.as_key(A.key))
            if leased is not None:
                other.engine.end_lease(leased)

    def take_and_end() -> bool:
        leased = viewer.engine.lease(*keymath.as_key(A.key))
        if leased is None:
            return False
        good = holds(viewer, leased, A)
        viewer.engine.end_lease(leased)
        assert good
        return True

    at, reached, results = 1, True, []
    while reached:
        other.engine.clear()
        other.write(A, B, C, D)
        result, reached = interleave(take_and_end, act, at)
        results.append(result)
        assert viewer.engine.leases.open == other.engine.leases.open == 0
        assert other.states()[fmt.HELD - 1] == 0
        assert_consistent(other.engine._index)
        at += 9
    assert count > 10
    assert True in results
    assert (False in results) == (change == "evict")


VIEWER = """
from light_mem.engine.local import LocalStorageEngine
from light_mem.index import keys as keymath
engine = LocalStorageEngine(path / "store", kind="client")
leased = [engine.lease(*keymath.as_key(key)) for key in (1, 2)]
say('leased')
time.sleep(60)
"""


def test_the_blocks_of_a_leaseholder_killed_with_sigkill_can_be_evicted(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", 8)
    store.write(A, B, C, D)
    with child(VIEWER, tmp_path) as process:
        assert line(process) == "leased"
        store.rig.find(C, D, touch=True)
        assert store.write(Block(5, 4)) == ["STORED"]
        assert store.stored(A, B, C, D) == [1, 2]
        store.rig.delete(B)
        assert store.states()[fmt.HELD - 1] == 1
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert store.write(Block(6, 2)) == ["STORED"]
    assert store.stored(A, Block(5), Block(6)) == [5, 6]  # A went at once, B's slots not yet
    assert store.write(Block(7, 8)) == ["STORED"]  # for want of room the dead are reclaimed
    assert store.states() == [0, 1, 0, 0]
    store.close()
    assert maintenance.verify(tmp_path / "store").clean


# --- the service's --------------------------------------------------------------------------------


def equals(tensor: torch.Tensor, key: object, pages: int) -> bool:
    return bool(np.array_equal(tensor.numpy(), block_bytes_of(key, pages, int(tensor.shape[-1]))))


def write_block(r: Rig, key: object, pages: int) -> None:
    """One block of several pages: the service must have larger blocks than this."""
    where = list(range(pages))
    r.fill(key, where)
    assert r.service.create("write", [key], where).wait(20)


def permissions(address: int) -> str:
    for row in Path("/proc/self/maps").read_text().splitlines():
        span, mode, *_ = row.split()
        first, end = (int(part, 16) for part in span.split("-"))
        if first <= address < end:
            return mode
    raise AssertionError("not mapped")


def test_a_view_is_the_block_in_place_and_read_only(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        write_block(r, "a", 3)
        assert r.service.view("nothing") is None
        with r.service.view("a") as view:  # type: ignore[union-attr]
            assert isinstance(view, BlockView)
            tensor = view.tensor
            assert (tensor.dtype, tuple(tensor.shape)) == (torch.uint8, (3, 4096))
            assert equals(tensor, "a", 3)
            assert not view.copied
            assert permissions(tensor.data_ptr()) == "r--s"
            data = tmp_path / "store" / "shard-000.data"
            with data.open("r+b") as file:  # in place: what changes there shows here
                file.seek(4096 + 7)
                file.write(b"\x5a")
            assert tensor[0, 7] == 0x5A
        with pytest.raises(ServiceClosedError):
            view.tensor  # noqa: B018
        view.close()
        del tensor, view


def test_a_view_of_a_client_protects_its_block_from_the_workers(tmp_path: Path) -> None:
    with rig(tmp_path, slots=64) as r:
        r.write(["a"], [0])
        client = r.service.client()
        view = client.view("a")
        assert view is not None
        for n in range(5):
            r.write([f"{n}-{page}" for page in range(32)], range(32))
        assert r.service.stats()["evictions"] == 160 - 63
        assert equals(view.tensor, "a", 1)
        assert r.service.query("a")
        view.close()
        client.close()
        del view, client


def test_a_block_in_several_runs_is_a_copy_without_a_lease(tmp_path: Path) -> None:
    with rig(tmp_path, slots=64, pages=64) as r:
        r.write(list(range(60)), list(range(60)))
        assert r.service.delete(list(range(0, 60, 2))) == 30
        write_block(r, "long", 6)
        view = r.service.view("long")
        assert view is not None
        assert view.copied
        assert equals(view.tensor, "long", 6)
        assert r.service._engine.leases.open == 0
        r.service.clear()
        assert equals(view.tensor, "long", 6)
        view.close()
        assert r.service.stats()["used_slots"] == 0
        del view


def test_a_block_that_fills_no_whole_page_is_one_row_of_bytes(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        r.fill("odd", [0, 1])
        assert r.service.create_regions("write", ["odd"], [(100, 5000)]).wait(20)
        with r.service.view("odd") as view:  # type: ignore[union-attr]
            wanted = block_bytes_of("odd", 2, 4096).reshape(-1)[100:5100]
            assert np.array_equal(view.tensor.numpy(), wanted)
        del view


def test_a_tensor_keeps_the_lease_of_a_view_that_nobody_closed(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        r.write(["a", "b"], [0, 1])
        leases = r.service._engine.leases
        view = r.service.view("a")
        assert view is not None
        tensor = view.tensor[:, :100]
        del view
        gc.collect()
        assert (leases.open, len(leases.dropped)) == (1, 0)
        r.service.delete("a")
        assert r.service.stats()["used_slots"] == 2
        wanted = block_bytes_of("a", 1, 4096)[:, :100]
        assert np.array_equal(tensor.numpy(), wanted)
        del tensor
        gc.collect()
        assert (leases.open, len(leases.dropped)) == (1, 1)  # ended by whoever comes next
        assert r.service.view("a") is None
        assert leases.open == 0
        assert r.service.stats()["used_slots"] == 1


def test_a_view_outlives_its_closed_service(tmp_path: Path) -> None:
    with rig(tmp_path, slots=64) as r:
        r.write(["a", "b"], [0, 1])
        view, other = r.service.view("a"), r.service.view("b")
        assert view is not None
        assert other is not None
    with pytest.raises(ServiceClosedError):
        r.service.view("a")
    with rig(tmp_path, slots=64) as second:
        assert second.service.delete("a") == 1
        for n in range(4):
            second.write([f"{n}-{page}" for page in range(32)], range(32))
        assert equals(view.tensor, "a", 1)
        assert equals(other.tensor, "b", 1)
        view.close()
        assert second.service.stats()["used_slots"] == 63
        assert len(second.service._engine.owners()) == 2  # its worker, and the view's engine
        del other  # as when it is forgotten
        gc.collect()
        wait_until(lambda r=second: len(r.service._engine.owners()) == 1)  # a thread leaves
    del view, r, second


def test_a_forked_child_leaves_its_parents_lease_alone(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        r.write(["a"], [0])
        view = r.service.view("a")
        assert view is not None
        tensor = view.tensor
        pid = os.fork()
        if not pid:
            good = equals(tensor, "a", 1)
            view.close()
            os._exit(0 if good else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert r.service._engine.leases.open == 1
        r.service.delete("a")
        assert r.service.stats()["used_slots"] == 1
        view.close()
        assert r.service.stats()["used_slots"] == 0
        del view, tensor


def test_a_write_through_a_view_ends_the_process_and_harms_nobody(tmp_path: Path) -> None:
    code = (
        "import torch, light_mem\n"
        "kv = light_mem.allocate_kvcache(2, 4096)\n"
        "service = light_mem.LocalCacheService(path / 'store', 64 * 4096, 1, kv, 1)\n"
        "service.run()\n"
        "assert service.create('w', ['a'], [0]).wait(20)\n"
        "view = service.view('a')\n"
        "say(int(view.tensor.sum()))\n"
        "view.tensor[0, 0] = 1\n"
        "say('written')\n"
    )
    with child(code, tmp_path) as process:
        assert line(process) == "0"
        assert process.wait() == -signal.SIGSEGV
    assert maintenance.verify(tmp_path / "store").clean


def test_a_hash_that_is_none_raises(tmp_path: Path) -> None:
    with rig(tmp_path, run=False) as r, pytest.raises(light_mem.InvalidArgumentError):
        r.service.view(["a", "b"])  # type: ignore[arg-type]
    let_go(r)
