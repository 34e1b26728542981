"""Prometheus metrics of stores and of the services that have them open; needs prometheus-client.

    from prometheus_client import REGISTRY, start_http_server
    REGISTRY.register(light_mem.metrics.Collector("./cache_storage"))
    start_http_server(9090)

Numbers are not kept here: each scrape reads the store's files and the task tables of *all* servers
that have it open, from shared memory. So any process may answer, with the whole and not with its
own part: each of the processes behind one port, or `light-mem metrics` beside them. What may be
scraped several times (every process has a port of its own) has the same labels each time, and is
counted once by `max by (store, service, ...)`, which the dashboard in docs/grafana does.

Labels: `store` (its directory), `service` (pid and a piece of its table's id; one service is one
series, since its counters begin at 0), `mode` (read, write).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import light_mem
from light_mem.engine.table_stats import MODES
from light_mem.errors import InvalidArgumentError, LightMemError
from light_mem.logs import Limited
from light_mem.monitor import Look, ServerLook, StoreLook, look

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric


class Family(NamedTuple):
    """One metric: its name as it is queried, what kind it is, what it says, its labels."""

    name: str
    kind: str  # "counter", "gauge", "histogram"
    text: str
    labels: tuple[str, ...]


_STORE = ("store",)
_SERVICE = ("store", "service")
_MODE = ("store", "service", "mode")

# --- of a store: name, text, field of StoreLook ---------------------------------------------------
_STORE_COUNTERS = (
    ("lightmem_store_lookups_total", "Hashes asked for, by all servers ever.", "lookups"),
    ("lightmem_store_hits_total", "Hashes asked for that were stored, ever.", "hits"),
    ("lightmem_store_inserts_total", "Blocks stored, ever.", "inserts"),
    ("lightmem_store_evictions_total", "Blocks evicted, ever.", "evictions"),
    ("lightmem_store_removals_total", "Blocks taken out otherwise, ever.", "removals"),
    ("lightmem_store_damaged_blocks_total", "Blocks found damaged and dropped, ever.", "damaged"),
)
_Gauge = tuple[str, str, Callable[[StoreLook], float | None]]
_STORE_GAUGES: tuple[_Gauge, ...] = (
    ("lightmem_store_blocks", "Stored blocks.", lambda s: s.blocks),
    (
        "lightmem_store_used_bytes",
        "Room that stored blocks, and blocks being written, take.",
        lambda s: None if s.used_slots is None else s.used_slots * s.page_bytes,
    ),
    ("lightmem_store_pinned_blocks", "Pinned blocks.", lambda s: s.pinned_blocks),
    (
        "lightmem_store_pinned_bytes",
        "Room that pinned blocks take.",
        lambda s: None if s.pinned_slots is None else s.pinned_slots * s.page_bytes,
    ),
    (
        "lightmem_store_capacity_bytes",
        "Room for blocks.",
        lambda s: s.slots * s.page_bytes,
    ),
    (
        "lightmem_store_index_usable",
        "1: the index can be used; 0: it is missing or damaged.",
        lambda s: float(s.index_state == "ok"),
    ),
)
_READABLE = Family(
    "lightmem_store_readable", "gauge", "1: a store lies there and was read; 0: not.", _STORE
)
_AGES = Family(
    "lightmem_store_age_bytes",
    "gauge",
    "Bytes of blocks by the time since their last use: less than `age` seconds, not in the age "
    "before.",
    ("store", "age"),
)
_SERVICES = Family("lightmem_services", "gauge", "Services that have the store open.", _STORE)
_UNSEEN = Family(
    "lightmem_unseen_services",
    "gauge",
    "Services that have the store open and whose numbers cannot be read: of another user or "
    "container.",
    _STORE,
)

# --- of a service: name, text, counter or gauge; with {mode}: one a mode --------------------------
_COUNTERS = (
    ("lightmem_lookups_total", "Hashes asked for.", "queried"),
    ("lightmem_hits_total", "Hashes asked for that were stored.", "hits"),
    (
        "lightmem_misses_total",
        "Hashes asked for that were not stored, or behind one that was not in `match_prefix`.",
        "misses",
    ),
    ("lightmem_tasks_total", "Tasks made.", "{mode}_tasks"),
    ("lightmem_copied_blocks_total", "Blocks copied to or from the store.", "blocks_{past}"),
    ("lightmem_copied_bytes_total", "Bytes copied to or from the store.", "bytes_{past}"),
    ("lightmem_present_blocks_total", "Blocks to write that were stored already.", "present"),
    ("lightmem_missing_blocks_total", "Blocks to read that were not stored.", "missing"),
    ("lightmem_lost_races_total", "Reads that lost a race with eviction.", "lost_races"),
    ("lightmem_damaged_blocks_total", "Blocks read whose bytes were damaged.", "damaged"),
    ("lightmem_dropped_blocks_total", "Blocks that were to be stored and not.", "dropped_stores"),
    ("lightmem_failed_blocks_total", "Blocks whose copy failed.", "failed"),
    ("lightmem_stopped_blocks_total", "Blocks whose copy was aborted.", "stopped"),
    ("lightmem_worker_restarts_total", "Workers that died and were replaced.", "restarts"),
)
_COPY_SECONDS = Family(
    "lightmem_copy_seconds_total", "counter", "Time spent on blocks that were copied.", _MODE
)
_GAUGES = (
    ("lightmem_workers", "Workers that are ready.", "workers"),
    ("lightmem_queued_blocks", "Blocks that wait for a worker.", "{mode}_queue"),
    ("lightmem_active_tasks", "Tasks that are not ready.", "active_{mode}_tasks"),
)
_WANTED = Family("lightmem_configured_workers", "gauge", "Workers there should be.", _SERVICE)
_LATENCY = Family(
    "lightmem_task_duration_seconds",
    "histogram",
    "From `create` to ready, of tasks that went through the workers, or that `create` did itself.",
    _MODE,
)


def _labels(key: str) -> tuple[str, ...]:
    return _MODE if "{" in key else _SERVICE


FAMILIES = (
    _READABLE,
    *(Family(name, "counter", text, _STORE) for name, text, _ in _STORE_COUNTERS),
    *(Family(name, "gauge", text, _STORE) for name, text, _ in _STORE_GAUGES),
    _AGES,
    _SERVICES,
    _UNSEEN,
    *(Family(name, "counter", text, _labels(key)) for name, text, key in _COUNTERS),
    _COPY_SECONDS,
    *(Family(name, "gauge", text, _labels(key)) for name, text, key in _GAUGES),
    _WANTED,
    _LATENCY,
)


class Collector:
    """The metrics of some stores, for a registry of prometheus_client. Any thread, any process.

    One collector a registry: name all stores in it. A store that is not there, or not yet, is
    `lightmem_store_readable 0` and no error.
    """

    def __init__(self, *stores: str | os.PathLike[str], ages: bool = True) -> None:
        """`ages`: also lightmem_store_age_bytes, which reads the whole index at each scrape."""
        if not stores:
            raise InvalidArgumentError("a collector needs the directory of a store")
        require_client()
        self._stores = list(dict.fromkeys(os.path.abspath(store) for store in stores))
        self._ages = ages
        self._warning = Limited().warning

    def describe(self) -> Iterable[Metric]:
        """The families without samples: a second collector in one registry is refused."""
        return _metrics().values()

    def collect(self) -> Iterator[Metric]:
        """Look, and give what was seen."""
        metrics = _metrics()
        for path in self._stores:
            # A path may have bytes that are no UTF-8, which a label must be.
            store = os.fsencode(path).decode("utf-8", "backslashreplace")
            try:
                found = look(path, self._ages)
            except (LightMemError, OSError) as error:
                metrics[_READABLE.name].add_metric([store], 0)
                problem = str(error).encode(errors="backslashreplace").decode()  # it names the path
                self._warning("metrics of %s: %s", store, problem)
                continue
            metrics[_READABLE.name].add_metric([store], 1)
            _add_store(metrics, store, found)
            for server in found.servers:
                _add_server(metrics, [store, f"{server.pid}-{server.table_id[:6]}"], server)
        yield from metrics.values()


def require_client() -> None:
    """Raise InvalidArgumentError, which says what to install, when prometheus-client is missing."""
    try:
        import prometheus_client  # noqa: F401
    except ModuleNotFoundError as error:
        raise InvalidArgumentError(
            f"{error}: metrics need prometheus-client (pip install 'light-mem[prometheus]')",
            reason=str(error),
        ) from None


def registry(*stores: str | os.PathLike[str], ages: bool = True) -> CollectorRegistry:
    """A registry of its own with these stores, and which version of LightMem reads them."""
    from prometheus_client import CollectorRegistry, Info

    made = CollectorRegistry()
    made.register(Collector(*stores, ages=ages))
    Info("lightmem_exporter", "The exporter.", registry=made).info(
        {"version": light_mem.__version__}
    )
    return made


def _metrics() -> dict[str, Any]:
    """The families, empty."""
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )

    kinds = {
        "counter": CounterMetricFamily,
        "gauge": GaugeMetricFamily,
        "histogram": HistogramMetricFamily,
    }
    return {f.name: kinds[f.kind](f.name, f.text, labels=f.labels) for f in FAMILIES}


def _add_store(metrics: dict[str, Any], store: str, found: Look) -> None:
    label = [store]
    for name, _, field in _STORE_COUNTERS:
        value = getattr(found.store, field)
        if value is not None:
            metrics[name].add_metric(label, value)
    for name, _, read in _STORE_GAUGES:
        number = read(found.store)
        if number is not None:
            metrics[name].add_metric(label, number)
    for bucket in found.store.ages or ():
        age = "+Inf" if bucket.below is None else str(bucket.below)
        metrics[_AGES.name].add_metric([*label, age], bucket.nbytes)
    metrics[_SERVICES.name].add_metric(label, len(found.servers))
    metrics[_UNSEEN.name].add_metric(label, found.unseen)


def _add_server(metrics: dict[str, Any], labels: list[str], server: ServerLook) -> None:
    numbers = server.numbers
    for rows, values in ((_COUNTERS, numbers.counters), (_GAUGES, numbers.gauges)):
        for name, _, key in rows:
            if "{" not in key:
                metrics[name].add_metric(labels, values[key])
                continue
            for mode, past in zip(MODES, ("read", "written"), strict=True):
                value = values[key.format(mode=mode, past=past)]
                metrics[name].add_metric([*labels, mode], value)
    metrics[_WANTED.name].add_metric(labels, server.workers)
    for mode in MODES:
        spent = numbers.counters[f"{mode}_ns"] / 1e9
        metrics[_COPY_SECONDS.name].add_metric([*labels, mode], spent)
        latency = numbers.latencies[mode]
        buckets = [
            ("+Inf" if bound == float("inf") else repr(bound), n)
            for bound, n in latency.cumulative()
        ]
        metrics[_LATENCY.name].add_metric([*labels, mode], buckets, latency.total / 1e9)
