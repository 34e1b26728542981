"""`light-mem resize`, `clear` and `evict`: they take blocks out, and only those asked for."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from light_mem.commands import output
from light_mem.commands.arguments import Commands, add_command, add_dry_run, age, size
from light_mem.maintenance.changing import clear, evict, resize
from light_mem.maintenance.report import ChangeReport

RESIZE = """\
Give a store another size. No other process may have it open. A larger store keeps all blocks. In
a smaller one the blocks last used that fit stay, moved to the front where needed; the others go.
Can be interrupted at any moment and run again.

examples:
  light-mem resize ./cache_storage --storage-size 200G
  light-mem resize ./cache_storage --storage-size 50G --dry-run

exit code: 0 done, 2 it could not be done: the store keeps its size. It keeps its blocks as well,
unless a server opened it, or a lock was not let go, while they were being moved already
"""

CLEAR = """\
Take all blocks out of a store; its files keep their size. Servers may go on meanwhile. Can be
interrupted at any moment and run again.

examples:
  light-mem clear ./cache_storage --dry-run
  light-mem clear ./cache_storage

exit code: 0 done, 2 it could not be done
"""

EVICT = """\
Take out the blocks that nobody has looked up for a time: 90s, 30m, 2h, 7d or 2w. Servers may go on
meanwhile; what they use stays. Can be interrupted at any moment and run again.

examples:
  light-mem evict ./cache_storage --older-than 7d --dry-run
  light-mem evict ./cache_storage --older-than 12h

exit code: 0 done, 2 it could not be done
"""


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the three commands."""
    parser = add_command(commands, "resize", run_resize, "give a store another size", RESIZE)
    parser.add_argument(
        "--storage-size", metavar="SIZE", type=size, required=True, help="bytes of pages, like 10G"
    )
    add_dry_run(parser)
    add_dry_run(add_command(commands, "clear", run_clear, "take all blocks out", CLEAR))
    parser = add_command(commands, "evict", run_evict, "take out what is long unused", EVICT)
    parser.add_argument(
        "--older-than", metavar="TIME", type=age, required=True, help="unused for so long, like 7d"
    )
    add_dry_run(parser)


def run_resize(arguments: argparse.Namespace) -> int:
    """Resize a store."""
    return _run(
        arguments,
        lambda: resize(arguments.store, arguments.storage_size, dry_run=arguments.dry_run),
    )


def run_clear(arguments: argparse.Namespace) -> int:
    """Clear a store."""
    return _run(arguments, lambda: clear(arguments.store, dry_run=arguments.dry_run))


def run_evict(arguments: argparse.Namespace) -> int:
    """Evict what is old."""
    return _run(
        arguments, lambda: evict(arguments.store, arguments.older_than, dry_run=arguments.dry_run)
    )


def _run(arguments: argparse.Namespace, change: Callable[[], ChangeReport]) -> int:
    report = change()
    if arguments.json:
        output.write_json(report)
        return output.CLEAN
    would = "would be " if report.dry_run else ""
    rows = [
        (f"{would}taken out", f"{report.removed:,}, {output.bytes_text(report.nbytes)}"),
        (f"{would}left", f"{report.blocks:,}"),
        ("storage size", f"{output.bytes_text(report.storage_size)}"),
        ("seconds", f"{report.seconds:.2f}"),
    ]
    if report.moved:
        rows.insert(1, ("moved", f"{report.moved:,}"))
    output.console().print(output.facts(rows, f"Store {report.directory}"))
    return output.CLEAN
