"""Histograms of durations in shared memory: log-spaced buckets of 64-bit counters.

Four buckets an octave from 16 us to 69 s, one below and one above: a percentile is off by 12% at
most. A process that counts has histograms of its own, so an addition needs no lock and none is
lost; whoever reads adds them up. Three stores to memory and no numpy: some 400 ns.

Words of one histogram: the sum of the durations in ns, then the counts of the buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

FIRST_BIT = 14  # the buckets begin at 2**14 ns
OCTAVES = 22
_STEPS = 4  # buckets an octave, of equal width
_STEP_BITS = 2
BUCKETS = OCTAVES * _STEPS + 2
WORDS = 1 + BUCKETS
WORD_BYTES = 8

# Upper ends of the buckets in ns; the last one has none.
_FINITE = [
    (_STEPS + step) << (FIRST_BIT + octave - _STEP_BITS)
    for octave in range(OCTAVES)
    for step in range(_STEPS)
]
BOUNDS = (*_FINITE, 1 << (FIRST_BIT + OCTAVES))


def bucket_of(ns: int) -> int:
    """The bucket of a duration: the first whose upper end is above it."""
    octave = ns.bit_length() - 1 - FIRST_BIT
    if octave < 0:
        return 0
    if octave >= OCTAVES:
        return BUCKETS - 1
    return 1 + octave * _STEPS + (ns >> (FIRST_BIT + octave - _STEP_BITS)) - _STEPS


class Histogram(NamedTuple):
    """What was counted up to one moment."""

    total: int  # ns, of all durations
    counts: tuple[int, ...]  # [BUCKETS]

    @property
    def number(self) -> int:
        """How many durations."""
        return sum(self.counts)

    def quantile(self, q: float) -> float | None:
        """The duration in seconds that a share `q` does not exceed; None: nothing was counted.

        Within a bucket durations are taken as spread evenly; above the last bound, as that bound.
        """
        wanted = q * self.number
        if not self.number:
            return None
        below = 0
        for bucket, n in enumerate(self.counts):
            if n and below + n >= wanted:
                if bucket == BUCKETS - 1:
                    break
                low = BOUNDS[bucket - 1] if bucket else 0
                return (low + (BOUNDS[bucket] - low) * (wanted - below) / n) / 1e9
            below += n
        return BOUNDS[-1] / 1e9

    def cumulative(self) -> list[tuple[float, int]]:
        """(upper bound in seconds, durations below it), a pair an octave; the last is infinite."""
        pairs: list[tuple[float, int]] = []
        below = 0
        for bucket, n in enumerate(self.counts[:-1]):
            below += n
            if bucket % _STEPS == 0:
                pairs.append((BOUNDS[bucket] / 1e9, below))
        return [*pairs, (float("inf"), self.number)]

    def since(self, before: Histogram) -> Histogram:
        """What was counted after `before`, an earlier look at the same histogram."""
        counts = tuple(max(0, n - m) for n, m in zip(self.counts, before.counts, strict=True))
        return Histogram(max(0, self.total - before.total), counts)


EMPTY = Histogram(0, (0,) * BUCKETS)


def merged(histograms: Sequence[Histogram]) -> Histogram:
    """All of them as one."""
    if not histograms:
        return EMPTY
    counts = tuple(map(sum, zip(*(h.counts for h in histograms), strict=True)))
    return Histogram(sum(h.total for h in histograms), counts)


class Histograms:
    """A row of histograms in mapped memory. Each has one process that adds to it, from one thread
    at a time; any process reads."""

    def __init__(self, words: memoryview) -> None:
        """`words`: unsigned 64-bit, WORDS a histogram; zeros to begin with."""
        self._words = words

    def add(self, at: int, ns: int) -> None:
        """Count one duration in histogram `at`."""
        if ns < 0:
            return  # a clock that went back says nothing
        first = at * WORDS
        self._words[first] += ns
        self._words[first + 1 + bucket_of(ns)] += 1

    def read(self, at: int) -> Histogram:
        """Histogram `at` now."""
        total, *counts = self._words[at * WORDS : (at + 1) * WORDS].tolist()
        return Histogram(total, tuple(counts))
