"""Attached memory is what was shared, stays while anybody looks at it and leaves nothing behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing

from light_mem.engine.kvallocation import allocate_kvcache
from light_mem.engine.kvmemory import MemorySource, attach, close_source, share_tensor
from light_mem.errors import InvalidArgumentError, KVCacheMemoryError
from tests.kvmemory_helpers import (
    COLUMNS,
    NBYTES,
    ROOT,
    ROWS,
    maps_lines,
    no_leaks,
    open_descriptors,
    over,
    sysv,
    torch_entries,
)

__all__ = ["no_leaks", "sysv"]  # fixtures


# What stays behind


@pytest.mark.parametrize("fails", [False, True])
def test_a_move_leaves_no_name_and_restores_the_sharing_strategy(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    seen = []
    real = torch.Tensor.share_memory_

    def spy(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(torch.multiprocessing.get_sharing_strategy())
        if fails:
            raise RuntimeError("no luck")
        return real(tensor)

    monkeypatch.setattr(torch.Tensor, "share_memory_", spy)
    try:
        tensor = torch.zeros(ROWS, COLUMNS, dtype=torch.uint8)
        if fails:
            with pytest.raises(KVCacheMemoryError, match="no luck"):
                share_tensor(tensor)
        else:
            close_source(share_tensor(tensor))
        assert torch_entries() == []
        assert torch.multiprocessing.get_sharing_strategy() == "file_system"
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
    assert seen == ["file_descriptor"]


def test_a_killed_server_leaves_nothing_in_dev_shm() -> None:
    code = (
        "import os, signal, torch, torch.multiprocessing\n"
        "from light_mem.engine.kvallocation import allocate_kvcache\n"
        "from light_mem.engine.kvmemory import share_tensor\n"
        "torch.multiprocessing.set_sharing_strategy('file_system')\n"
        "share_tensor(torch.zeros(64, 4096, dtype=torch.uint8))\n"
        "share_tensor(allocate_kvcache(64, 4096))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert [name for name in os.listdir("/dev/shm") if f"_{process.pid}_" in name] == []


def test_closing_a_source_closes_its_descriptor_and_nothing_else(tmp_path: Path) -> None:
    tensor = allocate_kvcache(ROWS, COLUMNS)
    before = open_descriptors()
    source = share_tensor(tensor)
    assert open_descriptors() - before == {source.fd}
    assert not os.get_inheritable(source.fd)
    view = attach(source)
    close_source(source)
    close_source(source)  # closed already
    view[0] = 3
    assert tensor[0, 0] == 3
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    if other != source.fd:
        os.dup2(other, source.fd)
        os.close(other)
    close_source(source)  # the number is another object's by now
    os.close(source.fd)  # would raise if close_source had closed it
    close_source(share_tensor(tensor))  # the tensor is shared again


def test_a_lost_tensor_takes_its_memory_along() -> None:
    tensor = allocate_kvcache(ROWS, COLUMNS)
    source = share_tensor(tensor)
    row = tensor[1]
    del tensor
    gc.collect()
    row[0] = 1
    assert maps_lines(source.inode) == 1
    del row
    gc.collect()
    assert maps_lines(source.inode) == 0
    close_source(source)


# Attaching


def test_memory_stays_attached_while_any_view_lives() -> None:
    tensor = allocate_kvcache(ROWS, COLUMNS)
    source = share_tensor(tensor)
    view = attach(source)[100:].reshape(-1, 100)[2]
    close_source(source)
    gc.collect()
    view[1] = 9
    assert tensor.view(-1)[301] == 9
    assert maps_lines(source.inode) == 2
    del view
    gc.collect()
    assert maps_lines(source.inode) == 1


def test_a_sysv_segment_stays_attached_while_any_view_lives(
    sysv: Callable[[int], tuple[int, Any]],
) -> None:
    shmid, memory = sysv(NBYTES)
    source = share_tensor(over(memory))
    view = attach(source)[100:][:50]
    gc.collect()
    view[1] = 9
    assert memory[101] == 9
    assert maps_lines(shmid) == 2
    del view
    gc.collect()
    assert maps_lines(shmid) == 1


def test_an_array_is_flat_writable_bytes() -> None:
    source = share_tensor(allocate_kvcache(ROWS, COLUMNS))
    view = attach(source)
    assert (view.shape, view.dtype, view.flags.writeable) == ((NBYTES,), np.uint8, True)
    close_source(source)


def test_another_object_behind_the_descriptor_is_refused() -> None:
    source = share_tensor(allocate_kvcache(ROWS, COLUMNS))
    with pytest.raises(KVCacheMemoryError, match="another file"):
        attach(source._replace(inode=source.inode + 1))
    with pytest.raises(KVCacheMemoryError, match="another file"):
        attach(source._replace(device=source.device + 1))
    close_source(source)
    with pytest.raises(KVCacheMemoryError, match="Bad file descriptor"):
        attach(source)


def test_an_object_that_is_too_small_is_refused() -> None:
    source = share_tensor(allocate_kvcache(ROWS, COLUMNS))
    with pytest.raises(KVCacheMemoryError, match="too few"):
        attach(source._replace(offset=1))
    os.ftruncate(source.fd, NBYTES - 1)
    with pytest.raises(KVCacheMemoryError, match="too few"):
        attach(source)
    close_source(source)


def test_a_sysv_segment_that_is_too_small_or_gone_is_refused(
    sysv: Callable[[int], tuple[int, Any]],
) -> None:
    shmid, memory = sysv(NBYTES)
    source = share_tensor(over(memory))
    with pytest.raises(KVCacheMemoryError, match="too few"):
        attach(source._replace(offset=1))
    gc.collect()
    assert maps_lines(shmid) == 1
    with pytest.raises(KVCacheMemoryError, match="Invalid argument"):
        attach(source._replace(shmid=0x7FFFFFF0))


@pytest.mark.parametrize("change", [{"kind": "wire"}, {"nbytes": 0}, {"offset": -1}])
def test_a_source_of_no_known_form_is_refused(change: dict[str, Any]) -> None:
    source = MemorySource("fd", 0, 0, 0, -1, 0, 1)
    with pytest.raises(InvalidArgumentError):
        attach(source._replace(**change))
