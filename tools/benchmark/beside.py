"""Reads beside writes: how long one request's read takes while blocks to be written always wait.

A server stores what it has computed all the time; the read of a prefix is what a user waits for.
Of services only: the others have no queue in which a read could wait. Two depths of the queue: a
read that waits its turn behind what is queued takes ten times as long with ten times as much. Reads
are a closed loop: the next is asked for when the last is done, so a slow read delays those after it
and is one sample, not many.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmark.plan import SHAPES, Plan
from benchmark.run import Run

SERVICES = ("lightmem", "cpp-lightmem")
# Blocks of a read. Never so few bytes that `create` would read them itself.
CASES = [(SHAPES[0], 64), (SHAPES[3], 1), (SHAPES[1], 1), (SHAPES[1], 8)]
_SECONDS = 1.0  # of a sample
_DEPTHS = (0.1, 1.0)  # of `--gib`: the bytes of a pass, of which two are queued


def bench_beside(run: Run) -> dict[str, Any]:
    """Milliseconds of a read, and GB/s written meanwhile, by block shape, blocks of a read and
    bytes queued."""
    out: dict[str, Any] = {}
    for shape, count in CASES[:1] if run.quick else CASES:
        plans = [run.plan(shape, 2 * count + 2, depth * run.gib) for depth in _DEPTHS]
        for plan in dict.fromkeys(plans):  # once where both are the least there can be
            queued = 2 * (plan.blocks - count) * shape.block_bytes
            name = f"{shape.name}, {count} a read, {queued / 1e6:,.0f} MB queued"
            out[name] = {
                "read_bytes": count * shape.block_bytes,
                "queued_bytes": queued,
                **_of_case(run, plan, count, name),
            }
    return out


def _of_case(run: Run, plan: Plan, count: int, name: str) -> dict[str, Any]:
    found: dict[str, list[Any]] = {}
    with run.tensor(plan) as (_, source):
        place = run.place()
        kinds = [kind for kind in SERVICES if kind in run.kinds]
        # Two passes are under way at a time: with room for one they would evict what is read. (The
        # C++ LightMem has that room in any case.)
        room = {"storage": 2 * plan.nbytes + (4 << 20)}
        contestants = run.start_all(place, source, plan, kinds, room)
        with run.together(contestants, place):
            for contestant in contestants:
                for _ in range(run.warm):
                    contestant.move("write")
                contestant.move("read")
                contestant.awake(False)
            for _ in range(run.rounds):
                for contestant in contestants:
                    contestant.awake(True)
                    seconds = _SECONDS / 5 if run.quick else _SECONDS
                    contestant.tell("prepare_steady", mode="write", seconds=seconds, first=count)
                    found.setdefault(contestant.name, []).append(
                        contestant.tell("beside", count=count, seconds=seconds)[0]
                    )
                    contestant.awake(False)
            for contestant in contestants:
                contestant.awake(True)
                contestant.move("write")
                run.checked(f"beside, {name}", contestant)
    return {name: _summary(samples) for name, samples in found.items()}


def _summary(samples: list[Any]) -> dict[str, Any]:
    ms = np.array([second for seconds, _ in samples for second in seconds]) * 1e3
    return {
        "p50_ms": float(np.percentile(ms, 50)),
        "p99_ms": float(np.percentile(ms, 99)),
        "calls": len(ms),
        "written_GBps": float(np.median([rate for _, rate in samples])) / 1e9,
    }
