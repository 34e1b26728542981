"""What is loaded before small rows are copied, and on whose processors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from light_mem.engine import page_views
from light_mem.engine.pieces import SMALL_PAGE_BYTES
from light_mem.engine.places import Rows


@pytest.mark.parametrize("page_bytes", [100, SMALL_PAGE_BYTES - 1, SMALL_PAGE_BYTES])
@pytest.mark.parametrize("loads", [False, True])
def test_small_rows_are_loaded_before_stores_where_that_helps(
    loads: bool, page_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_views, "LOADS_BEFORE_STORES", loads)
    views = page_views.PageViews(Rows(np.zeros((2, page_bytes), np.uint8), np.array([0])))
    small = page_bytes < SMALL_PAGE_BYTES
    assert (views.firsts is not None) == small
    assert (views.firsts_to_put is not None) == (small and loads)


@pytest.mark.parametrize(
    ("text", "intel"),
    [
        ("cpu:type:x86,ven0000fam0006mod00CF:feature:,0000,0001\n", True),
        ("cpu:type:x86,ven0002fam0019mod0001:feature:,0000,0001\n", False),
        ("cpu:type:aarch64:feature:,0000,0001\n", False),
        (None, False),
    ],
)
def test_who_made_the_processor_is_read_where_linux_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, intel: bool
) -> None:
    path = tmp_path / "modalias"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(page_views, "MODALIAS", path)
    assert page_views.is_intel() == intel
