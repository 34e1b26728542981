"""What two looks say together, and looks as plain values for JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from light_mem.engine.histogram import Histogram, merged
from light_mem.engine.table_stats import MODES, ServiceNumbers, summary
from light_mem.maintenance.report import plain
from light_mem.monitor.looking import Look

_STORE_COUNTERS = ("lookups", "hits", "inserts", "evictions", "removals", "damaged")


class Rates(NamedTuple):
    """What happened between two looks.

    store       the store's counters, a second; {} where the index could not be read twice
    servers     by table id: the service's counters, a second; only services seen in both
    latencies   by table id and mode: of the tasks that became ready in between
    """

    seconds: float
    store: dict[str, float]
    servers: dict[str, dict[str, float]]
    latencies: dict[str, dict[str, Histogram]]

    def of_all(self, name: str) -> float:
        """A counter of all services together, a second."""
        return sum(server.get(name, 0.0) for server in self.servers.values())

    def latency_of_all(self, mode: str) -> Histogram:
        """The latencies of all services together."""
        return merged([found[mode] for found in self.latencies.values()])


def rates(before: Look, after: Look) -> Rates:
    """The rates between two looks at one store, the earlier first."""
    seconds = max(1e-9, after.clock - before.clock)
    store: dict[str, float] = {}
    for name in _STORE_COUNTERS:
        old, new = getattr(before.store, name), getattr(after.store, name)
        if old is not None and new is not None:
            store[name] = max(0.0, (new - old) / seconds)  # below 0: an index made anew
    known = {server.table_id: server.numbers for server in before.servers}
    servers: dict[str, dict[str, float]] = {}
    latencies: dict[str, dict[str, Histogram]] = {}
    for server in after.servers:
        earlier = known.get(server.table_id)
        if earlier is not None:
            now = server.numbers
            servers[server.table_id] = _a_second(earlier.counters, now.counters, seconds)
            latencies[server.table_id] = {
                mode: now.latencies[mode].since(earlier.latencies[mode]) for mode in MODES
            }
    return Rates(seconds, store, servers, latencies)


def _a_second(
    before: Mapping[str, int], after: Mapping[str, int], seconds: float
) -> dict[str, float]:
    return {name: max(0.0, (value - before[name]) / seconds) for name, value in after.items()}


def together(numbers: Sequence[ServiceNumbers]) -> ServiceNumbers:
    """The numbers of several services as one; {} and nothing counted for none."""
    return ServiceNumbers(
        _sums([n.counters for n in numbers]),
        _sums([n.gauges for n in numbers]),
        {mode: merged([n.latencies[mode] for n in numbers]) for mode in MODES},
    )


def _sums(parts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    names = parts[0] if parts else ()
    return {name: sum(part[name] for part in parts) for name in names}


def as_json(look: Look, since: Rates | None = None) -> dict[str, Any]:
    """A look, with rates where there are any, as what JSON knows. Latencies are seconds; a bucket
    is [upper end, tasks], the last end null; `rates` null after one look only."""
    servers = []
    for server in look.servers:
        fields = plain(server)
        del fields["numbers"]
        fields |= _numbers(server.numbers)
        fields["rates"] = since.servers.get(server.table_id) if since is not None else None
        servers.append(fields)
    return {
        "at": look.at,
        "store": plain(look.store),
        "servers": servers,
        "unseen_servers": look.unseen,
        "total": _numbers(together([server.numbers for server in look.servers])),
        "rates": None if since is None else _all_rates(since),
    }


def _numbers(numbers: ServiceNumbers) -> dict[str, Any]:
    latencies = {}
    for mode, histogram in numbers.latencies.items():
        buckets = histogram.cumulative()
        ends = [[bound, n] for bound, n in buckets[:-1]] + [[None, buckets[-1][1]]]
        latencies[mode] = {**summary(histogram), "buckets": ends}
    return {"counters": numbers.counters, "gauges": numbers.gauges, "latencies": latencies}


def _all_rates(since: Rates) -> dict[str, Any]:
    names = sorted({name for server in since.servers.values() for name in server})
    return {
        "seconds": since.seconds,
        "store": since.store,
        "servers": {name: since.of_all(name) for name in names},
        "latencies": {mode: summary(since.latency_of_all(mode)) for mode in MODES},
    }


def hit_rate(counters: Mapping[str, float]) -> float | None:
    """The share of the hashes asked for that were stored; None: none was asked for."""
    return counters["hits"] / counters["queried"] if counters.get("queried") else None
