"""Views: a block in place, left alone by eviction, for as long as its viewer lives."""

from __future__ import annotations

import gc
import os
import pickle
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import light_mem
from light_mem import BlockView, ServiceClosedError, maintenance
from tests.children import child, line
from tests.conftest import wait_until
from tests.engine_helpers import let_go
from tests.payload import block_bytes_of
from tests.service_rig import Rig, rig


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


def test_a_view_stays_in_its_process(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        r.write(["a"], [0])
        view = r.service.view("a")
        assert view is not None
        with view, pytest.raises(light_mem.InvalidArgumentError, match="stays in its process"):
            pickle.dumps(view)


def test_a_hash_that_is_none_raises(tmp_path: Path) -> None:
    with rig(tmp_path, run=False) as r, pytest.raises(light_mem.InvalidArgumentError):
        r.service.view(["a", "b"])  # type: ignore[arg-type]
    let_go(r)
