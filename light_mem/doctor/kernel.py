"""What the kernel offers, what it allows this process, and how it writes back."""

from __future__ import annotations

import fcntl
import os
import platform
import resource
import sys
from collections.abc import Callable

from light_mem.doctor.report import OK, WARN, Check, Machine
from light_mem.sizes import bytes_text

_LEAST_DIRTY = 256 << 20
_LEAST_MEMLOCK = 64 << 20
_LEAST_DESCRIPTORS = 4096


def checks(machine: Machine) -> list[Check]:
    """All of them."""
    return [
        system(),
        _feature(
            "memfd_create",
            _memfd,
            "shared memory without a name is missing (Linux 3.17): task tables become files in the "
            "temporary directory, and tools cannot watch services",
        ),
        _feature(
            "pidfds",
            lambda: os.close(os.pidfd_open(os.getpid())),
            "deaths of processes are noticed by polling (Linux 5.3 or another sandbox profile)",
        ),
        _feature(
            "OFD locks",
            _ofd_lock,
            "two services of one process do not exclude each other (Linux 3.15)",
        ),
        descriptors(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        memlock(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]),
        dirty_pages(machine),
    ]


def system() -> Check:
    """The kernel's name."""
    found = f"{platform.system()} {platform.release()} {platform.machine()}"
    if sys.platform != "linux":
        return Check("kernel", WARN, found, "LightMem is made for Linux; here parts are slower")
    return Check("kernel", OK, found)


def _feature(name: str, probe: Callable[[], object], advice: str) -> Check:
    """Try it: a kernel may have it, and a sandbox forbid it."""
    try:
        probe()
    except (AttributeError, OSError, ValueError) as error:
        return Check(name, WARN, f"missing: {error}", advice)
    return Check(name, OK, "there")


def _memfd() -> None:
    os.close(os.memfd_create("lightmem-doctor", os.MFD_CLOEXEC))


def _ofd_lock() -> None:
    import struct
    import tempfile

    with tempfile.TemporaryFile() as file:  # no memfd: that may be missing, and these be there
        raw = struct.pack("hhlli4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
        fcntl.fcntl(file.fileno(), fcntl.F_OFD_SETLK, raw)


def descriptors(soft: int, hard: int) -> Check:
    """Open files: each shard costs some."""
    found = f"{_limit(soft)} (hard limit {_limit(hard)})"
    if hard != resource.RLIM_INFINITY and hard < _LEAST_DESCRIPTORS:
        advice = f"raise it to {_LEAST_DESCRIPTORS} or more for stores of many shards (ulimit -n)"
        return Check("open files", WARN, found, advice)
    return Check("open files", OK, found)


def memlock(soft: int) -> Check:
    """Locked memory: LightMem locks none, servers that pin their KV cache do."""
    found = bytes_text(soft) if soft != resource.RLIM_INFINITY else "unlimited"
    if soft != resource.RLIM_INFINITY and soft < _LEAST_MEMLOCK:
        note = "LightMem locks none; a server that locks its KV cache needs more (ulimit -l)"
        return Check("locked memory", OK, found, note)
    return Check("locked memory", OK, found)


def dirty_pages(machine: Machine) -> Check:
    """How much may wait to be written before writers wait."""
    memory = machine.meminfo().get("MemAvailable", 0)
    limit = _dirty(machine, "dirty", memory)
    background = _dirty(machine, "dirty_background", memory)
    if limit is None or background is None:
        return Check("dirty pages", OK, "the kernel does not say")
    found = f"written back from {bytes_text(background)} on, writers wait at {bytes_text(limit)}"
    if limit < _LEAST_DIRTY:
        advice = "stores wait for the device almost at once: raise vm.dirty_ratio or dirty_bytes"
        return Check("dirty pages", WARN, found, advice)
    if background >= limit:
        advice = "writing back begins only when writers wait already: lower vm.dirty_background_*"
        return Check("dirty pages", WARN, found, advice)
    return Check("dirty pages", OK, found)


def _dirty(machine: Machine, name: str, memory: int) -> int | None:
    fixed = machine.number("sys", "vm", f"{name}_bytes")
    if fixed:
        return fixed
    ratio = machine.number("sys", "vm", f"{name}_ratio")
    return None if ratio is None else memory * ratio // 100


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"
