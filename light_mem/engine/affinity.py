"""Which CPUs each worker may run on.

Nodes and cores are read from /sys/devices/system, and of them only those that this process may use
count: its own affinity, which a container's cpuset limits, is where everything is taken from.
"""

from __future__ import annotations

import logging
import os
import reprlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain, zip_longest
from pathlib import Path

from light_mem.errors import InvalidArgumentError

log = logging.getLogger("light_mem")

SPREAD = "spread"
SYSTEM = Path("/sys/devices/system")

Cpus = tuple[int, ...]


def place_workers(worker_cpus: object, workers: int, system: Path = SYSTEM) -> list[Cpus] | None:
    """The CPUs of each worker, ascending; None: wherever the scheduler puts them.

    worker_cpus  None; "spread"; a CPU number a worker; or CPU numbers a worker
    workers      how many there are

    "spread" deals the workers over the NUMA nodes in turn and over each node's cores, one core
    with all its hardware threads a worker; with more workers than cores it begins again. Raises
    InvalidArgumentError for anything else, another number of workers, and CPUs that this process
    may not use; where the system knows no affinity "spread" is None, with a log line.
    """
    if worker_cpus is None:
        return None
    able = hasattr(os, "sched_setaffinity")
    if isinstance(worker_cpus, str):
        if worker_cpus != SPREAD:
            raise _wrong(worker_cpus)
        if not able:
            log.warning('worker_cpus "spread": this system binds no process to CPUs')
            return None
        cores = cores_of(os.sched_getaffinity(0), system)
        return [cores[number % len(cores)] for number in range(workers)]
    chosen = _parse(worker_cpus)
    if len(chosen) != workers:
        raise InvalidArgumentError(
            f"worker_cpus has {len(chosen)} elements for {workers} workers: give one a worker",
            worker_cpus=worker_cpus,
            num_workers=workers,
        )
    if not able:
        raise InvalidArgumentError(
            "worker_cpus: this system binds no process to CPUs", worker_cpus=worker_cpus
        )
    allowed = os.sched_getaffinity(0)
    missing = sorted(set(chain.from_iterable(chosen)) - allowed)
    if missing:
        raise InvalidArgumentError(
            f"worker_cpus names CPUs {missing}, this process may use {text_of(allowed)}",
            worker_cpus=worker_cpus,
            missing=missing,
            allowed=sorted(allowed),
        )
    return chosen


def bind(cpus: Sequence[int]) -> None:
    """Bind this process; a log line when the CPUs have gone meanwhile (cpuset, hot-plug)."""
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        log.warning("worker pid %d is not bound to CPUs %s: %s", os.getpid(), cpus, str(error))


def cores_of(allowed: Iterable[int], system: Path = SYSTEM) -> list[Cpus]:
    """The allowed CPUs by core, cores of different nodes in turn: first cores of all nodes, then
    the second ones. Every allowed CPU is in one of them."""
    allowed = set(allowed)
    nodes: dict[int, dict[Cpus, None]] = defaultdict(dict)
    node_of = _nodes(system)
    for cpu in sorted(allowed):
        siblings = _read_list(system / "cpu" / f"cpu{cpu}" / "topology" / "thread_siblings_list")
        core = tuple(sorted(allowed.intersection(siblings) | {cpu}))
        nodes[node_of.get(cpu, -1)][core] = None
    in_turn = zip_longest(*(nodes[node] for node in sorted(nodes)))
    return [core for turn in in_turn for core in turn if core is not None]


def _nodes(system: Path) -> dict[int, int]:
    found = {}
    for path in system.glob("node/node[0-9]*"):
        for cpu in _read_list(path / "cpulist"):
            found[cpu] = int(path.name[4:])
    return found


def _read_list(path: Path) -> set[int]:
    """The numbers of a list like "0-3,8"; none where the kernel does not say."""
    try:
        text = path.read_text()
    except OSError:
        return set()
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            found.update(range(int(first), int(last or first) + 1))
    return found


def text_of(cpus: Iterable[int]) -> str:
    """CPU numbers as the kernel writes them: "0-3,8"."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _parse(worker_cpus: object) -> list[Cpus]:
    if not isinstance(worker_cpus, Sequence) or isinstance(worker_cpus, bytes):
        raise _wrong(worker_cpus)
    chosen = []
    for each in worker_cpus:
        cpus = [each] if _is_number(each) else each
        if not isinstance(cpus, (Sequence, set, frozenset)) or isinstance(cpus, (str, bytes)):
            raise _wrong(worker_cpus)
        if not cpus or not all(map(_is_number, cpus)):
            raise _wrong(worker_cpus)
        chosen.append(tuple(sorted(set(cpus))))
    return chosen


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _wrong(worker_cpus: object) -> InvalidArgumentError:
    return InvalidArgumentError(
        f'worker_cpus is None, "{SPREAD}", a list of one CPU number a worker, or of one list of '
        f"CPU numbers a worker, not {reprlib.repr(worker_cpus)}",
        worker_cpus=worker_cpus,
    )
