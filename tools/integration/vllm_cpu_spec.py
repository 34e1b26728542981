"""The tiering offload spec on a CPU platform, for tests: vLLM's own copies with a GPU's streams.

Named in the configuration by `spec_name` and `spec_module_path`. One chunk a block, one group.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class CopyWorker(OffloadingWorker):
    """Copies blocks with the CPU, at once, between the cache and the primary tier."""

    def __init__(self, kv_caches: Any, region: SharedOffloadRegion) -> None:
        self._region = region
        self._pairs = [
            (c.tensor.view(torch.int8).view(-1, c.page_size_bytes),
             region.create_next_worker_view(c.page_size_bytes))
            for c in kv_caches.tensors
        ]  # fmt: skip
        self._over: list[TransferResult] = []

    def _move(self, job_id: int, blocks: Any, chunks: Any, load: bool) -> bool:
        for cache, rows in self._pairs:
            if load:
                cache[blocks] = rows[chunks]
            else:
                rows[chunks] = cache[blocks]
        self._over.append(TransferResult(job_id, True))
        return True

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._move(job_id, src_spec.block_ids, dst_spec.block_ids, load=False)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any, expedited: Any = None) -> bool:
        return self._move(job_id, dst_spec.block_ids, src_spec.block_ids, load=True)

    def get_finished(self) -> list[TransferResult]:
        over, self._over = self._over, []
        return over

    def wait(self, job_ids: set[int]) -> None:
        pass

    def shutdown(self) -> None:
        self._pairs.clear()
        self._region.cleanup()


class CpuTieringSpec(TieringOffloadingSpec):
    """TieringOffloadingSpec with a CopyWorker."""

    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        assert self.blocks_per_chunk == 1
        assert len(self.config.groups) == 1
        region = SharedOffloadRegion(
            engine_id=self._engine_id,
            num_chunks=self.num_chunks,
            rank=self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        return CopyWorker(kv_caches, region)
