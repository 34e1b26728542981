"""Throughput by blocks a task and by tasks under way.

The other parts give a service thousands of blocks a task, two tasks at a time. A server's requests
have fewer: what a task itself costs is a share of theirs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmark.contestant import Contestant
from benchmark.plan import SHAPES, Plan
from benchmark.run import Run
from benchmark.samples import Samples

SERVICES = ("lightmem", "cpp-lightmem", "cpp-lightmem-keep")  # the others have no tasks
_SECONDS = 0.25  # of a sample
_MOST_ROUNDS = 3
_WORKS = ("write", "read")


def bench_tasks(run: Run) -> dict[str, Any]:
    """By block shape, then "contestant, blocks a task, tasks under way": write and read."""
    out = {}
    for shape in SHAPES[:1] if run.quick else SHAPES[:2]:
        plan = run.plan(shape, at_least=16)
        with run.tensor(plan) as (_, source):
            place = run.place()
            kinds = [kind for kind in SERVICES if kind in run.kinds]
            contestants = run.start_all(place, source, plan, kinds)
            with run.together(contestants, place):
                out[shape.name] = _measure(run, plan, contestants)
    return out


def _cases(run: Run, plan: Plan) -> list[tuple[int, int]]:
    """Blocks a task, no more than there are, and tasks under way."""
    sizes = (1, 16) if run.quick else (1, 4, 16, 64, 256, 1024)
    numbers = (1, 2) if run.quick else (1, 2, 4)
    return [(size, n) for size in sizes if size <= plan.blocks for n in numbers]


def _measure(run: Run, plan: Plan, contestants: list[Contestant]) -> dict[str, Any]:
    seconds = _SECONDS / 5 if run.quick else _SECONDS
    for contestant in contestants:
        for _ in range(run.warm):
            contestant.move("write")
        contestant.move("read")
        contestant.awake(False)
    samples: dict[str, dict[str, Samples]] = {}
    for _ in range(min(run.rounds, _MOST_ROUNDS)):
        for size, under_way in _cases(run, plan):
            for contestant in contestants:
                contestant.awake(True)
                name = f"{contestant.name}, {size} a task, {under_way} under way"
                for work in _WORKS:
                    call = partial(_stream, contestant, work, size, under_way)
                    sample = run.meter.take_window(call, seconds, contestant.family)
                    of_case = samples.setdefault(name, {work: Samples() for work in _WORKS})
                    of_case[work].all.append(sample)
                    if work == "write":
                        contestant.move("write")  # for the reads all is to be there
                contestant.awake(False)
    for contestant in contestants:
        contestant.awake(True)
        run.checked(f"tasks, {plan.shape.name}", contestant)
    return {n: {w: s.summary() for w, s in works.items()} for n, works in samples.items()}


def _stream(
    contestant: Contestant, work: str, size: int, under_way: int, seconds: float
) -> tuple[int, int]:
    contestant.tell("prepare_steady", mode=work, seconds=seconds)
    told = {"mode": work, "size": size, "under_way": under_way, "seconds": seconds}
    moved, total = contestant.tell("tasks", **told)[0]
    return moved, total
