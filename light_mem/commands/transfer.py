"""`light-mem export` and `light-mem import`: blocks between machines, as one file."""

from __future__ import annotations

import argparse

from light_mem.commands import output
from light_mem.commands.arguments import (
    HASH_HELP,
    Commands,
    add_command,
    add_dry_run,
    add_hashes,
    chosen_hashes,
    count,
    file,
    size,
)
from light_mem.index.keys import as_key, key_text
from light_mem.maintenance.exporting import export_store
from light_mem.maintenance.importing import import_store
from light_mem.maintenance.report import TransferReport

EXPORT = f"""\
Write all blocks of a store, or chosen ones, to one file with checksums, the last used first.
Servers may go on meanwhile. Blocks that are damaged are left out and reported. The file appears
under its name when it is whole and on the device.

{HASH_HELP}

examples:
  light-mem export ./cache_storage blocks.lmx
  light-mem export ./cache_storage blocks.lmx prefix-1 prefix-2
  light-mem export ./cache_storage blocks.lmx --hashes hot.txt --overwrite

exit code: 0 all written, 1 some were not stored or are damaged, 2 it could not be written
"""

IMPORT = """\
Store the blocks of an export. Each is verified before it can be found; damaged ones are passed
over and reported. What is stored already stays, so an import that was interrupted is run again.
Nothing is evicted: what finds no free room is left out, the longest unused first. The store may
have another number of shards; its pages must be of the same size.

examples:
  light-mem import ./cache_storage blocks.lmx
  light-mem import ./new_storage blocks.lmx --storage-size 100G --shards 8
  light-mem import ./cache_storage blocks.lmx --dry-run      # only check the file

exit code: 0 all blocks of the file are stored, 1 some are not, 2 it could not be done
"""


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add both commands."""
    parser = add_command(commands, "export", run_export, "write blocks to one file", EXPORT)
    parser.add_argument("file", metavar="FILE", type=file, help="the file to write")
    add_hashes(parser, "these blocks only (default: all)")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it is there")
    add_dry_run(parser)
    parser = add_command(commands, "import", run_import, "store the blocks of an export", IMPORT)
    parser.add_argument("file", metavar="FILE", type=file, help="an export")
    parser.add_argument(
        "--storage-size", metavar="SIZE", type=size, help="make the store if there is none: bytes"
    )
    parser.add_argument("--shards", metavar="N", type=count, help="... and its shards (1)")
    add_dry_run(parser)


def run_export(arguments: argparse.Namespace) -> int:
    """Export blocks."""
    hashes = chosen_hashes(arguments)
    with output.bar("export") as progress:
        report = export_store(
            arguments.store,
            arguments.file,
            hashes,
            overwrite=arguments.overwrite,
            dry_run=arguments.dry_run,
            progress=progress,
        )
    names = {key_text(*as_key(value)): str(value) for value in hashes or []}
    done = "would be written" if arguments.dry_run else "written"
    return _tell(report, arguments, done, names)


def run_import(arguments: argparse.Namespace) -> int:
    """Import blocks."""
    with output.bar("import") as progress:
        report = import_store(
            arguments.store,
            arguments.file,
            storage_size=arguments.storage_size,
            shards=arguments.shards,
            dry_run=arguments.dry_run,
            progress=progress,
        )
    done = "would be stored" if arguments.dry_run else "stored"
    return _tell(report, arguments, done, {}, changed="left out: expired by now")


def _tell(
    report: TransferReport,
    arguments: argparse.Namespace,
    done: str,
    names: dict[str, str],
    changed: str = "taken out while they were read",
) -> int:
    code = output.CLEAN if report.complete else output.FOUND
    if arguments.json:
        output.write_json(report, complete=report.complete)
        return code
    console = output.console()
    if report.damaged:
        rows = [[b.key, f"{b.nbytes:,}", b.problem] for b in report.damaged]
        columns = ("key", "bytes", "problem")
        console.print(output.listing("Damaged blocks, left out", columns, rows, right=["bytes"]))
    if report.missing:
        asked = [[names.get(key, ""), key] for key in report.missing]
        console.print(output.listing("Not stored", ["hash", "key"], asked))
    for problem in report.problems:
        console.print(f"{report.file}: {problem}", style="red")
    for number, what in (
        (report.present, "stored already"),
        (report.changed, changed),
        (report.no_room, "left out: no free room"),
    ):
        if number:
            console.print(f"{output.count_text(number, 'block')} {what}")
    blocks = output.count_text(report.blocks, "block")
    text = f"{blocks} {done}, {output.rate_text(report.nbytes, report.seconds)}"
    console.print(text, style="green" if report.complete else "")
    return code
