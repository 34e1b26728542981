"""First fill, writes, cached read, mixed and cold read of one block shape, interleaved."""

from __future__ import annotations

import math
import tempfile
import time
from typing import Any

import numpy as np
import xxhash

from benchmark import cold, machine, ratios, rivals
from benchmark.contestant import Contestant
from benchmark.plan import Plan, Shape
from benchmark.run import Run
from benchmark.samples import Samples
from light_mem.engine.mapped_writes import SOON_SECONDS

# A small store that is written over and over: its slots are dirty, and mapped for writing. And the
# same when the device has all of it and nobody has written for a while, as in a large store.
AGAIN, CLEAN = "write, again", "write, clean slots"
WORK = ("first fill", AGAIN, CLEAN, "read", "mixed", "cold read")
_BASE_OF = {"first fill": AGAIN, "cold read": "read"}  # what of memory to memory they are shares of
_MOVES = {"first fill": "write", AGAIN: "write", CLEAN: "write", "cold read": "read"}
# These fill several times, each a new store. (To start each takes seconds.)
_FIRST_FILLS = ("lightmem", "bare", "plain", "cpp-lightmem")
_SETTLE_SECONDS = 0.3
_SECONDS = 0.5  # that a sample takes at least, in as many passes as it needs
_MOST_PASSES = 64
_QUICK = 0.1  # of such times


class WrongBytesError(RuntimeError):
    """A contestant did not give back what it was given."""


def bench_shape(run: Run, shape: Shape) -> dict[str, Any]:
    """Every contestant on the same tensor in the same page order; by contestant and work."""
    plan = run.plan(shape)
    with run.tensor(plan) as (kv, source):
        place = run.place()
        contestants = run.start_all(place, source, plan)
        with run.together(contestants, place):
            return _compare(run, kv, source, contestants, plan)


def _compare(
    run: Run, kv: Any, source: Any, contestants: list[Contestant], plan: Plan
) -> dict[str, Any]:
    shape = plan.shape
    samples = {c.name: {work: Samples() for work in WORK} for c in contestants}
    for contestant in contestants:
        contestant.awake(False)

    def turn(contestant: Contestant, work: str, passes: int = 1) -> None:
        what = _MOVES.get(work, work)
        contestant.awake(True)
        sample = run.meter.take(
            lambda: contestant.move(what, passes), passes * plan.nbytes, contestant.family
        )
        contestant.complete(what, passes)
        contestant.awake(False)
        samples[contestant.name][work].all.append(sample)

    for contestant in run.each(contestants):
        with run.unless_it_fails(contestant):
            _settle(run, plan)
            turn(contestant, "first fill")
            _prove(kv, contestant)
    for _ in range(0 if run.quick else 4):
        _fill_again(run, source, contestants, plan, samples)
    passes: dict[str, dict[str, int]] = {}
    for contestant in run.each(contestants):
        with run.unless_it_fails(contestant):
            # Passes on the way to the steady state are slower: slots that are written over are
            # faulted in by degrees. New files never have a steady state.
            for _ in range(run.warm if contestant.kind.in_place else 1):
                _awake(contestant, "write")
            _awake(contestant, "mixed"), _awake(contestant, "read")
            passes[contestant.name] = _passes(run, contestant)
    for _ in range(run.rounds):
        for contestant in run.each(contestants):
            with run.unless_it_fails(contestant):
                for work, count in passes[contestant.name].items():
                    turn(contestant, work, count)
    plainly: dict[str, Samples] = {}
    stayed: dict[str, float] = {}
    if run.has_device:
        _clean_turns(run, contestants, turn)
        for _ in range(min(run.rounds, 5)):
            for contestant in run.each(contestants):
                if contestant.name not in (rivals.BASE, rivals.UNTUNED):
                    with run.unless_it_fails(contestant):
                        stayed[contestant.name] = _cold_turn(run, contestant, plainly, turn)
    for contestant in run.each(contestants):
        with run.unless_it_fails(contestant):
            contestant.awake(True)
            run.checked(f"copies, {shape.name}", contestant)
    return {
        "block_bytes": shape.block_bytes,
        "pages": shape.pages,
        "bytes": plan.nbytes,
        "contestants": _summaries(samples, passes, stayed),
        "plain cold reads": {name: s.summary() for name, s in plainly.items()},
    }


def _awake(contestant: Contestant, what: str) -> float:
    contestant.awake(True)
    seconds = contestant.move(what)
    contestant.awake(False)
    return seconds


def _prove(kv: Any, contestant: Contestant) -> None:
    """Reads must give what was written: the tensor is cleared in between."""
    memory = np.asarray(kv)
    before = xxhash.xxh3_128_intdigest(memory.data)
    kept = memory.copy()
    memory[:] = 0
    contestant.awake(True)
    try:
        contestant.move("read")
    except BaseException:
        memory[:] = kept  # it is the others' as well
        raise
    if xxhash.xxh3_128_intdigest(memory.data) != before:
        memory[:] = kept
        if not contestant.check().get("lost"):
            raise WrongBytesError(f"{contestant.name} gave other bytes than it was given")
    contestant.awake(False)


def _settle(run: Run, plan: Plan) -> None:
    """Before a first fill: a contestant has been started for a moment, as in a server that loads a
    model; and the kernel has free memory at hand. A virtual machine may have given that back:
    then finding a page's memory on the host costs several times what the page costs here."""
    time.sleep(_SETTLE_SECONDS)
    piece = bytes(4 << 20)
    with tempfile.TemporaryFile(dir=run.directory) as scratch:
        for _ in range(0, 2 * plan.nbytes, len(piece)):
            scratch.write(piece)


def _fill_again(
    run: Run, source: Any, contestants: list[Contestant], plan: Plan, samples: dict[str, Any]
) -> None:
    """A first fill more, in stores of their own."""
    running = {c.name for c in run.each(contestants)}
    for kind in run.kinds:
        if kind not in _FIRST_FILLS:
            continue
        place = run.place()
        one = run.start(kind, place, source, plan)
        if one is None or one.name not in running:
            continue
        with run.together([one], place):
            _settle(run, plan)
            with run.unless_it_fails(one):
                sample = run.meter.take(lambda one=one: one.move("write"), plan.nbytes, one.family)
                samples[one.name]["first fill"].all.append(sample)


def _passes(run: Run, contestant: Contestant) -> dict[str, int]:
    """Passes that a sample of each work takes to be long enough."""
    long = _SECONDS * (_QUICK if run.quick else 1)
    seconds = {work: _awake(contestant, _MOVES.get(work, work)) for work in (AGAIN, "read")}
    seconds["mixed"] = max(seconds.values())
    return {
        work: max(1, min(_MOST_PASSES, math.ceil(long / max(taken, 1e-4))))
        for work, taken in seconds.items()
    }


def _clean_turns(run: Run, contestants: list[Contestant], turn: Any) -> None:
    """One pass each over slots that are on the device and that nobody wrote of late."""
    in_place = [contestant for contestant in contestants if contestant.kind.in_place]
    for _ in range(min(run.rounds, 5)):
        for contestant in run.each(in_place):
            machine.write_out(contestant.directory)
        # LightMem takes slots for such that are written again soon for so long.
        time.sleep((SOON_SECONDS + 0.5) * (_QUICK if run.quick else 1))
        for contestant in run.each(in_place):
            with run.unless_it_fails(contestant):
                turn(contestant, CLEAN)


def _cold_turn(run: Run, contestant: Contestant, plainly: dict[str, Samples], turn: Any) -> float:
    contestant.awake(True)

    def plain_reads() -> None:
        for name, read in cold.ways(contestant.directory).items():
            sample = run.meter.take(read, cold.size(contestant.directory), [])
            plainly.setdefault(name, Samples()).all.append(sample)
            cold.forget(contestant.directory)

    mine = contestant.name == "LightMem"
    stayed = contestant.forget(plain_reads if mine else lambda: None)
    time.sleep(_SETTLE_SECONDS)  # what was closed for that has been started for a moment
    turn(contestant, "cold read")
    contestant.rest()  # LightMem brings in what it has read past the page cache
    return stayed


def _summaries(
    samples: dict[str, dict[str, Samples]],
    passes: dict[str, dict[str, int]],
    stayed: dict[str, float],
) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {
        name: {work: s.summary() for work, s in by_work.items() if s.all}
        for name, by_work in samples.items()
    }
    base = found.get(rivals.BASE, {})
    for name, by_work in found.items():
        for work, summary in by_work.items():
            if share := ratios.between(summary, base.get(_BASE_OF.get(work, work))):
                summary["ratio"] = share.median
                summary["ratio_low"], summary["ratio_high"] = share.low, share.high
        by_work["passes a sample"] = passes.get(name, {})
        if name in stayed and "cold read" in by_work:
            by_work["cold read"]["stayed in page cache"] = stayed[name]
    return found
