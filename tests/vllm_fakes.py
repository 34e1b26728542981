"""The smallest vLLM that the tier can be imported with: types as in vLLM 0.32 and 0.33, no logic.

`installed(monkeypatch)` puts it into `sys.modules` and imports the tier against it. The rest makes
what vLLM hands to a tier: a primary tier in `/dev/shm`, a spec, jobs.
"""

from __future__ import annotations

import importlib
import logging
import mmap
import os
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.vllm_configs import (
    CacheConfig,
    LoadConfig,
    LoRAConfig,
    ModelConfig,
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
    ParallelConfig,
    SpeculativeConfig,
    TieringOffloadingSpec,
    VllmConfig,
)

__all__ = [
    "CacheConfig",
    "LoRAConfig",
    "LoadConfig",
    "ModelConfig",
    "OffloadingCacheConfig",
    "OffloadingConfig",
    "OffloadingGroupConfig",
    "OffloadingModelConfig",
    "OffloadingParallelConfig",
    "ParallelConfig",
    "SpeculativeConfig",
    "TieringOffloadingSpec",
    "VllmConfig",
]  # tests say `fakes.`, as for the rest

TIER = "light_mem.integrations.vllm.tier"


class LookupResult(Enum):
    MISS = auto()
    HIT = auto()
    HIT_PENDING = auto()
    RETRY = auto()


class Medium(Enum):
    CPU = "CPU"
    STORAGE = "STORAGE"


class Locality(Enum):
    LOCAL = "LOCAL"
    REMOTE = "REMOTE"


@dataclass
class ReqContext:
    req_id: str


@dataclass
class RequestOffloadingContext:
    policy: str = "chunk_level"


@dataclass
class TransferJob:
    job_id: int
    keys: Any
    chunk_ids: np.ndarray[Any, Any]
    is_promotion: bool
    req_context: ReqContext


@dataclass
class JobResult:
    job_id: int
    success: bool
    successful_keys: Any = None
    transfer_time: float | None = None
    transfer_bytes: int | None = None


@dataclass(frozen=True)
class Metric:
    documentation: str
    labelnames: tuple[str, ...] = ()


class SecondaryTierManager:
    def __init__(
        self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str, detector: Any
    ) -> None:
        assert primary_kv_view.strides is not None
        self._primary_kv_view = primary_kv_view
        self._block_size_bytes = primary_kv_view.strides[0]
        self.tier_type = tier_type

    @property
    def block_size_bytes(self) -> int:
        return self._block_size_bytes


class OffloadingConnectorStats:
    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def is_empty(self) -> bool:
        return not self.values

    def increase_counter(self, name: str, value: float) -> None:
        self.values[name] = self.values.get(name, 0) + value

    def set_gauge(self, name: str, value: float) -> None:
        self.values[name] = value


# --- in the place of vLLM -------------------------------------------------------------------------


class SecondaryTierFactory:
    tiers: dict[str, tuple[str, str]]

    @classmethod
    def register_tier(cls, name: str, module: str, class_name: str) -> None:
        if name in cls.tiers:
            raise ValueError(f"Tier '{name}' is already registered.")
        cls.tiers[name] = (module, class_name)


def compile_factors() -> dict[str, object]:
    """As `vllm.envs` has it: variables that it knows, set or not, but for ports and the like."""
    return {
        "VLLM_SSM_CONV_STATE_LAYOUT": os.environ.get("VLLM_SSM_CONV_STATE_LAYOUT"),
        "VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT": False,
        "VLLM_DISABLED_KERNELS": (),
        "VLLM_DP_RANK": int(os.environ.get("VLLM_DP_RANK", "0")),
    }


def _modules() -> dict[str, dict[str, Any]]:
    offload = "vllm.v1.kv_offload"
    metrics = "vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics"
    here = globals()
    base = {
        name: here[name]
        for name in ("Locality LookupResult Medium ReqContext RequestOffloadingContext".split())
    }
    return {
        "vllm": {"__version__": "0.33.0"},
        "vllm.envs": {"compile_factors": compile_factors},
        "vllm.config": {"VllmConfig": VllmConfig},
        "vllm.logger": {"init_logger": logging.getLogger},
        "vllm.platforms": {"current_platform": SimpleNamespace(device_type="cpu")},
        metrics: {"OffloadingConnectorStats": OffloadingConnectorStats},
        f"{offload}.base": {
            **base,
            "OffloadKey": bytes,
            "OffloadingCounterMetadata": Metric,
            "OffloadingGaugeMetadata": Metric,
        },
        f"{offload}.tiering.base": {
            "JobResult": JobResult,
            "SecondaryTierManager": SecondaryTierManager,
            "TransferJob": TransferJob,
        },
        f"{offload}.tiering.factory": {"SecondaryTierFactory": SecondaryTierFactory},
        "huggingface_hub": {"constants": SimpleNamespace(HF_HUB_CACHE="/nowhere")},
    }


@contextmanager
def installed(patch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of the tier, imported against the fakes; both are gone afterwards."""
    SecondaryTierFactory.tiers = {}
    for name, content in _modules().items():
        parts = name.split(".")
        for n in range(1, len(parts)):
            parent = ".".join(parts[:n])
            if not isinstance(sys.modules.get(parent), FakeModule):
                patch.setitem(sys.modules, parent, FakeModule(parent))
        module = FakeModule(name)
        module.__dict__.update(content)
        patch.setitem(sys.modules, name, module)
    sys.modules.pop(TIER, None)
    try:
        yield importlib.import_module(TIER)
    finally:
        sys.modules.pop(TIER, None)


class FakeModule(ModuleType):
    """A module that is a package too."""

    __path__: list[str] = []  # noqa: RUF012


class Primary:
    """The primary tier's memory, as vLLM makes it: a file in /dev/shm, mapped and shared."""

    def __init__(self, rows: int, row_bytes: int) -> None:
        self.path = Path(f"/dev/shm/vllm_offload_{uuid.uuid4().hex}.mmap")
        self._fd = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        os.ftruncate(self._fd, rows * row_bytes)
        self._map = mmap.mmap(self._fd, rows * row_bytes)
        self.array: Any = np.frombuffer(self._map, np.int8).reshape(rows, row_bytes)
        self.view = memoryview(self.array)

    def bytes(self, row: int) -> np.ndarray[Any, Any]:
        return np.array(self.array[row]).view(np.uint8)

    def put(self, row: int, content: np.ndarray[Any, Any]) -> None:
        self.array[row] = content.view(np.int8)

    def close(self) -> None:
        """As vLLM does it: BufferError when a tier still holds the memory."""
        self.view.release()
        self.array = None
        self._map.close()
        os.close(self._fd)
        self.path.unlink()


def job(number: int, keys: Sequence[bytes], rows: Sequence[int], load: bool = False) -> TransferJob:
    """A job of the request "r"."""
    return TransferJob(number, keys, np.array(rows, np.int32), load, ReqContext("r"))
