"""One block at a time: seconds from the call until its bytes are where they belong."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmark.plan import Plan, Shape
from benchmark.run import Run

# A contestant with one block size may have to move more than the block: 983 KB in one page is the
# least at which all move the same.
SHAPES = [
    Shape(4096, 1),
    Shape(65536, 1),
    Shape(983040, 1),
    Shape(3840, 64),
    Shape(61440, 64),
    Shape(19660800, 1),
]


def bench_latency(run: Run) -> dict[str, Any]:
    """Microseconds by block size, contestant and mode: p50, p99 and the whole distribution; and
    the bytes that it moves for a block."""
    out: dict[str, Any] = {}
    for shape in SHAPES[1:3] if run.quick else SHAPES:
        blocks = max(8, min(64, (128 << 20) // shape.block_bytes))
        plan = Plan(shape, blocks, run.seed)
        calls = 30 if run.quick else max(30, min(500, (2 << 30) // shape.block_bytes))
        out[shape.name] = {"block_bytes": shape.block_bytes, **_of_shape(run, plan, calls)}
    return out


def _of_shape(run: Run, plan: Plan, calls: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with run.tensor(plan) as (_, source):
        place = run.place()
        contestants = run.start_all(place, source, plan)
        with run.together(contestants, place):
            for contestant in run.each(contestants):
                with run.unless_it_fails(contestant):
                    contestant.move("write"), contestant.move("write"), contestant.move("read")
                    contestant.awake(False)
            seconds: dict[str, dict[str, list[float]]] = {}
            for _ in range(3):  # interleaved: a disturbance meets all of them
                for contestant in run.each(contestants):
                    mine = seconds.setdefault(contestant.name, {"write": [], "read": []})
                    with run.unless_it_fails(contestant):
                        contestant.awake(True)
                        for mode, all_of_it in mine.items():
                            # The others' blocks stay: only the first process works.
                            told = {"mode": mode, "count": calls // 3}
                            all_of_it += contestant.tell("latency", first_only=True, **told)[0]
                        contestant.awake(False)
            for contestant in run.each(contestants):
                with run.unless_it_fails(contestant):
                    contestant.awake(True)
                    run.checked(f"latency, {plan.shape.name}", contestant)
            found = {
                c.name: {
                    "moved_bytes": c.kind.moved_bytes(plan),
                    **{mode: _summary(values) for mode, values in seconds[c.name].items()},
                }
                for c in run.each(contestants)
            }
    return found


def _summary(seconds: list[float]) -> dict[str, Any]:
    us = np.array(seconds) * 1e6
    return {
        "p50_us": float(np.percentile(us, 50)),
        "p99_us": float(np.percentile(us, 99)),
        "calls": len(us),
        "percentiles_us": [float(np.percentile(us, p)) for p in range(0, 101, 2)],
    }
