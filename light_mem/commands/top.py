"""`light-mem top`: the services of a store one by one, again and again."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from light_mem.commands import output
from light_mem.commands.arguments import Commands, add_command, add_interval
from light_mem.commands.output import seconds_text, share_text
from light_mem.engine.table_stats import MODES
from light_mem.monitor import Look, Rates, look, rates
from light_mem.monitor.rates import as_json, hit_rate
from light_mem.sizes import bytes_text

TOP = """\
Show the services that have a store open, a row each, and look again until Ctrl-C: workers that
live, blocks that wait, tasks that are not ready, bytes a second, time from create to ready, hits.
Reads files and shared memory; takes no lock, stops nobody.

examples:
  light-mem top ./cache_storage
  light-mem top ./cache_storage --interval 0.5
  light-mem top ./cache_storage --once
  light-mem top ./cache_storage --json

exit code: 0 shown, 2 no store, or it could not be read
"""
_SECONDS = 1.0

TOP_COLUMNS = (
    "pid",
    "workers",
    "queue",
    "tasks",
    "read/s",
    "written/s",
    "read p50",
    "p99",
    "write p50",
    "p99",
    "hit rate",
    "restarts",
    "command",
)


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_command(commands, "top", run_top, "watch the servers of a store", TOP)
    parser.add_argument("--once", action="store_true", help="two looks, one table; with --json too")
    add_interval(parser, _SECONDS, f"seconds between two looks ({_SECONDS:g})")


def run_top(arguments: argparse.Namespace) -> int:
    """Show the services."""
    before = look(arguments.store, ages=False)
    console = output.console()
    if arguments.once or arguments.json or not sys.stdout.isatty():
        time.sleep(arguments.interval)
        found = look(arguments.store, ages=False)
        if arguments.json:
            output.write_json(as_json(found, rates(before, found)))
        else:
            console.print(top_screen(found, rates(before, found)))
        return output.CLEAN
    with Live(top_screen(before, None), console=console, auto_refresh=False, screen=True) as live:
        live.refresh()
        while True:
            time.sleep(arguments.interval)
            found = look(arguments.store, ages=False)
            live.update(top_screen(found, rates(before, found)), refresh=True)
            before = found


def top_screen(look: Look, since: Rates | None) -> Group:
    """One line for the store, a row for each service."""
    store = look.store
    line = f"{time.strftime('%H:%M:%S', time.localtime(look.at))}  {store.directory}\n"
    if store.blocks is not None and store.used_slots is not None:
        full = store.used_slots / store.slots if store.slots else 0.0
        line += f"{store.blocks:,} blocks, {full:.1%} full, {store.evictions:,} evictions"
        if since is not None and since.store:
            line += f" ({since.store['evictions']:,.1f}/s)"
        line += f", {store.damaged:,} damaged"
    else:
        line += f"its index cannot be used: {store.index_state}"
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in TOP_COLUMNS[:-1]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(TOP_COLUMNS[-1])  # the one that gives way on a narrow terminal
    for row in top_rows(look, since):
        table.add_row(*map(Text, row[:-1]), Text(row[-1], no_wrap=True, overflow="ellipsis"))
    parts = [table] if look.servers else []
    return Group(Text(line), *parts, *output.unseen(len(look.servers), look.unseen))


def top_rows(look: Look, since: Rates | None) -> list[tuple[str, ...]]:
    """A row for each service, as TOP_COLUMNS; latencies and hit rate between the looks, or since
    the service was made where nothing happened in between."""
    rows: list[tuple[str, ...]] = []
    for server in look.servers:
        numbers = server.numbers
        gauges = numbers.gauges
        recent = since.servers.get(server.table_id) if since is not None else None
        latencies = since.latencies.get(server.table_id, {}) if since is not None else {}
        rate = hit_rate(recent) if recent is not None else None
        if rate is None:
            rate = hit_rate(numbers.counters)
        times: list[str] = []
        for mode in MODES:
            found = latencies.get(mode)
            if found is None or not found.number:
                found = numbers.latencies[mode]
            times += [seconds_text(found.quantile(q)) for q in (0.5, 0.99)]
        rows.append(
            (
                str(server.pid),
                f"{gauges['workers']}/{server.workers}",
                f"{gauges['read_queue'] + gauges['write_queue']:,}",
                f"{gauges['active_read_tasks'] + gauges['active_write_tasks']:,}",
                _bytes_rate(recent, "bytes_read"),
                _bytes_rate(recent, "bytes_written"),
                *times,
                share_text(rate),
                f"{numbers.counters['restarts']:,}",
                server.command,
            )
        )
    return rows


def _bytes_rate(rates: Mapping[str, float] | None, name: str) -> str:
    return "-" if rates is None else bytes_text(rates[name])
