"""Throughput by workers, shards, servers on one store, and block sizes, each in turn with the
others: figures that were taken minutes apart say what the machine did meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmark.contestant import Contestant
from benchmark.plan import SHAPES, Plan, Shape
from benchmark.run import Run
from benchmark.samples import Sample, Samples

SMALL, LARGE, ONE_PAGE = SHAPES[0], SHAPES[1], SHAPES[3]
_WINDOW_SECONDS = 0.25  # of a sample of several servers
# Samples a round: single ones differ by half, and shares of two medians by more than one does.
_SAMPLES = 2


def bench_growth(run: Run, what: str) -> dict[str, Any]:
    """`what` is workers, shards or servers; GB/s of write and read, by block shape and number."""
    numbers = {"workers": [1, 2, 4, 8], "shards": [1, 4, 16, 64], "servers": [1, 2, 4]}[what]
    if run.quick:
        numbers = numbers[:2]
    out = {}
    for shape in (SMALL,) if run.quick else (SMALL, LARGE):
        plan = run.plan(shape, at_least=max(numbers))
        with run.tensor(plan) as (_, source):
            place = run.place()
            contestants = _start(run, what, numbers, place, source, plan)
            with run.together([c for c, _ in contestants], place):
                out[shape.name] = _measure(run, what, contestants)
    return out


def bench_sizes(run: Run) -> dict[str, Any]:
    """GB/s of write and read by block shape, the first the longest blocks of several pages."""
    first = _first(run)
    others = [ONE_PAGE] if run.quick else [shape for shape in SHAPES if shape != first]
    return _by_shape(run, "sizes", [first, *others], ("lightmem",))


def bench_bounds(run: Run) -> dict[str, Any]:
    """The same of the longest blocks and of one-page blocks of 1 MB, with what bounds LightMem at
    each. (Of all shapes at a time it would be too much dirty memory.)"""
    return _by_shape(run, "bounds", [_first(run), ONE_PAGE], ("lightmem", "bare", "baseline"))


def _first(run: Run) -> Shape:
    return SHAPES[1 if run.quick else 2]


def _by_shape(run: Run, what: str, shapes: list[Shape], kinds: Sequence[str]) -> dict[str, Any]:
    contestants = []
    with ExitStack() as stack:
        for shape in shapes:
            plan = run.plan(shape)
            _, source = stack.enter_context(run.tensor(plan))
            # What comes after the last comma is what they differ by.
            name = shape.name.replace(", one page", " in one page")
            for kind in kinds:
                contestant = run.start(kind, run.place(), source, plan)
                assert contestant is not None
                stack.enter_context(run.together([contestant], contestant.directory))
                contestants.append((contestant, f"{contestant.name}, {name}"))
        return {"in turn": _measure(run, what, contestants)}


def _start(
    run: Run, what: str, numbers: list[int], place: Path, source: Any, plan: Plan
) -> list[tuple[Contestant, str]]:
    """Contestants, and what each is called."""
    found = []
    for number in numbers:
        for kind in ("baseline", "lightmem") if what == "workers" else ("lightmem",):
            started = Contestant(
                kind,
                place / f"{kind}-{number}",
                source,
                plan,
                # Several servers share the workers, but each has one at least.
                number if what == "workers" else run.workers,
                # Even: else the room, and so the slots that writes go round, would grow with them.
                {"shards": number, "even": True} if what == "shards" else {},
                processes=number if what == "servers" else None,
            )
            found.append((started, f"{started.name}, {number}"))
    return found


def _measure(run: Run, what: str, contestants: list[tuple[Contestant, str]]) -> dict[str, Any]:
    samples = {name: {"write": Samples(), "read": Samples()} for _, name in contestants}
    for contestant, _ in contestants:
        # A slot is any server's next: all workers must have written all slots once.
        servers = contestant.processes if what == "servers" else 1
        for _ in range(run.warm * servers):
            contestant.move("write")
        contestant.move("read")
    for _ in range(_SAMPLES * run.rounds):
        for contestant, name in contestants:
            for work, of_work in samples[name].items():
                of_work.all.append(_sample(run, what, contestant, work))
    for contestant, name in contestants:
        run.checked(f"{what}, {contestant.plan.shape.name}, {name}", contestant)
    return {n: {w: s.summary() for w, s in works.items()} for n, works in samples.items()}


def _sample(run: Run, what: str, contestant: Contestant, work: str) -> Sample:
    if what == "servers":
        # What all reach while all are at it: who is done first leaves the CPUs to the others.
        seconds = _WINDOW_SECONDS / 5 if run.quick else _WINDOW_SECONDS
        call = partial(contestant.steady, work)
        sample = run.meter.take_window(call, seconds, contestant.family)
        if work == "write":
            # One wrote more than another, and evicted from it: for the reads all is to be there.
            contestant.move("write")
        return sample
    passes = 1 if run.quick or not contestant.many_passes else 4
    nbytes = passes * contestant.plan.nbytes
    sample = run.meter.take(partial(contestant.move, work, passes), nbytes, contestant.family)
    contestant.complete(work, passes)
    return sample
