"""Memory: shared memory and its leftovers, swap, huge pages, what the container allows.

The KV tensor in shared memory and the store's pages in the page cache all count as memory, of the
machine and of the container.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from light_mem.doctor.report import OK, WARN, Check, Machine, as_number, read_text
from light_mem.sizes import bytes_text

_CONTAINER_SHM = 64 << 20  # what container engines give by default
_SWAPPED = 256 << 20
_UNLIMITED = 1 << 60  # cgroup v1 says "no limit" with a number above this
_UNSAID = "the kernel does not say"  # a /proc of processes only (subset=pid), or none
_LEFTOVER = re.compile(r"torch_(\d+)_")


def checks(machine: Machine) -> list[Check]:
    """All of them."""
    return [
        shared_memory(machine),
        leftovers(machine),
        memory(machine),
        swap(machine),
        transparent_huge_pages(machine),
        huge_pages(machine),
        container(machine),
    ]


def shared_memory(machine: Machine) -> Check:
    """/dev/shm: where torch shares tensors and servers put their KV pools."""
    try:
        total, used, free = shutil.disk_usage(machine.shm)
    except OSError as error:
        return Check("/dev/shm", WARN, str(error), "allocate tensors with allocate_kvcache()")
    return judge_shared_memory(total, used, free)


def judge_shared_memory(total: int, used: int, free: int) -> Check:
    """Sizes in bytes."""
    found = f"{bytes_text(free)} of {bytes_text(total)} free"
    if total <= _CONTAINER_SHM:
        advice = "a container's default: run it with a larger --shm-size, or allocate_kvcache()"
        return Check("/dev/shm", WARN, found, advice)
    if free < total // 10:
        advice = f"{bytes_text(used)} are taken: look for leftovers, or mount it larger"
        return Check("/dev/shm", WARN, found, advice)
    return Check("/dev/shm", OK, found)


def leftovers(machine: Machine) -> Check:
    """Tensors in /dev/shm whose process is gone: torch leaves them after a kill."""
    count = size = 0
    try:
        entries = list(os.scandir(machine.shm))
    except OSError:
        entries = []
    for entry in entries:
        match = _LEFTOVER.match(entry.name)
        if match is not None and not (machine.proc / match[1]).exists():
            try:
                size += entry.stat().st_size
                count += 1
            except OSError:
                continue  # gone just now
    if not count:
        return Check("left in /dev/shm", OK, "nothing")
    found = f"{count} torch_* of dead processes, {bytes_text(size)}"
    advice = f"if no container shares it: remove {machine.shm}/torch_<pid>_* of those processes"
    return Check("left in /dev/shm", WARN, found, advice)


def memory(machine: Machine) -> Check:
    """What is left for the page cache."""
    info = machine.meminfo()
    if not info:
        return Check("memory", OK, _UNSAID)
    total, available = info.get("MemTotal", 0), info.get("MemAvailable", 0)
    found = f"{bytes_text(available)} of {bytes_text(total)} available"
    if total and available < total // 10:
        advice = "little is left for the page cache: loads will come from the device"
        return Check("memory", WARN, found, advice)
    return Check("memory", OK, found)


def swap(machine: Machine) -> Check:
    """Shared memory is swapped like any other."""
    info = machine.meminfo()
    total = info.get("SwapTotal", 0)
    used = total - info.get("SwapFree", 0)
    if not total:
        return Check("swap", OK, "none" if info else _UNSAID)
    found = f"{bytes_text(used)} of {bytes_text(total)} used, swappiness {_swappiness(machine)}"
    if used > _SWAPPED:
        advice = "the KV tensor may be swapped out: swapoff -a, or vm.swappiness=1"
        return Check("swap", WARN, found, advice)
    return Check("swap", OK, found)


def _swappiness(machine: Machine) -> str:
    return machine.text("sys", "vm", "swappiness") or "unknown"


def transparent_huge_pages(machine: Machine) -> Check:
    """Chosen words are in brackets."""
    folder = machine.sys / "kernel" / "mm" / "transparent_hugepage"
    words = {name: _chosen(read_text(folder / name)) for name in ("enabled", "shmem_enabled")}
    found = f"{words['enabled']}, for shared memory {words['shmem_enabled']}"
    if words["shmem_enabled"] in ("always", "force"):
        advice = "every small shared object takes a huge page: set shmem_enabled to advise"
        return Check("transparent huge pages", WARN, found, advice)
    if words["shmem_enabled"] == "never":
        found += " (advise would let the KV memory of allocate_kvcache use them)"
    return Check("transparent huge pages", OK, found)


def _chosen(text: str | None) -> str:
    match = re.search(r"\[(\w+)\]", text or "")
    return match[1] if match else "unknown"


def huge_pages(machine: Machine) -> Check:
    """Reserved ones are lost to everything else."""
    info = machine.meminfo()
    total, free = info.get("HugePages_Total", 0), info.get("HugePages_Free", 0)
    size = info.get("Hugepagesize", 0)
    if not total:
        return Check("huge pages", OK, "none reserved" if info else _UNSAID)
    found = f"{total:,} of {bytes_text(size)} reserved, {free:,} free"
    if free * size > info.get("MemTotal", 0) // 10:
        advice = "reserved ones that nobody uses are lost to the page cache: lower vm.nr_hugepages"
        return Check("huge pages", WARN, found, advice)
    return Check("huge pages", OK, found)


# --- the container --------------------------------------------------------------------------------


def container(machine: Machine) -> Check:
    """The smallest memory limit of the process's cgroups, version 1 or 2."""
    limits = [each for folder in _cgroups(machine) if (each := _limit(folder)) is not None]
    if not limits:
        return Check("memory limit", OK, "none")
    limit, used = min(limits)
    found = f"{bytes_text(limit)}, {bytes_text(used)} taken by processes and shared memory"
    if used > limit * 8 // 10:
        advice = "shared memory and the store's page cache count against it: raise it"
        return Check("memory limit", WARN, found, advice)
    return Check("memory limit", OK, found)


def _cgroups(machine: Machine) -> list[Path]:
    """The process's memory cgroup and those above it."""
    folders: list[Path] = []
    for line in (machine.text("self", "cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = machine.sys / "fs" / "cgroup" / controllers
        below = root / path.lstrip("/")
        # Within a container the path is often the host's, and the container's own is the root.
        parents = [p for p in (below, *below.parents) if p.is_relative_to(root)]
        folders += [folder for folder in parents if folder.is_dir()]
    return folders


def _limit(folder: Path) -> tuple[int, int] | None:
    """(limit, what is taken and cannot be given back), bytes; None: no limit."""
    for name in ("memory.max", "memory.limit_in_bytes"):
        limit = as_number(read_text(folder / name))
        if limit is not None and limit < _UNLIMITED:
            stat = dict(
                line.split()[:2]
                for line in (read_text(folder / "memory.stat") or "").splitlines()
                if len(line.split()) >= 2
            )
            # Version 2, then version 1 with its children.
            names = ("anon", "shmem") if "anon" in stat else ("total_rss", "total_shmem")
            return limit, sum(as_number(stat.get(n)) or 0 for n in names)
    return None
