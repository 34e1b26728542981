"""Blocks cut at their runs of slots."""

from __future__ import annotations

import numpy as np
import pytest

from light_mem.index.runs import Run, cut_at_runs, slots_needed

PAGE = 100


@pytest.mark.parametrize(
    ("runs", "nbytes", "parts"),
    [
        ([(4, 1)], 100, [((4, 1), 0, 100)]),
        ([(4, 3)], 250, [((4, 3), 0, 250)]),
        ([(4, 2), (9, 1)], 300, [((4, 2), 0, 200), ((9, 1), 200, 300)]),
        ([(9, 1), (4, 2)], 201, [((9, 1), 0, 100), ((4, 2), 100, 201)]),  # in the block's order
    ],
)
def test_a_block_is_cut_where_its_runs_end(
    runs: list[Run], nbytes: int, parts: list[tuple[Run, int, int]]
) -> None:
    assert cut_at_runs(runs, nbytes, PAGE) == parts


@pytest.mark.parametrize(("nbytes", "slots"), [(0, 0), (1, 1), (100, 1), (101, 2)])
def test_a_page_that_is_begun_takes_a_slot(nbytes: int, slots: int) -> None:
    assert slots_needed(nbytes, PAGE) == slots
    assert slots_needed(np.array([nbytes, 1]), PAGE).tolist() == [slots, 1]
