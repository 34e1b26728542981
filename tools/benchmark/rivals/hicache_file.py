"""SGLang's file backend of HiCache."""

from __future__ import annotations

from typing import Any

from benchmark.rivals.base import NotInstalledError, Pages, Rival, gather, page_aligned


class HiCache(Rival):
    """`HiCacheFile` as a tensor-parallel rank has it: one thread, a key at a time."""

    name = "SGLang HiCacheFile"
    package = "sglang"
    how = "a process a worker, each as one rank; a new file a block, evicting"
    lacks = "no checksum; keys are files of one directory"
    evicts = True

    def open(self) -> None:
        try:
            from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig
        except Exception as err:  # it imports a good part of the server, which fails in many ways
            raise NotInstalledError(f"{type(err).__name__}: {err}") from err
        import torch

        setup, shape = self.setup, self.setup.plan.shape
        mine = len(range(setup.share, setup.plan.blocks, setup.shares))
        self._store = HiCacheFile(
            HiCacheStorageConfig(
                tp_rank=setup.share,
                tp_size=setup.shares,
                pp_rank=0,
                pp_size=1,
                attn_cp_rank=0,
                attn_cp_size=1,
                is_mla_model=False,
                enable_storage_metrics=False,
                is_page_first_layout=True,
                model_name="bench",
                # A mixed pass must not lose the blocks that it reads to its own writes.
                extra_config={
                    "max_size": int(1.7 * mine + 1) * shape.block_bytes,
                    "eviction_ratio": 1.0,
                },
            ),
            str(self.directory),
        )
        self._buffer = page_aligned(shape.block_bytes).reshape(shape.pages, shape.page_bytes)
        self._tensor = torch.from_numpy(self._buffer)

    def write(self, hashes: list[Any], pages: Pages) -> None:
        for name, rows in zip(hashes, pages, strict=True):
            gather(self.memory, rows, self._buffer)
            if not self._store.set(name, self._tensor):
                raise RuntimeError("HiCacheFile did not store a block")

    def read(self, hashes: list[Any], pages: Pages) -> None:
        for name, rows in zip(hashes, pages, strict=True):
            if self._store.get(name, self._tensor) is None:
                raise RuntimeError("HiCacheFile lost a block")
            self.memory[rows] = self._buffer

    def close(self) -> None:
        pass
