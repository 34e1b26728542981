"""FreeRuns against a naive model: a row of booleans."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from light_mem.index.space import FreeRuns


def runs_of(free: np.ndarray) -> list[tuple[int, int]]:
    """Maximal runs of True, by place."""
    runs, at = [], 0
    for value, group in itertools.groupby(free.tolist()):
        length = len(list(group))
        if value:
            runs.append((at, length))
        at += length
    return runs


def check(space: FreeRuns, free: np.ndarray) -> None:
    runs = runs_of(free)
    assert space.runs() == runs
    assert len(space) == len(runs)
    assert space.total == free.sum()
    assert space.longest == max((n for _, n in runs), default=0)


@pytest.mark.parametrize("seed", range(8))
def test_random_operations_leave_what_a_row_of_booleans_leaves(seed: int) -> None:
    rng = np.random.default_rng(seed)
    slots = int(rng.integers(1, 80))
    free = rng.random(slots) < 0.5
    space = FreeRuns(runs_of(free))
    check(space, free)
    for _ in range(400):
        start = int(rng.integers(0, slots))
        length = int(rng.integers(1, min(12, slots - start) + 1))
        piece = slice(start, start + length)
        operation = rng.integers(0, 4)
        if operation == 0:
            assert space.add(start, length) == (not free[piece].any())
            if not free[piece].any():
                free[piece] = True
        elif operation == 1:
            assert space.remove(start, length) == bool(free[piece].all())
            if free[piece].all():
                free[piece] = False
        elif operation == 2:
            fitting = [(n, at) for at, n in runs_of(free) if n >= length]
            taken = space.take(length)
            assert taken == min(fitting)[1] if fitting else taken is None
            if taken is not None:
                free[taken : taken + length] = False
        else:
            pieces = space.take_pieces(length)
            assert (pieces is None) == (free.sum() < length)
            if pieces is not None:
                lengths = sorted((n for _, n in runs_of(free)), reverse=True)
                needed = int(np.searchsorted(np.cumsum(lengths), length)) + 1
                assert len(pieces) == needed
                assert sum(n for _, n in pieces) == length
                assert pieces == sorted(pieces)
                for at, n in pieces:
                    assert free[at : at + n].all()
                    free[at : at + n] = False
        check(space, free)


def test_a_run_is_taken_from_the_shortest_that_fits() -> None:
    space = FreeRuns([(0, 10), (20, 4), (30, 5), (40, 4)])
    assert space.take(4) == 20
    assert space.take(4) == 40
    assert space.take(4) == 30
    assert space.take(11) is None
    assert space.runs() == [(0, 10), (34, 1)]


def test_pieces_are_taken_from_the_longest_and_listed_by_place() -> None:
    space = FreeRuns([(0, 2), (10, 6), (20, 3)])
    assert space.take_pieces(8) == [(10, 6), (20, 2)]
    assert space.take_pieces(4) is None
    assert space.take_pieces(3) == [(0, 2), (22, 1)]
    assert space.total == 0
    assert space.take_pieces(1) is None


def test_freed_neighbours_become_one_run() -> None:
    space = FreeRuns([(0, 2), (4, 2)])
    assert space.add(2, 2)
    assert space.runs() == [(0, 6)]


@pytest.mark.parametrize("run", [(3, 1), (2, 3), (0, 4), (4, 2), (5, 1), (0, 9)])
def test_freeing_what_is_free_is_refused_and_changes_nothing(run: tuple[int, int]) -> None:
    space = FreeRuns([(3, 3)])
    assert not space.add(*run)
    assert space.runs() == [(3, 3)]
    assert space.total == 3


@pytest.mark.parametrize("run", [(2, 2), (5, 2), (0, 1), (7, 1), (2, 5)])
def test_taking_what_is_not_free_is_refused_and_changes_nothing(run: tuple[int, int]) -> None:
    space = FreeRuns([(3, 3)])
    assert not space.remove(*run)
    assert space.runs() == [(3, 3)]
    assert space.total == 3
