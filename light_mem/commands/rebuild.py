"""`light-mem rebuild`: the index made anew from the shard files."""

from __future__ import annotations

import argparse

from light_mem.commands import output
from light_mem.commands.arguments import Commands, add_command, add_dry_run
from light_mem.maintenance.owners import listing
from light_mem.maintenance.rebuilding import rebuild

TEXT = """\
Make the index of a store anew from its shard files, with the index missing, cut short or garbage.
The order of use is taken from the old index wherever it can be believed about a block; elsewhere
it is the order of writing. The new index gets its name in one step, so a kill changes nothing.

While a process has the store open this is refused. With --force the index is corrected in place,
under the running servers. The data itself is not read: `light-mem verify` does that.

examples:
  light-mem rebuild ./cache_storage --dry-run
  light-mem rebuild ./cache_storage
  light-mem verify ./cache_storage

exit code: 0 made (or would be), 1 made, but other processes must be restarted to see it,
2 it could not be made
"""


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_command(commands, "rebuild", run, "make the index anew from the shards", TEXT)
    add_dry_run(parser)
    parser.add_argument(
        "--force", action="store_true", help="also while other processes have the store open"
    )


def run(arguments: argparse.Namespace) -> int:
    """Rebuild an index."""
    report = rebuild(arguments.store, dry_run=arguments.dry_run, force=arguments.force)
    if arguments.json:
        output.write_json(report)
        return output.FOUND if report.restart else output.CLEAN
    by_writing = report.blocks - report.kept_order - report.adopted
    rows = [
        ("blocks", f"{report.blocks:,}, {output.bytes_text(report.nbytes)}"),
        ("order of use kept", f"{report.kept_order:,}"),
        ("... by time of writing", f"{by_writing:,}"),
        ("without a record, kept", f"{report.adopted:,}"),
        ("records not believed", f"{report.dropped:,}"),
        ("blocks lost", f"{report.lost:,}"),
        ("seconds", f"{report.seconds:.2f}"),
    ]
    title = "What the index would hold" if report.dry_run else "The new index"
    if report.in_place:
        title = "The index, corrected in place"
    console = output.console()
    console.print(output.facts(rows, f"{title}: {report.directory}"))
    if report.restart:
        console.print(
            f"these use another index until they are restarted: {listing(report.restart)}"
        )
        return output.FOUND
    return output.CLEAN
