"""`light-mem stats`: the numbers of a store and of the services that have it open, together."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from light_mem.commands import output
from light_mem.commands.arguments import Commands, add_command, add_interval
from light_mem.commands.output import seconds_text, share_text
from light_mem.engine.table_stats import MODES, summary
from light_mem.monitor import Look, Rates, StoreLook, look, rates
from light_mem.monitor.rates import as_json, hit_rate, together
from light_mem.sizes import bytes_text

STATS = """\
Show hits, misses, bytes, queues, latencies, evictions, damage and the ages of the blocks: of the
store, and of the services of all servers that have it open, together. Reads files and shared
memory; takes no lock, stops nobody. Servers of other users and containers are only counted.

With --interval or --watch there are rates too: what happened between two looks.

examples:
  light-mem stats ./cache_storage
  light-mem stats ./cache_storage --interval 5
  light-mem stats ./cache_storage --watch
  light-mem stats ./cache_storage --watch --json | jq .rates.servers.bytes_read

exit code: 0 shown, 2 no store, or it could not be read
"""
_WATCH_SECONDS = 2.0
_AGES_SECONDS = 10.0  # between two walks over the index while watching

_COUNTED = (  # name of the counter, what people call it
    ("queried", "hashes asked for"),
    ("hits", "hits"),
    ("misses", "misses"),
    ("read_tasks", "read tasks"),
    ("write_tasks", "write tasks"),
    ("blocks_read", "blocks read"),
    ("bytes_read", "bytes read"),
    ("blocks_written", "blocks written"),
    ("bytes_written", "bytes written"),
    ("present", "writes of stored blocks"),
    ("missing", "reads of missing blocks"),
    ("lost_races", "lost races"),
    ("damaged", "damaged blocks"),
    ("dropped_stores", "dropped stores"),
    ("failed", "failed blocks"),
    ("restarts", "worker restarts"),
)


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_command(
        commands, "stats", run_stats, "show hits, rates, queues and latencies", STATS
    )
    parser.add_argument("--watch", action="store_true", help="look again and again")
    add_interval(parser, None, f"seconds between two looks ({_WATCH_SECONDS:g} with --watch)")


def run_stats(arguments: argparse.Namespace) -> int:
    """Show the numbers, once or again and again."""
    found = look(arguments.store)
    if arguments.watch:
        return _watch(arguments, found)
    since: Rates | None = None
    if arguments.interval is not None:
        time.sleep(arguments.interval)
        before, found = found, look(arguments.store)
        since = rates(before, found)
    if arguments.json:
        output.write_json(as_json(found, since))
    else:
        output.console().print(stats_screen(found, since))
    return output.CLEAN


def _watch(arguments: argparse.Namespace, found: Look) -> int:
    """On a terminal each look takes the place of the last one, elsewhere it follows it; with --json
    a line a look. It ends with Ctrl-C or when nobody reads any more."""
    interval = arguments.interval or _WATCH_SECONDS
    walked = found.clock
    since: Rates | None = None
    console = output.console()
    in_place = console.is_terminal and not arguments.json
    with Live(console=console, auto_refresh=False) if in_place else nullcontext() as live:
        while not console.quiet:
            if arguments.json:
                sys.stdout.write(json.dumps(as_json(found, since)) + "\n")
                sys.stdout.flush()
            elif live is not None:
                live.update(stats_screen(found, since), refresh=True)
            else:
                console.print(stats_screen(found, since))
            time.sleep(interval)
            before = found
            walk = time.monotonic() - walked >= _AGES_SECONDS
            found = look(arguments.store, ages=walk)
            since = rates(before, found)
            if walk:
                walked = found.clock
            else:
                found = found._replace(store=found.store._replace(ages=before.store.ages))
    return output.CLEAN


# --- tables ---------------------------------------------------------------------------------------


def stats_screen(look: Look, since: Rates | None) -> Group:
    """The store, its services together, and the ages of its blocks."""
    parts: list[Table | Text] = [_store_table(look.store, since)]
    if look.servers:
        parts.append(_services_table(look, since))
        parts.append(_latency_table(look, since))
    parts += output.unseen(len(look.servers), look.unseen)
    if look.store.ages is not None and look.store.blocks:
        parts.append(_ages_table(look.store))
    return Group(*parts)


def _store_table(store: StoreLook, since: Rates | None) -> Table:
    table = _table(f"Store {store.directory}", ("", "now"), rates=since is not None)
    rates = since.store if since is not None else None
    if store.blocks is None or store.used_slots is None:
        table.add_row("index", f"cannot be used: {store.index_state}", *([""] if since else []))
        return table
    held, room = store.used_slots * store.page_bytes, store.slots * store.page_bytes
    full = f", {held / room:.1%} of {bytes_text(room)}" if room else ""
    _row(table, "blocks", f"{store.blocks:,}", None, rates)
    _row(table, "room used", f"{bytes_text(held)}{full}", None, rates)
    pinned = (store.pinned_slots or 0) * store.page_bytes
    _row(table, "pinned", f"{store.pinned_blocks or 0:,}, {bytes_text(pinned)}", None, rates)
    for name, what in (
        ("lookups", "hashes asked for, ever"),
        ("hits", "hits, ever"),
        ("inserts", "inserts, ever"),
        ("evictions", "evictions, ever"),
        ("damaged", "found damaged, ever"),
    ):
        _row(table, what, f"{getattr(store, name):,}", name, rates)
    return table


def _services_table(look: Look, since: Rates | None) -> Table:
    numbers = together([server.numbers for server in look.servers])
    several = len(look.servers) > 1
    title = f"{len(look.servers)} services" if several else f"Service in {look.servers[0].pid}"
    table = _table(title, ("", "since it was made"), rates=since is not None)
    rates = None
    if since is not None:
        rates = {name: since.of_all(name) for name in numbers.counters}
    for name, what in _COUNTED:
        value = numbers.counters[name]
        text = bytes_text(value) if name.startswith("bytes_") else f"{value:,}"
        _row(table, what, text, name, rates)
    rate = hit_rate(numbers.counters)
    recent = hit_rate(rates) if rates is not None else None
    now = [share_text(recent)] if rates is not None else []
    table.add_row("hit rate", share_text(rate), *now)
    wanted = sum(server.workers for server in look.servers)
    _row(table, "workers", f"{numbers.gauges['workers']} of {wanted}", None, rates)
    for mode in MODES:
        waiting, active = numbers.gauges[f"{mode}_queue"], numbers.gauges[f"active_{mode}_tasks"]
        text = f"{waiting:,} blocks wait, {active:,} tasks not ready"
        _row(table, f"{mode} queue", text, None, rates)
    return table


def _latency_table(look: Look, since: Rates | None) -> Table:
    title = "Tasks, from create to ready" + (f", last {since.seconds:.1f} s" if since else "")
    table = _table(title, ("", "tasks", "mean", "p50", "p90", "p99"), rates=False)
    ever = together([server.numbers for server in look.servers]).latencies
    for mode in MODES:
        found = summary(ever[mode] if since is None else since.latency_of_all(mode))
        times = [seconds_text(found[name]) for name in ("mean", "p50", "p90", "p99")]
        table.add_row(mode, f"{found['count']:,}", *times)
    return table


def _ages_table(store: StoreLook) -> Table:
    table = _table("Blocks by last use", ("", "blocks", "bytes", "share"), rates=False)
    total = max(1, sum(bucket.nbytes for bucket in store.ages or ()))
    last = 0
    for bucket in store.ages or ():
        below = bucket.below
        name = f"within {_age(below)}" if below is not None else f"longer than {_age(last)} ago"
        last = below or last
        if bucket.blocks:
            share = bucket.nbytes / total
            table.add_row(
                name, f"{bucket.blocks:,}", bytes_text(bucket.nbytes), f"{share:6.1%} {_bar(share)}"
            )
    return table


def _table(title: str, columns: Sequence[str], *, rates: bool) -> Table:
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD)
    for name in (*columns, "a second") if rates else columns:
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    return table


def _row(
    table: Table, what: str, text: str, name: str | None, rates: Mapping[str, float] | None
) -> None:
    if rates is None:
        table.add_row(what, text)
        return
    rate = rates.get(name) if name is not None else None
    if rate is None:
        shown = ""
    elif name is not None and name.startswith("bytes_"):
        shown = bytes_text(rate)
    else:
        shown = f"{rate:,.1f}"
    table.add_row(what, text, shown)


def _bar(share: float) -> str:
    return ("█" if output.shows("█") else "#") * round(share * 20)


def _age(seconds: int) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
