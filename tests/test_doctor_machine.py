"""`light-mem doctor`: checks of a kernel, its limits and its memory, on machines made for each."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from light_mem.doctor import FAIL, OK, WARN, Machine, directory, kernel, memory
from tests.doctor_helpers import GIB, status


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path / "proc", tmp_path / "sys", tmp_path / "shm")
    for path in made:
        path.mkdir()
    return made


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def meminfo(machine: Machine, **gib: float) -> None:
    lines = [f"{name}: {int(size * GIB / 1024)} kB" for name, size in gib.items()]
    put(machine.proc / "meminfo", "\n".join(lines))


# --- the kernel and its limits --------------------------------------------------------------------


def test_a_missing_feature_is_a_warning(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "pidfd_open", refuse, raising=False)
    monkeypatch.delattr(os, "memfd_create", raising=False)
    found = {check.name: check for check in kernel.checks(machine)}
    assert status(found["pidfds"]) == status(found["memfd_create"]) == WARN
    assert "not permitted" in found["pidfds"].found
    assert status(found["OFD locks"]) == OK  # what one is refused is no want of another


def test_limits() -> None:
    unlimited = resource.RLIM_INFINITY
    assert status(kernel.descriptors(1024, unlimited)) == OK
    assert status(kernel.descriptors(1024, 1024)) == WARN
    assert status(kernel.memlock(unlimited)) == OK
    low = kernel.memlock(64 << 10)
    assert low.status == OK  # of no concern to LightMem, and often so
    assert "a server that locks its KV cache" in low.advice
    assert status(directory.judge_descriptors(364, 1024, 4096)) == OK
    assert status(directory.judge_descriptors(3064, 1024, 4096)) == WARN
    assert status(directory.judge_descriptors(3064, 1024, 2048)) == FAIL
    assert status(directory.judge_descriptors(3064, unlimited, unlimited)) == OK


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"dirty_ratio": 20, "dirty_background_ratio": 10}, OK),
        ({"dirty_bytes": 16 << 20, "dirty_background_bytes": 8 << 20}, WARN),
        ({"dirty_bytes": 1 << 30, "dirty_background_ratio": 50}, WARN),
        ({"dirty_bytes": 0, "dirty_ratio": 20, "dirty_background_bytes": 1 << 20}, OK),
        ({}, OK),
    ],
)
def test_dirty_pages(machine: Machine, settings: dict[str, int], expected: str) -> None:
    meminfo(machine, MemAvailable=16)
    for name, value in settings.items():
        put(machine.proc / "sys" / "vm" / name, str(value))
    assert status(kernel.dirty_pages(machine)) == expected


# --- memory ---------------------------------------------------------------------------------------


def test_shared_memory_of_a_container_is_small() -> None:
    assert status(memory.judge_shared_memory(64 << 20, 0, 64 << 20)) == WARN
    assert status(memory.judge_shared_memory(8 * GIB, 7.9 * GIB, 0.1 * GIB)) == WARN  # type: ignore[arg-type]
    assert status(memory.judge_shared_memory(8 * GIB, GIB, 7 * GIB)) == OK


def test_without_shared_memory() -> None:
    assert status(memory.shared_memory(Machine(shm=Path("/nowhere/shm")))) == WARN
    assert status(memory.leftovers(Machine(shm=Path("/nowhere/shm")))) == OK


def test_tensors_of_dead_processes_are_leftovers(machine: Machine) -> None:
    (machine.proc / "100").mkdir()
    for name in ("torch_100_1_0", "sem.x", "psm_1234", "torch_x"):
        (machine.shm / name).write_bytes(bytes(4096))
    assert status(memory.leftovers(machine)) == OK
    for name in ("torch_200_1_0", "torch_200_2_0"):
        (machine.shm / name).write_bytes(bytes(3 << 20))
    found = memory.leftovers(machine)
    assert status(found) == WARN
    assert found.found == "2 torch_* of dead processes, 6.0 MiB"


def test_a_kernel_that_does_not_say_is_not_believed_to_have_none(machine: Machine) -> None:
    for check in (memory.memory, memory.swap, memory.huge_pages):
        assert check(machine)[1:] == (OK, "the kernel does not say", "")


def test_memory_and_swap(machine: Machine) -> None:
    meminfo(machine, MemTotal=64, MemAvailable=32, SwapTotal=0, SwapFree=0)
    assert status(memory.memory(machine)) == status(memory.swap(machine)) == OK
    meminfo(machine, MemTotal=64, MemAvailable=2, SwapTotal=8, SwapFree=4)
    put(machine.proc / "sys" / "vm" / "swappiness", "60")
    assert status(memory.memory(machine)) == status(memory.swap(machine)) == WARN
    assert "swappiness 60" in memory.swap(machine).found
    meminfo(machine, SwapTotal=8, SwapFree=8)
    assert status(memory.swap(machine)) == OK


def test_huge_pages(machine: Machine) -> None:
    put(machine.proc / "meminfo", f"MemTotal: {64 << 20} kB")
    assert status(memory.huge_pages(machine)) == OK
    for free, expected in ((8192, WARN), (100, OK)):
        text = f"HugePages_Total: 8192\nHugePages_Free: {free}\nHugepagesize: 2048 kB"
        put(machine.proc / "meminfo", f"MemTotal: {64 << 20} kB\n{text}")
        assert status(memory.huge_pages(machine)) == expected
    folder = machine.sys / "kernel" / "mm" / "transparent_hugepage"
    assert status(memory.transparent_huge_pages(machine)) == OK
    for word, expected in (("[advise] force", OK), ("advise [force]", WARN)):
        put(folder / "shmem_enabled", word)
        assert status(memory.transparent_huge_pages(machine)) == expected
        assert "allocate_kvcache" not in memory.transparent_huge_pages(machine).found
    put(folder / "shmem_enabled", "advise [never]")
    assert status(memory.transparent_huge_pages(machine)) == OK
    assert "allocate_kvcache" in memory.transparent_huge_pages(machine).found


@pytest.mark.parametrize(
    ("line", "controller", "limit", "stat"),
    [
        ("0::/pod/a", "", "memory.max", "anon {n}\nfile 99999999999\nshmem 1024"),
        ("4:memory:/pod/a", "memory", "memory.limit_in_bytes", "total_rss {n}\ntotal_shmem 1024"),
        ("0::/of/the/host", "", "memory.max", "anon {n}\nshmem 1024"),
    ],
)
def test_a_containers_memory_limit(
    machine: Machine, line: str, controller: str, limit: str, stat: str
) -> None:
    put(machine.proc / "self" / "cgroup", line)
    root = machine.sys / "fs" / "cgroup" / controller
    assert status(memory.container(machine)) == OK  # no such folders
    folder = root / "pod" if "pod" in line else root  # a limit of the parent counts too
    for used, expected in ((1 * GIB, OK), (int(3.5 * GIB), WARN)):
        put(folder / limit, str(4 * GIB))
        put(folder / "memory.stat", stat.format(n=used))
        (root / "pod" / "a").mkdir(parents=True, exist_ok=True)
        put(root / "pod" / "a" / limit, "max" if not controller else str(2**63 - 4096))
        assert status(memory.container(machine)) == expected
        assert memory.container(machine).found.startswith("4.0 GiB, ")
