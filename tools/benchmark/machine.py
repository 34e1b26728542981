"""What a run ran on, what else ran meanwhile, and the page cache of files."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import psutil

from light_mem.filesystem import file_system

_CACHESTAT = 451  # the same number on every architecture; Linux 6.5
_KTHREADD = 2


def describe(directory: Path) -> dict[str, Any]:
    """CPU, cores, memory, kernel, file system of `directory`, versions."""
    versions = {}
    for name in ("light-mem", "torch", "numpy", "xxhash", "filelock", "sortedcontainers", "psutil"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_GB": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "file_system": file_system(directory)[1] or "unknown",
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def dirty_room() -> float:
    """Bytes that may be dirty before the kernel slows writers down, roughly."""
    try:
        ratio = float(Path("/proc/sys/vm/dirty_ratio").read_text())
        background = float(Path("/proc/sys/vm/dirty_background_ratio").read_text())
    except OSError:
        return float("inf")
    return (ratio + background) / 200 * psutil.virtual_memory().available or float("inf")


class OtherLoad:
    """CPU seconds of all processes that are not ours; kernel threads and idle time left out.

    Kernel threads are left out since they mostly do our own writing back. Time that the hypervisor
    gave to others counts as theirs. Clock ticks are 10 ms: short spans are not to be trusted.
    """

    def __init__(self) -> None:
        self._threads = [
            p for p in psutil.process_iter(["ppid"]) if p.pid == _KTHREADD or _is_kernel(p)
        ]

    def seconds(self, ours: float) -> float:
        """So far; `ours` are the CPU seconds of this run's processes so far."""
        times = psutil.cpu_times()
        busy = times.user + times.system + getattr(times, "nice", 0.0)
        for name in ("irq", "softirq", "steal"):
            busy += getattr(times, name, 0.0)
        return float(busy - ours - sum(cpu_of(p) for p in self._threads))


def _is_kernel(process: psutil.Process) -> bool:
    return bool(process.info["ppid"] == _KTHREADD) and platform.system() == "Linux"


def cpu_of(process: psutil.Process) -> float:
    """CPU seconds of a process so far; 0 when it is gone."""
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def write_out(directory: Path) -> None:
    """Have all files of `directory` on the device: no page of them is dirty any more."""
    for path in (p for p in directory.rglob("*") if p.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def forget(directory: Path) -> float:
    """Write the files of `directory` out and drop them from the page cache.

    Returns which share of them stayed in it: pages that a process maps are not dropped.
    """
    stayed = total = 0
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            stayed += _cached(descriptor)
            total += os.fstat(descriptor).st_blocks * 512
        finally:
            os.close(descriptor)
    return stayed / total if total else 0.0


def _cached(descriptor: int) -> int:
    """Bytes of a file in the page cache; 0 where the kernel cannot say."""
    span = (ctypes.c_uint64 * 2)(0, 0)
    counts = (ctypes.c_uint64 * 5)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_CACHESTAT, descriptor, span, counts, 0) != 0:
        return 0
    return int(counts[0]) * os.sysconf("SC_PAGE_SIZE")
