"""Timed runs, which of them count, and their medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import psutil

from benchmark.machine import OtherLoad, cpu_of

MAX_OTHERS = 0.05  # of all CPUs: more by other processes and a sample is dropped
_TICKS = 0.03  # seconds that clock ticks may be wrong by

Found = TypeVar("Found")


class Sample(NamedTuple):
    seconds: float
    cpu: float
    nbytes: float
    others: float


class Samples:
    """Samples of one kind of work by one contestant."""

    def __init__(self) -> None:
        self.all: list[Sample] = []

    def clean(self) -> list[Sample]:
        return [s for s in self.all if _is_clean(s)]

    def summary(self) -> dict[str, Any]:
        """GB/s (median, spread), CPU seconds a GB, how many samples were dropped; and of all, in
        the order of the rounds, the rates and which were clean.

        When none is clean all are used, and `noisy` says so.
        """
        clean = self.clean()
        used = clean or self.all
        rates = sorted(s.nbytes / s.seconds / 1e9 for s in used)
        return {
            "GBps": statistics.median(rates),
            "lowest": rates[0],
            "highest": rates[-1],
            "cpu_s_per_GB": sum(s.cpu for s in used) / sum(s.nbytes for s in used) * 1e9,
            "samples": len(self.all),
            "dropped": len(self.all) - len(clean),
            "noisy": not clean,
            "rates": [s.nbytes / s.seconds / 1e9 for s in self.all],
            "clean": [_is_clean(s) for s in self.all],
        }


def _is_clean(sample: Sample) -> bool:
    cores = psutil.cpu_count() or 1
    return sample.others <= MAX_OTHERS * cores * sample.seconds + _TICKS


class Meter:
    """Takes samples: wall time, CPU of the contestant, CPU of other processes."""

    def __init__(self) -> None:
        self._others = OtherLoad()
        self._own = psutil.Process()

    def take(
        self, call: Callable[[], float], nbytes: float, family: Iterable[psutil.Process]
    ) -> Sample:
        """`call` returns the seconds that count, of work that moves `nbytes`."""
        seconds, cpu, others = self._watch(call, family)
        return Sample(seconds, cpu, nbytes, others)

    def take_window(
        self,
        call: Callable[[float], tuple[int, int]],
        seconds: float,
        family: Iterable[psutil.Process],
    ) -> Sample:
        """`call` returns the bytes moved in so many seconds, and those that it moved in all."""
        (moved, total), cpu, others = self._watch(lambda: call(seconds), family)
        return Sample(seconds, cpu * moved / total, moved, others)

    def _watch(
        self, call: Callable[[], Found], family: Iterable[psutil.Process]
    ) -> tuple[Found, float, float]:
        """What a call returns, and CPU seconds meanwhile: the contestant's, and those of others."""
        family = list(family)
        cpu = sum(map(cpu_of, family))
        others = self._others.seconds(cpu + cpu_of(self._own))
        found = call()
        spent = sum(map(cpu_of, family)) - cpu
        others = self._others.seconds(cpu + spent + cpu_of(self._own)) - others
        return found, spent, max(0.0, others)


def median_of(call: Callable[[], object], times: int = 101) -> float:
    """Median seconds of a call."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
