"""The numbers of one service, added up from its task table: by the server itself, by its clients,
and by tools that have only mapped the table. No lock; numbers of about one moment."""

from __future__ import annotations

from typing import NamedTuple

from light_mem.engine.histogram import Histogram, merged
from light_mem.engine.table_layout import READ, WORKER_COUNTERS, WRITE
from light_mem.engine.task_table import TaskTable, latency_at

_LANE_COUNTERS = (
    "queried",
    "hits",
    "present",
    "missing",
    "read_tasks",
    "write_tasks",
    "dropped",
)
MODES = {"read": READ, "write": WRITE}


class ServiceNumbers(NamedTuple):
    """One service since it was made.

    counters    never fall: hashes, tasks, blocks, bytes and ns, by name (docs/operations.md)
    gauges      now: `workers`, and by mode `*_queue` (blocks), `active_*_tasks`
    latencies   by mode: from `create` to ready, of tasks that went through the workers, or that
                `create` did itself
    """

    counters: dict[str, int]
    gauges: dict[str, int]
    latencies: dict[str, Histogram]


def read_numbers(table: TaskTable) -> ServiceNumbers:
    """The numbers of a table now. Any process, any thread."""
    used = table.num_workers + 1  # a look at the others would take memory for them
    workers = table.workers[:used]
    counters = {name: int(workers[name].sum()) for name in WORKER_COUNTERS}
    for name in _LANE_COUNTERS:  # `missing`: some were so at `create`, some when a worker came
        counters[name] = counters.get(name, 0) + int(table.lanes[name].sum())
    counters["misses"] = counters["queried"] - counters["hits"]
    counters["dropped_stores"] = counters.pop("dropped") + counters["no_room"]
    counters["restarts"] = int(table.header["restarts"][0])
    gauges = {"workers": int(workers["ready"].sum())}
    latencies: dict[str, Histogram] = {}
    for name, mode in MODES.items():
        gauges[f"{name}_queue"] = table.waiting(mode)
        gauges[f"active_{name}_tasks"] = table.active_tasks(mode)
        latencies[name] = merged(
            [table.latencies.read(latency_at(worker, mode)) for worker in range(used)]
        )
    return ServiceNumbers(counters, gauges, latencies)


def copy_rate(nbytes: int, nanoseconds: int) -> float:
    """Bytes a second while somebody was at it; 0.0 before the first block."""
    return nbytes * 1e9 / nanoseconds if nanoseconds else 0.0


def summary(histogram: Histogram) -> dict[str, float | int | None]:
    """What people want to know of a latency: seconds, and how many tasks."""
    count = histogram.number
    return {
        "count": count,
        "mean": histogram.total / 1e9 / count if count else None,
        "p50": histogram.quantile(0.5),
        "p90": histogram.quantile(0.9),
        "p99": histogram.quantile(0.99),
    }
