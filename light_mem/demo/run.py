"""The whole demo, in the first process: cold, warm, restart, report."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from light_mem import allocate_kvcache
from light_mem.demo import restart
from light_mem.demo.plan import Engine, Plan, Progress, prompt_text
from light_mem.demo.proof import difference, write_logits
from light_mem.demo.report import Report, Row, drop_page_cache, store_files
from light_mem.demo.request import answer, store
from light_mem.engine import child_start


def run_demo(plan: Plan, console: Console, *, drop_cache: bool = False) -> Report:
    """Run all requests of the demo on the store of `plan` and return what was measured.

    Raises ValueError for a plan that makes no sense, RuntimeError when the second process fails;
    a result that is not equal is no exception: it is in the report.
    """
    check(plan, drop_cache)
    report = Report(
        plan.tokens,
        plan.steps,
        plan.threads,
        plan.store,
        page_bytes=plan.config.page_bytes,
        restart_means="a new process with new workers; the page cache of the store's files was "
        + ("dropped before it started" if drop_cache else "warm, as after any restart but a boot"),
    )
    introduce(plan, console)
    with tempfile.TemporaryDirectory(prefix="light-mem-proof-") as scratch, bars(console) as show:
        logits_file = Path(scratch) / "logits.f32"
        sha256 = first_process(plan, report, logits_file, show)
        if drop_cache:
            drop_page_cache(Path(plan.store))
        second_process(plan, report, logits_file, sha256, show)
    report.files = store_files(Path(plan.store))
    return report


def check(plan: Plan, drop_cache: bool) -> None:
    config, longest = plan.config, len(prompt_text())
    if not config.tokens_per_chunk < plan.tokens <= longest:
        raise ValueError(
            f"--tokens must be more than one chunk of the prefill, {config.tokens_per_chunk}, "
            f"and at most the length of the text, {longest}"
        )
    if min(plan.steps, plan.workers, plan.threads) < 1:
        raise ValueError("--next, --workers and --threads must be at least 1")
    if drop_cache and not hasattr(os, "posix_fadvise"):
        raise ValueError("--drop-page-cache needs posix_fadvise, which this system lacks")


def introduce(plan: Plan, console: Console) -> None:
    config = plan.config
    console.print(
        f"Model: {config.layers} layers of {config.dim}, {config.heads} heads on {config.kv_heads} "
        f"of keys and values, float32, random weights (seed {plan.seed}), {plan.threads} threads.\n"
        f"Prompt: the first {plan.tokens:,} bytes of light_mem/demo/text.txt, a token each; "
        f"{config.tokens_per_page} tokens a page of {config.page_bytes // 1024} KiB."
    )


def first_process(plan: Plan, report: Report, logits_file: Path, show: Bars) -> str:
    """Cold, store, warm; leaves the logits in `logits_file` and returns their SHA-256."""
    kvcache = allocate_kvcache(plan.num_pages, plan.config.page_bytes)
    engine = Engine(plan.config, kvcache, plan.threads)
    prompt = plan.prompt()
    opening = perf_counter()
    with plan.service(kvcache) as service:
        service.run()
        report.opened_seconds["first process"] = perf_counter() - opening

        table = engine.allot(plan.pages, plan.seed + 1)
        cold = answer(engine, service, prompt, table, plan.steps, on(show, "cold"))
        # A store that was kept knows the prompt already; then no request is cold but the last.
        name = "first (kept store)" if cold.loaded else "cold"
        report.rows.append(Row.of(name, cold))
        report.stored = store(engine, service, prompt, table)

        engine.wipe()
        table = engine.allot(plan.pages, plan.seed + 2)
        warm = answer(engine, service, prompt, table, plan.steps, on(show, "warm"))
        report.rows.append(Row.of("warm memory", warm))
        unequal = difference(cold.logits, warm.logits)
        if unequal is not None or not warm.loaded:
            report.problems["warm memory"] = unequal or "nothing was loaded"
        report.stats = service.stats()
    return write_logits(logits_file, cold.logits)


def second_process(plan: Plan, report: Report, logits_file: Path, sha256: str, show: Bars) -> None:
    """Start `light_mem.demo.restart`, follow its progress and add its result to the report."""
    config = {"plan": plan.to_json(), "logits_file": str(logits_file), "sha256": sha256}
    path = child_start.search_path()
    result: dict[str, Any] | None = None
    # What the child says on standard error must neither tear the progress bars nor fill a pipe.
    with (
        tempfile.TemporaryFile("w+") as complaints,
        child_start.command(restart.__name__, config, path) as (command, told),
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            pass_fds=[told],
            env=child_start.environment(os.environ),
        ) as child,
    ):
        assert child.stdout is not None
        followers: dict[str, Progress] = {}
        try:
            for line in child.stdout:
                message = json.loads(line)
                if "progress" in message:
                    request, stage, done, total = message["progress"]
                    follow = followers.get(request) or on(show, request)
                    followers[request] = follow
                    follow(stage, done, total)
                else:
                    result = message["result"]
        except BaseException:
            child.kill()  # Ctrl-C here; its workers die with it
            raise
        code = child.wait()
        complaints.seek(0)
        said = complaints.read().strip()
    if code != 0 or result is None:
        raise RuntimeError(f"the second process failed with exit code {code}:\n{said}")
    report.opened_seconds["after restart"] = result["opened_seconds"]
    report.rows += [Row(**row) for row in result["rows"]]
    report.pages_compared = result["pages_compared"]
    report.problems.update(result["problems"])


@contextmanager
def bars(console: Console) -> Iterator[Bars]:
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # Few refreshes: the thread that draws takes its time from the model's.
    with Bars(*columns, console=console, refresh_per_second=4) as show:
        yield show


def on(show: Bars, request: str) -> Progress:
    """A progress callback that gives each stage of a request a bar."""
    tasks: dict[str, Any] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = show.add_task(f"{request}: {stage}", total=total)
        show.update(tasks[stage], completed=done)

    return progress


def default_threads() -> int:
    """What torch would use by itself; fixed for both processes."""
    return torch.get_num_threads()
