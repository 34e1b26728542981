"""A read that would fill a page twice is refused, however its pages lie."""

from __future__ import annotations

import numpy as np
import pytest

from light_mem import InvalidArgumentError
from light_mem.blocks import parse_pages
from light_mem.engine.table_layout import READ, WRITE

NUM_PAGES = 1 << 24
DTYPES = (np.int64, np.int32, np.uint16, np.uint64)


def pages(count: int, span: int, dtype: type, seed: int = 0) -> np.ndarray:
    """Different pages in random order, the last one of the span among them."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(span - 1, count - 1, replace=False) if span < 1 << 20 else None
    if chosen is None:  # far apart
        chosen = np.arange(count - 1) * (span // count)
    first = NUM_PAGES - span if dtype in (np.int64, np.uint64) and span < 1 << 16 else 0
    return rng.permutation(np.append(chosen, span - 1) + first).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "span"), [(2, 2), (64, 64), (64, 1000), (300, 60_000)])
def test_a_page_twice_is_named(count: int, span: int, dtype: type) -> None:
    fine = pages(count, span, dtype)
    assert parse_pages(fine, NUM_PAGES, READ).tolist() == fine.tolist()
    for seed in range(5):
        first, second = np.random.default_rng(seed).choice(count, 2, replace=False)
        twice = fine.copy()
        twice[first] = twice[second]
        with pytest.raises(InvalidArgumentError, match=f"page {twice[second]} ") as caught:
            parse_pages(twice, NUM_PAGES, READ)
        assert caught.value.page == twice[second]
        assert parse_pages(twice, NUM_PAGES, WRITE).tolist() == twice.tolist()


def test_pages_far_apart() -> None:
    fine = pages(100, NUM_PAGES, np.int64)
    parse_pages(fine, NUM_PAGES, READ)
    fine[7] = fine[70]
    with pytest.raises(InvalidArgumentError, match=f"page {fine[70]} "):
        parse_pages(fine, NUM_PAGES, READ)
