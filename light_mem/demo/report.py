"""What the demo shows at its end: times, the files of the store, the verdict."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from light_mem.demo.request import Answer, Stored


class Row(NamedTuple):
    """One request in the table; plain numbers, so that it can come from the other process."""

    request: str
    tokens_loaded: int
    tokens_computed: int
    bytes_loaded: int
    match_seconds: float
    load_seconds: float
    first_token_seconds: float

    @classmethod
    def of(cls, request: str, answer: Answer) -> Row:
        return cls(
            request,
            answer.loaded,
            answer.computed,
            answer.loaded_bytes,
            answer.match_seconds,
            answer.load_seconds,
            answer.first_token_seconds,
        )


class StoreFile(NamedTuple):
    name: str
    size: int  # bytes
    allocated: int  # bytes of disk: less than `size` where the file has holes


@dataclass
class Report:
    """Filled in while the demo runs."""

    tokens: int
    steps: int
    threads: int
    store: str
    removed: bool = False  # the store, by now
    page_bytes: int = 0
    restart_means: str = ""
    opened_seconds: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    stored: Stored | None = None
    stats: dict[str, Any] = field(default_factory=dict)
    files: list[StoreFile] = field(default_factory=list)
    pages_compared: int = 0
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        return not self.problems

    @property
    def verdict(self) -> str:
        if self.equal:
            return (
                f"logits and {self.steps} next tokens equal bit for bit: after restart, "
                "recomputed in the same new process, and in the first process"
            )
        found = "; ".join(f"{name}: {text}" for name, text in self.problems.items())
        return f"NOT EQUAL after restart ({found})"

    def as_dict(self) -> dict[str, Any]:
        plain = dict(vars(self))
        plain["rows"] = [row._asdict() for row in self.rows]
        plain["files"] = [file._asdict() for file in self.files]
        plain["stored"] = self.stored._asdict() if self.stored else None
        return {**plain, "equal": self.equal, "verdict": self.verdict}


def store_files(store: Path) -> list[StoreFile]:
    found = []
    for path in sorted(path for path in store.rglob("*") if path.is_file()):
        status = path.stat()
        # st_blocks counts 512 bytes, whatever the file system's block size.
        file = StoreFile(str(path.relative_to(store)), status.st_size, status.st_blocks * 512)
        found.append(file)
    return found


def drop_page_cache(store: Path) -> None:
    """Ask the kernel to forget the cached pages of the store's files (Linux).

    It forgets only what is on the device and mapped by nobody: hence the fsync, and hence only
    between two services.
    """
    for path in (path for path in store.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def show(report: Report, console: Console) -> None:
    console.print(requests_table(report.rows))
    console.print(
        "TTFT: from the request to its first token on an open service: look-up, load, the rest "
        "of the prefill, argmax. Faster: than the quicker of cold and no cache.\n"
        f"After restart: {report.restart_means}.",
        style="dim",
    )
    if report.stored is not None:
        done = report.stored
        again = f", {done.already} of them stored before" if done.already else ""
        console.print(
            f"Stored {done.pages} pages ({megabytes(done.bytes)}) in {done.seconds * 1e3:.0f} ms, "
            f"{done.bytes / done.seconds / 1e9:.2f} GB/s{again}."
        )
    for process, seconds in report.opened_seconds.items():
        console.print(f"Opening the service, workers included, {process}: {seconds * 1e3:.0f} ms.")
    console.print(files_table(report))
    if report.stats:
        console.print(stored_line(report.stats))
    if report.equal:
        console.print(f"{report.pages_compared} loaded pages equal those recomputed.")
    console.print(report.verdict, style="bold green" if report.equal else "bold red")


def requests_table(rows: Sequence[Row]) -> Table:
    # Against the best request without a cache: what else ran on the machine must not flatter us.
    base = min((row.first_token_seconds for row in rows if not row.tokens_loaded), default=None)
    table = Table(
        title="One prompt, one request a line",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("request", no_wrap=True)
    names = ("tokens\nloaded", "tokens\ncomputed", "look-up\nms", "load\nms", "load\nGB/s")
    for name in (*names, "TTFT\nms", "faster"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        rate = row.bytes_loaded / row.load_seconds / 1e9 if row.load_seconds else 0.0
        table.add_row(
            row.request,
            f"{row.tokens_loaded:,}",
            f"{row.tokens_computed:,}",
            f"{row.match_seconds * 1e3:.1f}" if row.match_seconds else "-",
            f"{row.load_seconds * 1e3:.1f}" if row.bytes_loaded else "-",
            f"{rate:.2f}" if row.bytes_loaded else "-",
            f"{row.first_token_seconds * 1e3:,.0f}",
            f"{base / row.first_token_seconds:.1f}x" if base and row.tokens_loaded else "-",
        )
    return table


def files_table(report: Report) -> Table:
    gone = " (removed; --keep keeps it)" if report.removed else ""
    table = Table(
        title=Text(f"On disk: {report.store}{gone}"), title_justify="left", box=SIMPLE_HEAD
    )
    table.add_column("file")
    table.add_column("size (bytes)", justify="right")
    table.add_column("allocated", justify="right")
    for file in report.files:
        table.add_row(file.name, f"{file.size:,}", f"{file.allocated:,}")
    if report.files:
        size = sum(file.size for file in report.files)
        allocated = sum(file.allocated for file in report.files)
        table.add_section()
        table.add_row(f"{len(report.files)} files", f"{size:,}", f"{allocated:,}")
    return table


def stored_line(stats: Mapping[str, Any]) -> str:
    held = stats["used_slots"] * stats["page_bytes"]
    room = stats["slots"] * stats["page_bytes"]
    return (
        f"{stats['blocks']} blocks, {megabytes(held)} of {megabytes(room)} used, "
        f"{stats['shards']} shards, {stats['evictions']} evictions, {stats['damaged']} damaged."
    )


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
