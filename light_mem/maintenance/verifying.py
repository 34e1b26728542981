"""The check of a whole store: files, structure, every byte; and its repair on request.

A store in use may be checked: nothing is locked but a shard in which something looked wrong, for
the milliseconds that a second look takes. Without `repair` not one byte of any file changes.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from light_mem.blocks import whole_number, yes_or_no
from light_mem.errors import (
    StoreBusyError,
    StoreDamagedError,
    StoreFormatError,
    StoreFullError,
)
from light_mem.maintenance.data import DataCheck, Progress
from light_mem.maintenance.owners import Ownership, named_by_owners
from light_mem.maintenance.repairing import Repair, prepare_files
from light_mem.maintenance.report import Finding, VerifyReport
from light_mem.maintenance.store import Snapshot, Store
from light_mem.maintenance.structure import StructureCheck

log = logging.getLogger("light_mem")


def verify(
    directory: str | os.PathLike[str],
    *,
    repair: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check everything in a store; with `repair`, drop damaged blocks and put the rest in order.

    Any process may call it, also while servers use the store. `jobs` threads or processes read
    (default: one a core, at most 8); `progress` is called some ten times a second. A repair can be
    interrupted and run again. Raises StoreFormatError when there is no store, StoreBusyError when
    its index is replaced during the check, LockTimeoutError when a stopped process holds a shard's
    lock.
    """
    yes_or_no("repair", repair)
    if jobs is not None:
        jobs = whole_number("jobs", jobs, 1, 1024)
    started = time.monotonic()
    store = Store(directory)
    findings = store.file_findings()
    foreign = any(finding.kind == "foreign" for finding in findings)
    if repair and not foreign:
        prepare_files(store, findings)
        store = Store(directory)
    structure: list[Finding] = []
    unfinished = unfinished_of(store)
    with DataCheck(store, jobs) as data:
        for shard in range(store.geometry.shards):
            if store.usable:
                snapshot, found, interrupted = check_structure(store, shard)
                structure += found
                if interrupted:
                    unfinished.append(interrupted)
                data.add(shard, snapshot.entries)
            else:
                data.add(shard, store.table(shard))
        result = data.run(progress)
    found_all = [*findings, *structure]
    repaired, remaining = 0, found_all
    if repair and (found_all or result.damaged) and not foreign:
        try:
            with Repair(store.directory) as repairs:
                repaired = repairs.run(result.damaged, structure)
        except (StoreBusyError, StoreFormatError, StoreFullError) as error:
            log.warning("store %s cannot be opened for repair: %s", store.directory, str(error))
        remaining = _remaining(store.directory)
        repaired += len(found_all) - len(remaining)
    return VerifyReport(
        str(store.directory),
        result.blocks,
        result.nbytes,
        result.changed,
        tuple(result.damaged),
        tuple(found_all),
        tuple(unfinished),
        max(0, repaired),
        tuple(remaining) if repair else (),
        time.monotonic() - started,
    )


def check_structure(store: Store, shard: int) -> tuple[Snapshot, list[Finding], str]:
    """A snapshot of a shard, what is wrong in it, and what a killed process left unfinished.

    The first look takes no lock and may see a change half made; what it suspects is looked at
    again with the shard held still.
    """
    snapshot = store.snapshot(shard)
    if not snapshot.dirty:
        named = named_by_owners(store.directory)
        if not StructureCheck(snapshot, store.geometry, named).findings():
            return snapshot, [], ""
    with store.held(shard):
        snapshot = store.snapshot(shard)
        named = named_by_owners(store.directory)
    store.require_unchanged()
    # Nobody was at work, so a dirty mark is that of a holder who died; the next one sees to it.
    findings = StructureCheck(snapshot, store.geometry, named, not snapshot.dirty).findings()
    interrupted = f"shard {shard}: its holder died while changing it" if snapshot.dirty else ""
    return snapshot, findings, interrupted


def _remaining(directory: Path) -> list[Finding]:
    store = Store(directory)
    found = store.file_findings()
    if store.usable:
        for shard in range(store.geometry.shards):
            found += check_structure(store, shard)[1]
    return found


def unfinished_of(store: Store) -> list[str]:
    """What killed processes left behind, in words: no damage, the next open sees to it."""
    notes = []
    ownership = Ownership(store.directory)
    for owner in ownership.dead:
        notes.append(f"{owner.kind} {owner.pid} died with the store open; its slots go back")
    for path in sorted(store.directory.glob("*.tmp")):
        notes.append(f"{path.name} was never renamed")
    if store.usable and not store.trustworthy and not ownership.alive:
        notes.append("the machine went down with the index unsynced: it is made anew when opened")
    return notes


def check(directory: str | os.PathLike[str], repair: bool = False) -> VerifyReport:
    """`verify` for programs, with three outcomes.

    clean      returns a report with `clean`
    repaired   (`repair=True`) returns a report with `repaired` > 0
    damaged    raises StoreDamagedError, its attribute `report` the VerifyReport: damage was found
               that `repair` was not asked to, or could not, put right

    Raises as `verify` when it cannot check at all. Any process, also while servers use the store.
    """
    report = verify(directory, repair=repair)
    if report.clean or (repair and report.sound):
        return report
    what = f"{len(report.damaged)} damaged blocks, {len(report.findings)} other findings"
    if repair:
        what += f", of which {report.repaired} were put right"
    first = next((f.problem for f in report.remaining or report.findings), "")
    first = first or next((f"block {d.key}: {d.problem}" for d in report.damaged), "")
    raise StoreDamagedError(f"the store {directory}: {what}; {first}", report=report)
