"""Tables for a terminal, ratios first."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmark import report_copies
from benchmark.machine import dirty_room
from benchmark.ratios import between
from benchmark.run import Run

_console = Console(width=None if Console().is_terminal else 132, highlight=False)


def show_machine(run: Run) -> None:
    """What the run is on, and how busy that was before."""
    of = run.results["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in of["versions"].items())
    _console.print(
        f"{of['cpu']}, {of['cores']} cores, {of['memory_GB']} GB, {of['system']}, "
        f"{of['file_system']}, Python {of['python']}\n{versions}\n"
        f"{run.workers} workers, {run.gib:g} GiB a pass, {run.rounds} rounds; load before: "
        f"{run.results['load_before_percent']:.0f}% of the CPUs"
    )
    dirty = len(run.kinds) * run.gib * 2**30
    if dirty > 0.9 * dirty_room():
        _console.print(
            f"[bold]The contestants keep up to {dirty / 1e9:.1f} GB dirty; beyond some "
            f"{dirty_room() / 1e9:.1f} GB the kernel slows writers down to the speed of the disk: "
            "use a smaller --gib, or fewer --contestants."
        )


def show_shape(run: Run, shape: str) -> None:
    """All contestants at one block shape."""
    report_copies.show(_console, shape, run.results["copies"][shape])


def _text(value: float | None, work: str, works: dict[str, Any]) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}{'~' if works.get(work, {}).get('noisy') else ''}"


def _dropped(works: dict[str, Any]) -> str:
    each = [w for w in works.values() if isinstance(w, dict)]
    return f"{sum(w['dropped'] for w in each)}/{sum(w['samples'] for w in each)}"


def show_part(run: Run, part: str) -> None:
    """The tables of one part; copies have had theirs."""
    found = run.results.get(part, {})
    if part == "latency":
        _show_latency(found)
    elif part == "beside":
        _show_beside(found)
    elif part == "tasks":
        _show_tasks(found)
    elif part in ("sizes", "bounds", "workers", "shards", "servers"):
        _show_growth(part, found)
    elif part in ("entries", "process"):
        _show_columns(part, found)


def _show_latency(found: dict[str, Any]) -> None:
    table = Table(title="one block at a time, us", title_justify="left", caption_justify="left")
    for name in ("block", "contestant", "write p50", "p99", "read p50", "p99"):
        table.add_column(name, justify="left" if name in ("block", "contestant") else "right")
    for shape, of_shape in found.items():
        for name, modes in of_shape.items():
            if isinstance(modes, dict):
                figures = [modes[m][p] for m in ("write", "read") for p in ("p50_us", "p99_us")]
                more = modes["moved_bytes"] / of_shape["block_bytes"]
                said = f"{name}: moves {more:.3g} times the bytes" if more > 1 else name
                table.add_row(shape, said, *(f"{f:,.0f}" for f in figures))
        table.add_section()
    table.caption = "Services are asked without a pause whether they are done."
    _console.print(table)


def _show_beside(found: dict[str, Any]) -> None:
    table = Table(
        title="reads while writes are queued", title_justify="left", caption_justify="left"
    )
    for name in ("blocks", "contestant"):
        table.add_column(name)
    for name in ("p50 ms", "p99 ms", "reads", "written GB/s"):
        table.add_column(name, justify="right")
    for case, of_case in found.items():
        for name, of in of_case.items():
            if isinstance(of, dict):
                figures = (f"{of['p50_ms']:.2f}", f"{of['p99_ms']:.2f}", f"{of['calls']:,}")
                table.add_row(case, name, *figures, f"{of['written_GBps']:.2f}")
        table.add_section()
    table.caption = (
        "Does it grow with what is queued? Closed loop: the next read comes when the last is done."
    )
    _console.print(table)


def _show_tasks(found: dict[str, Any]) -> None:
    table = Table(title="by blocks a task and tasks under way, GB/s", title_justify="left")
    for name in ("blocks", "contestant, a task, under way"):
        table.add_column(name)
    for name in ("write", "read", "write of LightMem", "read of LightMem", "dropped"):
        table.add_column(name, justify="right")
    for shape, of_shape in found.items():
        for name, works in of_shape.items():
            _, size, under_way = name.rsplit(", ", 2)
            ours = of_shape.get(f"LightMem, {size}, {under_way}", {})
            table.add_row(
                shape,
                name,
                *(_text(works[w]["GBps"], w, works) for w in ("write", "read")),
                *(str(between(works[w], ours.get(w)) or "-") for w in ("write", "read")),
                _dropped(works),
            )
        table.add_section()
    _console.print(table)


def _show_growth(part: str, found: dict[str, Any]) -> None:
    table = Table(title=f"by {part}", title_justify="left")
    for name in ("block", "contestant, number", "write of first", "read of first"):
        table.add_column(name)
    for name in ("write GB/s", "read GB/s", "dropped"):
        table.add_column(name, justify="right")
    for shape, of_shape in found.items():
        firsts: dict[str, dict[str, Any]] = {}
        for name, works in of_shape.items():
            first = firsts.setdefault(name.rsplit(",", 1)[0], works)
            table.add_row(
                shape,
                name,
                *(str(between(works[w], first[w])) for w in ("write", "read")),
                *(_text(works[w]["GBps"], w, works) for w in ("write", "read")),
                _dropped(works),
            )
        table.add_section()
    _console.print(table)


def _show_columns(part: str, found: dict[str, Any]) -> None:
    title = {"entries": "by entries in the store", "process": "by workers"}[part]
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in found:
        table.add_column(f"{int(name):,}", justify="right")
    for row in next(iter(found.values()), {}):
        values = [column.get(row) for column in found.values()]
        table.add_row(row, *(f"{v:,.2f}" if isinstance(v, float) else f"{v:,}" for v in values))
    _console.print(table)


def show_flatness(run: Run) -> None:
    """What growth costs, as shares of the smallest number."""
    found = run.results.get("flatness", {})
    if not found:
        return
    table = Table(title="cost of growth: share of what the first number has", title_justify="left")
    columns = list(dict.fromkeys(number for row in found.values() for number in row))
    table.add_column("")
    for number in columns:
        table.add_column(f"{int(number):,}", justify="right")
    for name, row in found.items():
        table.add_row(name, *(f"{row[n]:.2f}" if n in row else "" for n in columns))
    _console.print(table)


def show_end(run: Run) -> None:
    """Who took part and how, who is missing, the checks, the time."""
    table = Table(title="contestants", title_justify="left")
    for name in ("name", "how", "lacks or differs"):
        table.add_column(name)
    for kind, about in run.results.get("contestants", {}).items():
        if "missing" in about:
            table.add_row(kind, f"not installed: {about['missing']}", "")
        elif "failed" in about:
            table.add_row(about.get("name", kind), f"failed: {about['failed']}", "")
        else:
            table.add_row(f"{about['name']} {about['version']}", about["how"], about["lacks"])
    if table.row_count:
        _console.print(table)
    for line in report_copies.against(run.results):
        _console.print(line)
    _console.print(
        f"{len(run.results.get('checks', []))} checks of stores passed; "
        f"{run.results['seconds']:.0f} s in all"
    )
