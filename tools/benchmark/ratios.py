"""Ratios of two contestants, or of one's two works: of the samples of the same round, with their
range. A median over a median would mix rounds, and what the machine did in them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Ratio(NamedTuple):
    """The median, the quartiles, and whether no round had two clean samples."""

    median: float
    low: float
    high: float
    noisy: bool

    def __str__(self) -> str:
        text = f"{self.median:.2f}{'~' if self.noisy else ''}"
        low, high = f"{self.low:.2f}", f"{self.high:.2f}"
        return text if low == high else f"{text} ({low}-{high})"


def between(ours: dict[str, Any] | None, theirs: dict[str, Any] | None) -> Ratio | None:
    """Of two summaries (`Samples.summary`) whose samples were taken in turn; None: there is one."""
    if not ours or not theirs:
        return None
    rounds = [(s["rates"], s["clean"]) for s in (ours, theirs)]
    pairs = list(zip(*(values for of_one in rounds for values in of_one), strict=False))
    clean = [mine / other for mine, good, other, too in pairs if good and too]
    found = clean or [mine / other for mine, _, other, _ in pairs]
    low, median, high = np.percentile(found, (25, 50, 75)).tolist()
    return Ratio(median, low, high, not clean)
