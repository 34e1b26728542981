"""The C++ LightMem, from a path given by `--cpp-lightmem`."""

from __future__ import annotations

import importlib.util
import math
import sys
import time
from pathlib import Path
from typing import Any

from benchmark.plan import Plan
from benchmark.rivals import no_advice
from benchmark.rivals.base import NotInstalledError, Pages
from benchmark.rivals.service import Service


class CppLightMem(Service):
    """Its `LocalCacheService`, below its Python classes, which hash tokens."""

    name = "C++ LightMem"
    how = "one process, a thread a worker; overwrites slots in place, evicting"
    lacks = (
        "no checksum; its index is in memory only, and its files are truncated when it starts; "
        "a write that finds no slot free is Finished and not stored; differs: it has the kernel "
        "drop each block once written (posix_fadvise), so that writes go to the device meanwhile"
    )
    persistent = False
    spins = True

    @classmethod
    def environment(cls, plan: Plan) -> dict[str, str]:
        return {"LIGHTMEM_MAX_BLOCK_SIZE_MB": str(cls._block_limit(plan) >> 20)}

    def open(self) -> None:
        import torch

        path = self.setup.options.get("path")
        if not path:
            raise NotInstalledError("give its path with --cpp-lightmem")
        # It has this project's name: import it under another one.
        folder = Path(path) / "light_mem"
        spec = importlib.util.spec_from_file_location(
            "cpp_light_mem", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None or not folder.is_dir():
            raise NotInstalledError(f"no package light_mem in {path}")
        module = importlib.util.module_from_spec(spec)
        sys.modules["cpp_light_mem"] = module
        try:
            spec.loader.exec_module(module)
        except ImportError as err:
            raise NotInstalledError(str(err)) from err
        plan, shards = self.setup.plan, 4
        self._module = module.light_mem
        self._torch = torch
        self._lost = 0
        # It has one block size: a shorter block takes a whole slot, and a task of its own.
        block = self.moved_bytes(plan)
        self._alone = block != plan.shape.block_bytes
        self._service = self._module.LocalCacheService(
            file=str(self.directory / "store"),
            # Its hashes do not fall evenly on shards: room so that a pass is not evicted by itself.
            storage_size=(2 * plan.blocks + 4 * shards) * block,
            num_of_shard=shards,
            kvcache=torch.from_numpy(self.memory),
            num_workers=self.setup.workers,
        )
        self._service.run()
        if self._service.block_size() != block:
            raise RuntimeError(f"its blocks have {self._service.block_size()} bytes, not {block}")

    @classmethod
    def moved_bytes(cls, plan: Plan) -> int:
        page = plan.shape.page_bytes
        return min(64, max(1, cls._block_limit(plan) // page)) * page

    @staticmethod
    def _block_limit(plan: Plan) -> int:
        return math.ceil(plan.shape.block_bytes / 2**20) << 20

    def finish(self, tasks: list[Any]) -> None:
        for task in tasks:
            while not task.ready():
                if not self.spin:  # it has no call that waits
                    time.sleep(0.00002)
            self._lost += sum(state != self._module.State.Finished for state in task.state())

    def create(self, mode: str, hashes: list[Any], pages: Pages) -> list[Any]:
        size = 1 if self._alone else max(1, len(hashes))
        return [
            self._service.create(
                hashes[at : at + size],
                self._torch.from_numpy(pages[at : at + size].ravel().astype("int32")),
                mode[0],
            )
            for at in range(0, len(hashes), size)
        ]

    def check(self) -> dict[str, Any]:
        """Blocks that it could not read although it had said that they were stored."""
        return {"lost": self._lost}

    def close(self) -> None:
        del self._service


class KeepingCppLightMem(CppLightMem):
    """The same, but its `posix_fadvise` does nothing: as LightMem's `page_cache="keep"`."""

    name = "C++ LightMem, keep"
    how = "as C++ LightMem, its posix_fadvise a no-op (LD_PRELOAD): the kernel writes when it likes"
    lacks = (
        "no checksum; its index is in memory only, and its files are truncated when it starts; "
        "a write that finds no slot free is Finished and not stored"
    )

    @classmethod
    def environment(cls, plan: Plan) -> dict[str, str]:
        return {**super().environment(plan), "LD_PRELOAD": no_advice.library()}

    def open(self) -> None:
        if not no_advice.is_loaded():
            raise NotInstalledError("the loader refused the no-op of its posix_fadvise")
        super().open()
