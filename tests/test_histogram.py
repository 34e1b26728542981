"""Histograms of durations: buckets, quantiles, sums of several."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from light_mem.engine import histogram
from light_mem.engine.histogram import BOUNDS, BUCKETS, EMPTY, WORDS, Histogram, Histograms, merged


@pytest.fixture
def histograms() -> Histograms:
    return Histograms(memoryview(bytearray(3 * WORDS * 8)).cast("Q"))


@pytest.mark.parametrize("bucket", range(BUCKETS - 1))
def test_a_bucket_ends_below_its_bound(histograms: Histograms, bucket: int) -> None:
    assert histogram.bucket_of(BOUNDS[bucket] - 1) == bucket
    assert histogram.bucket_of(BOUNDS[bucket]) == bucket + 1
    histograms.add(1, BOUNDS[bucket] - 1)
    histograms.add(1, BOUNDS[bucket])
    counts = histograms.read(1).counts
    assert [n for n, count in enumerate(counts) if count] == [bucket, bucket + 1]


def test_the_bounds_are_log_spaced_from_16_us_to_69_s() -> None:
    assert BOUNDS[0] == 1 << 14
    assert BOUNDS[-1] == 1 << 36
    assert all(1.1 < after / before <= 1.25 for before, after in pairwise(BOUNDS))


def test_neighbours_are_left_alone(histograms: Histograms) -> None:
    for ns in (0, 1 << 20, 1 << 40):
        histograms.add(1, ns)
    assert histograms.read(0) == histograms.read(2) == EMPTY
    assert histograms.read(1).number == 3
    assert histograms.read(1).total == (1 << 20) + (1 << 40)


def test_a_clock_that_went_back_counts_nothing(histograms: Histograms) -> None:
    histograms.add(0, -5)
    assert histograms.read(0) == EMPTY


def test_quantiles_are_near_the_true_ones(histograms: Histograms) -> None:
    generator = random.Random(0)
    durations = sorted(int(generator.lognormvariate(14.5, 1.2)) for _ in range(20000))
    for ns in durations:
        histograms.add(0, ns)
    found = histograms.read(0)
    assert found.number == len(durations)
    assert found.total == sum(durations)
    for q in (0.1, 0.5, 0.9, 0.99):
        true = durations[int(q * len(durations)) - 1] / 1e9
        value = found.quantile(q)
        assert value is not None
        assert 0.85 * true < value < 1.15 * true, q


def test_quantiles_of_nothing_and_of_what_is_too_long(histograms: Histograms) -> None:
    assert EMPTY.quantile(0.5) is None
    histograms.add(0, 1 << 50)
    assert histograms.read(0).quantile(0.5) == BOUNDS[-1] / 1e9


def test_cumulative_counts_are_exact_at_their_bounds(histograms: Histograms) -> None:
    durations = [1000, BOUNDS[0], BOUNDS[8] - 1, BOUNDS[8], BOUNDS[40] + 7, 1 << 40]
    for ns in durations:
        histograms.add(0, ns)
    pairs = histograms.read(0).cumulative()
    for bound, count in pairs:
        assert count == sum(ns < bound * 1e9 for ns in durations)
    assert pairs[-1] == (float("inf"), len(durations))
    assert [round(bound * 1e9) for bound, _ in pairs[:-1]] == [1 << bit for bit in range(14, 37)]


def test_sums_and_differences(histograms: Histograms) -> None:
    for at, ns in ((0, 20_000), (0, 30_000), (1, 5_000_000)):
        histograms.add(at, ns)
    before = merged([histograms.read(0), histograms.read(1)])
    histograms.add(1, 7_000_000_000)
    after = merged([histograms.read(at) for at in range(3)])
    assert before.number == 3
    late = after.since(before)
    assert late.number == 1
    assert late.total == 7_000_000_000
    assert merged([]) == EMPTY
    assert Histogram(0, EMPTY.counts).since(after) == EMPTY  # another service's: never below 0
