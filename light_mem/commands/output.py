"""Tables, JSON, progress bars, errors: how commands speak. Results go to standard output, progress
and errors to standard error."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from light_mem.descriptors import keep_standard_numbers
from light_mem.errors import LightMemError
from light_mem.maintenance.report import plain
from light_mem.sizes import bytes_text as bytes_text

CLEAN, FOUND, FAILED, INTERRUPTED = 0, 1, 2, 130  # exit codes
MAX_LISTED = 20  # of each kind of finding; --json lists them all


def guarded(name: str, run: Callable[[], int]) -> int:
    """Run a command; what it raises becomes one line on standard error and an exit code."""
    # The library tells of what it puts right; people who run a tool want to see it.
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"light-mem {name}: %(message)s"))
    log = logging.getLogger("light_mem")
    log.addHandler(handler)
    try:
        return run()
    except BrokenPipeError:
        raise
    # UnicodeError: a text of the user's or of the machine's; the library's own are no errors.
    except (LightMemError, OSError, UnicodeError) as error:
        complain(name, str(error))
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        log.removeHandler(handler)


def complain(name: str, text: str) -> None:
    """One line of a command on standard error."""
    Screen(stderr=True).print(Text(f"light-mem {name}: {text}", style="red"), soft_wrap=True)


def speak_anyway() -> None:
    """From now on a character that standard output or error cannot show is shown by its number:
    with an encoding of its own (PYTHONIOENCODING, a locale) a path or a bar would be an error.
    Where one of them is closed (`>&-`) what goes there is lost, and the exit code is as ever."""
    keep_standard_numbers()
    sys.stdout, sys.stderr = _or_nowhere(sys.stdout), _or_nowhere(sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):  # tests and programs put others there
            continue
        # "surrogateescape", of the locale C: the bytes of paths go out as they came, and no more.
        if stream.errors == "strict" or not shows("█", stream):
            stream.reconfigure(errors="backslashreplace")


def _or_nowhere(stream: TextIO | None) -> TextIO:
    # Python has None for a stream that was closed when it started.
    return stream or open(os.devnull, "w", encoding="utf-8")


class Screen(Console):
    """Where people read. What is said once nobody reads any more (`| head`) is lost, and the
    command goes on to its exit code: rich's own is 1, which means that something was found."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        forget(self.file)

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            if self.is_terminal:
                super().print(*objects, **options)
                return
            with self.capture() as shown:
                super().print(*objects, **options)
            # Tables end each line with blanks, which tools that read it would have to take away.
            self.file.write(re.sub(" +$", "", shown.get(), flags=re.MULTILINE))
            self.file.flush()
        except BrokenPipeError:  # also of a rich that leaves that to others, before 13.8
            self.on_broken_pipe()


def forget(stream: IO[str]) -> None:
    """Nobody reads a stream any more: what still goes there, at the latest when the interpreter
    ends, is lost."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def shows(text: str, stream: TextIO | None = None) -> bool:
    """Whether standard output, or another stream, can show these characters."""
    try:
        text.encode((stream or sys.stdout).encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return False
    return True


def write_json(report: Any, **more: Any) -> None:
    """One report as JSON on standard output."""
    try:
        sys.stdout.write(json.dumps({**plain(report), **more}, indent=2) + "\n")
    except BrokenPipeError:  # as for a Screen
        forget(sys.stdout)


def console() -> Console:
    """Standard output for people."""
    # Without a terminal rich would cut lines at 80 columns, keys and paths with them.
    return Screen(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)


def facts(rows: Iterable[tuple[str, str]], title: str) -> Table:
    """A table of names and values."""
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))  # no markup: paths may hold brackets
    return table


def listing(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[str] = (),
    limit: int = MAX_LISTED,
) -> Table:
    """A table of many rows, of which the first `limit` are shown."""
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows[:limit]:
        table.add_row(*map(Text, row))
    if len(rows) > limit:
        table.caption = f"... and {len(rows) - limit:,} more: --json lists them all"
        table.caption_justify = "left"
    return table


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on a terminal; None elsewhere."""
    shown = Console(stderr=True)
    if not shown.is_terminal:
        yield None
        return
    columns = TextColumn(what), BarColumn(), DownloadColumn(True), TransferSpeedColumn()
    with Progress(*columns, console=shown, transient=True) as progress:
        task = progress.add_task(what)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def unseen(seen: int, servers: int) -> list[Text]:
    """What is to be said where no server is `seen`, and of servers whose numbers cannot be read."""
    if not servers:
        return [] if seen else [Text("no server has it open")]
    what = "server has" if servers == 1 else "servers have"
    more = "more " if seen else ""
    of = "of another user or container: run this as that user, in that container"
    return [Text(f"{servers} {more}{what} it open, {of}")]


def seconds_text(seconds: float | None) -> str:
    """A duration with the unit that fits it."""
    if seconds is None:
        return "-"
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def share_text(share: float | None) -> str:
    """A share in percent."""
    return "-" if share is None else f"{share:.1%}"


def age_text(when: int | None) -> str:
    """How long ago a time, ns since 1970, was."""
    if when is None:
        return "-"
    seconds = time.time() - when / 1e9
    if seconds < 0:
        return "in the future"
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def count_text(count: int, what: str) -> str:
    """ "1 block", "2 blocks"."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def rate_text(nbytes: int, seconds: float) -> str:
    """A size, a time and what follows from them."""
    rate = f", {nbytes / seconds / 1e9:.2f} GB/s" if nbytes and seconds >= 0.01 else ""
    return f"{bytes_text(nbytes)} in {seconds:.2f} s{rate}"
