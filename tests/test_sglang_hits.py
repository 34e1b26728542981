"""Which prefixes several pools can serve, against a plain reading of SGLang's rules."""

from __future__ import annotations

import random

import numpy as np
import pytest

from light_mem.integrations.sglang.hits import Demand, usable_prefixes


def plainly(kv_pages: int, demands: list[Demand]) -> tuple[int, dict[str, int], list[int]]:
    """SGLang's rules, one prefix at a time."""
    found = list(range(1, kv_pages + 1))
    by_pool = {"kv": kv_pages} if kv_pages else {}
    for demand in demands:
        mine = [
            n
            for n in range(1, kv_pages + 1)
            if all(demand.stored[max(0, n - demand.trailing) if demand.trailing else 0 : n])
        ]
        if mine:
            by_pool[demand.name] = mine[-1]
        found = [n for n in found if n in mine]
    return (found[-1] if found else 0), by_pool, found


@pytest.mark.parametrize("seed", range(200))
def test_prefixes_are_those_of_the_rules(seed: int) -> None:
    rng = random.Random(seed)
    kv_pages = rng.randrange(12)
    demands = [
        Demand(name, np.array([rng.random() < 0.8 for _ in range(kv_pages + 2)]), trailing)
        for name, trailing in [("a", 0), ("b", 1), ("c", 3)][: rng.randrange(4)]
    ]
    assert tuple(usable_prefixes(kv_pages, demands)) == plainly(kv_pages, demands)


def test_a_checkpoint_may_be_missing_in_the_middle() -> None:
    stored = np.array([False, True, False, True, False])
    assert usable_prefixes(5, [Demand("state", stored, 1)]) == (4, {"kv": 5, "state": 4}, [2, 4])


def test_every_page_is_wanted_where_nothing_trails() -> None:
    stored = np.array([True, True, False, True])
    assert usable_prefixes(4, [Demand("index", stored, 0)]) == (2, {"kv": 4, "index": 2}, [1, 2])


def test_nothing_stored_is_nothing() -> None:
    assert usable_prefixes(0, [Demand("index", np.zeros(0, bool), 0)]) == (0, {}, [])
