"""LightMemTier: the secondary tier that vLLM makes. All that touches vLLM's types is here.

Written against vLLM 0.32.0 and 0.33.0. In 0.33 a tier may be asked to serve from a thread of its
own and to name labels for an info metric; both are optional and left out here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import vllm
from vllm import envs
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from light_mem import __version__
from light_mem.errors import InvalidArgumentError
from light_mem.integrations.namespace import Namespace
from light_mem.integrations.plain_data import plain
from light_mem.integrations.vllm import engine_config, environment, model_weights
from light_mem.integrations.vllm.jobs import Finished
from light_mem.integrations.vllm.opening import open_service
from light_mem.integrations.vllm.options import TierOptions
from light_mem.integrations.vllm.transfers import TierTransfers

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadingMetricMetadata, OffloadingSpec
    from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector

# A child of vLLM's own logger: its lines appear where those of vLLM do.
logger = init_logger("vllm.light_mem")

METRIC_PREFIX = "vllm:kv_offload_light_mem_"
_COUNTERS = {
    "stored_blocks": "Chunks stored, or found stored already.",
    "failed_store_blocks": "Chunks that could not be stored: no room, an I/O error.",
    "dropped_stores": "Store jobs of which chunks were dropped: the queue was full.",
    "dropped_blocks": "Chunks of store jobs that were dropped: the queue was full.",
    "loaded_blocks": "Chunks loaded.",
    "failed_load_blocks": "Chunks that could not be loaded and were computed anew.",
}
_QUEUED = "queued_blocks"


class LightMemTier(SecondaryTierManager):
    """Chunks of vLLM's KV cache in a LightMem store: they outlive the engine.

    The pages of the service are the rows of the primary tier, which its workers map: a chunk is
    copied once, between the primary tier and the store. Methods are called by the scheduler, one
    at a time, and return in microseconds; `drain_jobs` and `shutdown` wait.
    """

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: BackpressureDetector | None = None,
        **options: Any,
    ) -> None:
        """`options` are those of the tier's configuration: see `TierOptions`."""
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        chosen = TierOptions.parse(options)
        self.locality = Locality(chosen.locality)
        self._shutdown_timeout = chosen.shutdown_timeout
        engine = engine_config.find_engine_config(VllmConfig, offloading_spec.extra_config)
        namespace = _namespace(engine, offloading_spec, primary_kv_view, chosen)
        service = open_service(
            primary_kv_view,
            chosen.file,
            chosen.storage_size,
            num_of_shard=chosen.num_of_shard,
            num_workers=chosen.num_workers,
            verify=chosen.verify,
            durability=chosen.durability,
            page_cache=chosen.page_cache,
            time_to_live=chosen.time_to_live,
        )
        self._transfers = TierTransfers(
            service,
            namespace,
            max_queued=chosen.max_queued_blocks or max(1, len(primary_kv_view) // 2),
            load_timeout=chosen.load_timeout,
            tell=_result,
        )
        self._told: dict[str, int] = {}
        stored = service.stats()
        logger.info(
            "LightMem %s: store %s with %d chunks of %d bytes, room for %d; %d rows, %d workers, "
            "namespace %s",
            __version__,
            chosen.file,
            stored["blocks"],
            self.block_size_bytes,
            stored["slots"],
            len(primary_kv_view),
            chosen.num_workers,
            namespace.name,
        )
        logger.debug("LightMem namespace %s is %s", namespace.name, namespace.text)
        _warn_of_a_kill(getattr(engine, "shutdown_timeout", None), chosen.shutdown_timeout)

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        found = self._transfers.lookup(key, req_context.req_id)
        return LookupResult.HIT if found else LookupResult.MISS

    def submit_store(self, job_metadata: TransferJob) -> None:
        job = job_metadata
        self._transfers.store(job.job_id, job.keys, job.chunk_ids, job.req_context.req_id)

    def submit_load(self, job_metadata: TransferJob) -> None:
        job = job_metadata
        self._transfers.load(job.job_id, job.keys, job.chunk_ids, job.req_context.req_id)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        results: list[JobResult] = self._transfers.finished()
        return results

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        self._transfers.touch(keys)

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._transfers.forget(req_context.req_id)

    def drain_jobs(self) -> None:
        self._transfers.drain()

    def shutdown(self) -> None:
        self._transfers.close(self._shutdown_timeout)

    @classmethod
    def build_metric_definitions(
        cls, extra_config: dict[str, Any]
    ) -> dict[str, OffloadingMetricMetadata]:
        definitions: dict[str, OffloadingMetricMetadata] = {
            METRIC_PREFIX + name: OffloadingCounterMetadata(documentation=text)
            for name, text in _COUNTERS.items()
        }
        definitions[METRIC_PREFIX + _QUEUED] = OffloadingGaugeMetadata(
            documentation="Chunks of store jobs that are under way."
        )
        return definitions

    def get_stats(self) -> OffloadingConnectorStats | None:
        stats = OffloadingConnectorStats()
        for name in _COUNTERS:
            value = self._transfers.counters[name]
            if value != self._told.get(name, 0):
                stats.increase_counter(METRIC_PREFIX + name, value - self._told.get(name, 0))
                self._told[name] = value
        queued = self._transfers.queued()
        if queued != self._told.get(_QUEUED, 0):
            stats.set_gauge(METRIC_PREFIX + _QUEUED, queued)
            self._told[_QUEUED] = queued
        return None if stats.is_empty() else stats


def _result(job: Finished) -> JobResult:
    part = job.load and not job.success and job.done
    return JobResult(
        job_id=job.job_id,
        success=job.success,
        successful_keys=job.done if part else None,
        transfer_time=job.seconds,
        transfer_bytes=job.nbytes,
    )


def _warn_of_a_kill(engines: float | None, tiers: float) -> None:
    """`engines` and `tiers` are the seconds that a shutdown of each may take."""
    if engines is not None and engines <= tiers:
        logger.warning(
            "vllm serve kills this engine %g s after it was told to stop, and LightMem may want "
            "%g s to finish stores: chunks under way are lost then, and vLLM's files in /dev/shm "
            "may stay. Start it with a --shutdown-timeout above %g",
            engines,
            tiers,
            tiers,
        )


def _namespace(
    engine: VllmConfig | None, spec: OffloadingSpec, view: memoryview, options: TierOptions
) -> Namespace:
    """Everything that decides which bytes a key names under this engine."""
    if engine is None and options.weights is None:
        # Without it neither revision nor quantization is known: only the user can tell.
        raise InvalidArgumentError(
            'LightMem cannot find the configuration of the engine in this process. Set "weights" '
            "in the tier's configuration to a text that is another one for other weights, another "
            "quantization or other overrides of the model's configuration"
        )
    described = {
        "vllm": vllm.__version__,
        "platform": [current_platform.device_type, type(current_platform).__name__],
        "spec": plain(type(spec)),
        "environment": environment.describe(getattr(envs, "compile_factors", None)),
        "offloading": engine_config.describe_offloading(spec.config),
        "row_bytes": view.strides[0] if view.strides else 0,
        "replicated_layout": bool(spec.replicated_layout),
        "engine": None if engine is None else engine_config.describe_engine(engine),
        "namespace": options.namespace,
    }
    if engine is None:
        described["weights"] = {"given": options.weights}
    else:
        described |= model_weights.identify(engine, spec.config.model.name, options.weights)
    return Namespace(described)
