"""`light-mem verify`: whether a store is whole; with --repair, what is not is put right."""

from __future__ import annotations

import argparse

from light_mem.commands import output
from light_mem.commands.arguments import Commands, add_command, count
from light_mem.maintenance.report import VerifyReport
from light_mem.maintenance.verifying import verify

TEXT = """\
Read every block and compare it with its checksum; compare files, index, records and counters with
each other. Servers may go on meanwhile. Without --repair nothing is changed. With it, damaged
blocks are dropped (a cache then misses them) and everything else is put in order; no sound block
is lost.

examples:
  light-mem verify ./cache_storage
  light-mem verify ./cache_storage --repair
  light-mem verify ./cache_storage --json > report.json || echo "damage, or worse: $?"

exit code: 0 clean, 1 damage was found (and with --repair put right, unless it says otherwise),
2 it could not be checked
"""


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_command(commands, "verify", run, "read everything and report damage", TEXT)
    parser.add_argument("--repair", action="store_true", help="drop damaged blocks, mend the rest")
    parser.add_argument(
        "--jobs",
        metavar="N",
        type=count,
        help="threads or processes that read (default: one a core, up to 8)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Verify a store."""
    with output.bar("verify") as progress:
        report = verify(
            arguments.store, repair=arguments.repair, jobs=arguments.jobs, progress=progress
        )
    if arguments.json:
        output.write_json(report, clean=report.clean, sound=report.sound)
    else:
        show(report, arguments.repair)
    return output.CLEAN if report.clean else output.FOUND


def show(report: VerifyReport, repair: bool) -> None:
    """The report for people."""
    console = output.console()
    if report.damaged:
        rows = [
            (b.key, str(b.shard), str(b.slot), f"{b.nbytes:,}", b.problem) for b in report.damaged
        ]
        names = ("key", "shard", "slot", "bytes", "problem")
        console.print(output.listing("Damaged blocks", names, rows, right=names[1:4]))
    for title, findings in (("Found", report.findings), ("Left", report.remaining)):
        if findings:
            found = [
                (f.kind, "-" if f.shard < 0 else str(f.shard), f.key or "-", f.problem)
                for f in findings
            ]
            console.print(output.listing(title, ("kind", "shard", "key", "problem"), found))
    for note in report.unfinished:
        console.print(f"unfinished, no damage: {note}")
    if report.changed:
        console.print(f"{output.count_text(report.changed, 'block')} changed while being read")
    blocks = output.count_text(report.blocks, "block")
    console.print(f"{blocks} read, {output.rate_text(report.nbytes, report.seconds)}")
    console.print(verdict(report, repair), style="green" if report.sound else "bold red")


def verdict(report: VerifyReport, repair: bool) -> str:
    """The last line."""
    if report.clean:
        return "clean"
    found = []
    if report.damaged:
        found.append(output.count_text(len(report.damaged), "damaged block"))
    if report.findings:
        what = "other finding" if report.damaged else "finding"
        found.append(output.count_text(len(report.findings), what))
    text = " and ".join(found)
    if any(finding.kind == "foreign" for finding in report.findings):
        return f"{text}; put the right file back: --repair does nothing while there is another's"
    if not repair:
        does = "drops the damaged blocks" if report.damaged else "puts it in order"
        more = " and puts the rest in order" if len(found) == 2 else ""
        return f"{text}; --repair {does}{more}"
    return f"{text}, all put right" if report.sound else f"{text}, not all put right: see above"
