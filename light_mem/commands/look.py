"""`light-mem inspect` and `light-mem dump`: what is in a store. Neither changes a byte."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from itertools import islice
from pathlib import Path

from light_mem.commands import output
from light_mem.commands.arguments import HASH_HELP, Commands, add_command, count, file, hash_value
from light_mem.index import keys as keymath
from light_mem.maintenance.inspecting import blocks, inspect, listed
from light_mem.maintenance.reading import BlockReader
from light_mem.maintenance.report import BlockReport, StoreReport, plain
from light_mem.maintenance.store import Store

INSPECT = """\
Show what a store is and holds: format, shards, capacity, blocks, bytes, ages, look-ups, hits and
evictions, and who has it open. Takes no lock and changes nothing; servers may go on meanwhile.

examples:
  light-mem inspect ./cache_storage
  light-mem inspect ./cache_storage --shards
  light-mem inspect ./cache_storage --json | jq .blocks

exit code: 0 shown, 2 no store, or it could not be read
"""

DUMP = f"""\
List the stored blocks, or show one. With --output, write the bytes of one block to a file; they
are checked first. Takes no lock and changes nothing; servers may go on meanwhile.

{HASH_HELP}

examples:
  light-mem dump ./cache_storage --limit 10
  light-mem dump ./cache_storage prefix-1
  light-mem dump ./cache_storage int:42 --output block.bin

exit code: 0 shown, 1 not stored, or its bytes are damaged, 2 no store, or it could not be read
"""


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add both commands."""
    parser = add_command(
        commands, "inspect", run_inspect, "show what a store is and holds", INSPECT
    )
    parser.add_argument("--shards", action="store_true", help="a line for each shard too")
    parser = add_command(commands, "dump", run_dump, "list stored blocks, or show one", DUMP)
    parser.add_argument("hash", metavar="HASH", nargs="?", type=hash_value, help="one block")
    parser.add_argument("--output", metavar="FILE", type=file, help="write its bytes to a new file")
    parser.add_argument("--limit", metavar="N", type=count, help="list at most N blocks")


# --- inspect --------------------------------------------------------------------------------------


def run_inspect(arguments: argparse.Namespace) -> int:
    """Show a store."""
    report = inspect(arguments.store)
    if arguments.json:
        output.write_json(report)
        return output.CLEAN
    console = output.console()
    console.print(output.facts(_facts(report), f"Store {report.directory}"))
    if arguments.shards:
        rows = [[f"{value:,}" for value in shard] for shard in report.by_shard]
        names = report.by_shard[0]._fields
        console.print(output.listing("Shards", names, rows, right=names, limit=len(rows)))
    rows = [[str(o.pid), o.kind, _when(o.joined), o.command] for o in report.owners]
    if rows:
        console.print(output.listing("Open in", ("pid", "kind", "since", "command"), rows))
    for note in report.unfinished:
        console.print(f"unfinished: {note}")
    return output.CLEAN


def _facts(r: StoreReport) -> list[tuple[str, str]]:
    used = r.used_slots * r.page_bytes
    full = used / r.capacity if r.capacity else 0.0
    rows = [
        ("format", f"version {r.format_version}, store {r.store_id}"),
        ("shards", f"{r.shards} of {r.slots:,} slots of {r.page_bytes:,} bytes"),
        ("capacity", f"{output.bytes_text(r.capacity)}, {r.shards * r.slots:,} pages"),
        ("blocks", f"{r.blocks:,}, {output.bytes_text(r.block_bytes)}"),
        ("room used", f"{output.bytes_text(used)}, {full:.1%}"),
        ("pinned", f"{r.pinned_blocks:,}, {output.bytes_text(r.pinned_slots * r.page_bytes)}"),
        ("expired", output.count_text(r.expired_blocks, "block")),
        ("being written", output.count_text(r.writing_blocks, "block")),
        ("held by views", output.count_text(r.held_blocks, "block")),
        ("last used", _ages(r.newest_use, r.median_use, r.oldest_use)),
        ("written", _ages(r.newest_write, None, r.oldest_write)),
    ]
    if r.lookups is not None and r.hits is not None:
        rate = f", {r.hits / r.lookups:.1%}" if r.lookups else ""
        rows.append(("look-ups", f"{r.lookups:,}, {r.hits:,} hits{rate}"))
        rows.append(("inserts", f"{r.inserts:,}"))
        rows.append(("evictions", f"{r.evictions:,}"))
        rows.append(("removals", f"{r.removals:,}, {r.damaged:,} of them found damaged"))
    size = f"{output.bytes_text(r.index_bytes)}, {r.index_bytes_a_slot} bytes a slot"
    rows.append(("index", size if r.index_state == "ok" else f"cannot be used: {r.index_state}"))
    rows.append(("open in", f"{len(r.owners)} process{'' if len(r.owners) == 1 else 'es'}"))
    return rows


def _ages(newest: int | None, median: int | None, oldest: int | None) -> str:
    if newest is None:
        return "-"
    between = f", half of them {output.age_text(median)} or later" if median is not None else ""
    return f"{output.age_text(newest)} to {output.age_text(oldest)}{between}"


def _when(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).isoformat(" ", "seconds")


# --- dump -----------------------------------------------------------------------------------------


def run_dump(arguments: argparse.Namespace) -> int:
    """List blocks, or show one."""
    if arguments.hash is not None:
        return _dump_one(arguments)
    if arguments.output is not None:
        output.complain("dump", "--output needs a HASH")
        return output.FAILED
    found = islice(blocks(arguments.store), arguments.limit)
    if arguments.json:
        output.write_json({"blocks": plain(list(found))})
        return output.CLEAN
    # By hand: a table of rich is laid out as a whole, and there may be millions of blocks.
    line = "{:32}  {:>5}  {:>9}  {:>5}  {:>4}  {:>13}  {:16}  {:19}  {}\n"
    names = ("key", "shard", "slot", "pages", "runs", "bytes", "checksum", "last used", "written")
    sys.stdout.write(line.format(*names))
    for block in found:
        numbers = f"{block.nbytes:,}"
        times = _when(block.used / 1e9), _when(block.written / 1e9) if block.written else "-"
        row = (block.key, block.shard, block.slot, block.pages, len(block.runs), numbers)
        sys.stdout.write(line.format(*row, block.checksum, *times))
    return output.CLEAN


def _dump_one(arguments: argparse.Namespace) -> int:
    found = next(blocks(arguments.store, [arguments.hash]), None)
    if found is None:
        key = keymath.key_text(*keymath.as_key(arguments.hash))
        given = str(arguments.hash)
        named = key if given == key else f"{given} (key {key})"
        output.complain("dump", f"block {named} is not stored")
        return output.FOUND
    problem, data = _bytes(arguments)
    if arguments.output is not None and not problem:
        _write_new(arguments.output, data)
    if arguments.json:
        output.write_json(found, problem=problem)
    else:
        table = output.facts(_block_facts(found, problem), f"Block {found.key}")
        output.console().print(table)
    return output.FOUND if problem else output.CLEAN


def _write_new(path: Path, data: bytes) -> None:
    # "x": a file that is there may be something else's.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    except BaseException:  # no room: the next call would find it there, and without its bytes
        path.unlink(missing_ok=True)
        raise


def _bytes(arguments: argparse.Namespace) -> tuple[str, bytes]:
    store = Store(arguments.store)
    reader = BlockReader(store)
    try:
        for part in listed(store, keymath.as_keys([arguments.hash])):
            for n in range(len(part.heads)):
                found = reader.read(part, n)
                return (
                    "it was taken out meanwhile" if found.changed else found.problem
                ), found.data
    finally:
        reader.close()
    return "it was taken out meanwhile", b""


def _block_facts(block: BlockReport, problem: str) -> list[tuple[str, str]]:
    runs = ", ".join(f"{start} to {start + length - 1}" for start, length in block.runs)
    return [
        ("shard", str(block.shard)),
        ("slots", runs),
        ("pages", str(block.pages)),
        ("bytes", f"{block.nbytes:,}"),
        ("checksum", f"{block.checksum}, {problem or 'the bytes fit it'}"),
        ("last used", f"{_when(block.used / 1e9)}, {output.age_text(block.used)}"),
        ("written", _when(block.written / 1e9) if block.written else "it has no record"),
        ("kept", _kept(block)),
    ]


def _kept(block: BlockReport) -> str:
    until = "until it is evicted"
    if block.expires is not None:
        over = block.expires <= time.time_ns()
        until = ("expired at " if over else "until ") + _when(block.expires / 1e9)
    return f"pinned; then {until}" if block.pinned else until
