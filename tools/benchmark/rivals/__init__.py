"""LightMem, the baseline and what people use instead: one small class each."""

from __future__ import annotations

import importlib

from benchmark.rivals.base import NotInstalledError, Rival, Setup

__all__ = [
    "ALL",
    "ASKED_FOR",
    "BARE",
    "BASE",
    "BESIDE_CPP",
    "BOUNDS",
    "UNTUNED",
    "NotInstalledError",
    "Rival",
    "Setup",
    "find",
    "is_ours",
]

# name on the command line -> module, class
ALL = {
    "baseline": ("baseline", "Baseline"),
    "baseline-plain": ("baseline", "UntunedBaseline"),
    "lightmem": ("lightmem", "LightMem"),
    "lightmem-drop": ("lightmem", "DroppingLightMem"),
    "lightmem-uneven": ("lightmem", "UnevenLightMem"),
    "bare": ("bare", "Bare"),
    "plain": ("plain", "PlainFile"),
    "lmdb": ("lmdb_store", "Lmdb"),
    "diskcache": ("diskcache_store", "DiskCache"),
    "safetensors": ("safetensors_files", "Safetensors"),
    "lmcache": ("lmcache_disk", "LMCacheDisk"),
    "lmcache-fs": ("lmcache_native", "LMCacheNative"),
    "hicache": ("hicache_file", "HiCache"),
    "cpp-lightmem": ("cpp_lightmem", "CppLightMem"),
    "cpp-lightmem-keep": ("cpp_lightmem", "KeepingCppLightMem"),
}
# The C++ LightMem sends each written block to the device and drops it from the page cache. These
# two take that difference away: the one from it, the other from LightMem.
BESIDE_CPP = ("lightmem-drop", "cpp-lightmem-keep")
ASKED_FOR = ("lightmem-uneven",)  # in no run that does not name them

# Printed names of those that are no stores: what any store could reach at most, and what LightMem.
BASE, BARE = "memory to memory", "copies alone"
UNTUNED = "... as Python starts"
BOUNDS = (BASE, UNTUNED, BARE)


def is_ours(name: str) -> bool:
    """Whether it is LightMem, or measured with its code: a failure is the project's."""
    return name.split("-")[0] in ("lightmem", "bare", "baseline")


def find(name: str) -> type[Rival]:
    module, kind = ALL[name]
    return getattr(importlib.import_module(f"benchmark.rivals.{module}"), kind)  # type: ignore[no-any-return]
