"""The line that a service logs when it starts: what a bug report needs to hold."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING

import light_mem
from light_mem.engine.affinity import text_of
from light_mem.filesystem import file_system
from light_mem.index.format import FORMAT_VERSION

if TYPE_CHECKING:
    from light_mem.engine.kvmemory import MemorySource
    from light_mem.engine.task_table import TaskTable
    from light_mem.index.description import Geometry
    from light_mem.service_settings import ServiceSettings

PACKAGES = ("torch", "numpy", "filelock", "sortedcontainers", "psutil", "xxhash")


def start_line(
    geometry: Geometry, table: TaskTable, source: MemorySource, settings: ServiceSettings
) -> str:
    """Everything about a service in one line: versions, store, tensor, workers, settings."""
    h, g, s, e = table.header[0], geometry, settings, settings.engine
    mount, kind = file_system(s.directory)
    versions = ", ".join(f"{name} {version_of(name)}" for name in PACKAGES)
    return (
        f"LightMem {light_mem.__version__} (format {FORMAT_VERSION}): store {s.directory} "
        f"(id {g.store_id}, {kind or 'unknown file system'} at {mount or '?'}), {g.shards} shards "
        f"of {g.slots} slots of {g.page_bytes} bytes, storage_size {g.storage_size}; KV tensor "
        f"{int(h['num_pages'])} pages of {int(h['page_bytes'])} bytes, {memory_text(source)}, "
        f"{int(h['pages_per_block'])} pages a block; {int(h['workers'])} workers on "
        f"{cpus_text(s.cpus)}, page_cache {e.page_cache}, "
        f"durability {e.durability}, verify {e.verify}, time_to_live {e.time_to_live}, max_blocks "
        f"{table.sizes.cells}; pid {os.getpid()}, Python {platform.python_version()}, {versions}, "
        f"{platform.platform()}"
    )


def memory_text(source: MemorySource) -> str:
    """What memory the KV tensor lies in."""
    if source.kind == "sysv":
        return "SysV segment"
    try:
        return os.readlink(f"/proc/self/fd/{source.fd}").removesuffix(" (deleted)")
    except OSError:
        return "shared memory"


def cpus_text(cpus: Sequence[Sequence[int]] | None) -> str:
    """Which CPUs the workers are bound to, one list a worker."""
    return "any CPU" if cpus is None else "CPUs " + " ".join(f"[{text_of(c)}]" for c in cpus)


def version_of(package: str) -> str:
    """The installed version of a package; "missing"."""
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"
    # torch's own says which CUDA it was built for, where its wheel's name does not (from PyPI).
    own = str(getattr(sys.modules.get(package), "__version__", ""))
    return own if own.startswith(f"{version}+") else version
