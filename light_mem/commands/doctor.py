"""`light-mem doctor`: what usually goes wrong on a machine."""

from __future__ import annotations

import argparse

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from light_mem.commands import output
from light_mem.commands.arguments import Commands, add_command, path
from light_mem.doctor import FAIL, OK, WARN, Check, examine

DOCTOR = """\
Check this machine for what usually goes wrong: versions, kernel, limits, shared memory, swap, huge
pages, the container's memory limit; with a directory also its file system, free space and what it
can do, and the store if there is one. One line of advice each. Changes nothing.

Run it as the user of the server, and in its container.

examples:
  light-mem doctor
  light-mem doctor ./cache_storage
  light-mem doctor /mnt/nvme --json

exit code: 0 nothing that keeps a server from working, 1 something does, 2 no directory
"""
_STYLES = {OK: "green", WARN: "yellow", FAIL: "bold red"}


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command."""
    summary = "check the machine for what usually goes wrong"
    parser = add_command(commands, "doctor", run_doctor, summary, DOCTOR, store=False)
    parser.add_argument(
        "directory", metavar="DIR", nargs="?", type=path, help="a store, or where one is to be"
    )


def run_doctor(arguments: argparse.Namespace) -> int:
    """Show all checks."""
    checks = examine(arguments.directory)
    failed = [check for check in checks if check.status == FAIL]
    if arguments.json:
        output.write_json({"checks": [check._asdict() for check in checks]})
    else:
        console = output.console()
        console.print(_table(checks))
        warned = sum(check.status == WARN for check in checks)
        console.print(f"{len(checks)} checks, {warned} warnings, {len(failed)} failures")
    return output.FOUND if failed else output.CLEAN


def _table(checks: list[Check]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        said = Text(check.found)
        if check.advice:
            said.append(f"\n{check.advice}")
        table.add_row(Text(check.status, style=_STYLES[check.status]), Text(check.name), said)
    return table
