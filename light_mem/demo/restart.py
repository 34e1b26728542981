"""The second process: `main` runs in it.

It knows the plan, the store's directory and the logits of the first process, nothing else. It
opens the store with page tensor, pages and workers of its own, continues from what it finds,
then computes the same request without the store and compares every bit. Progress and the result
are lines of JSON on standard output.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

from light_mem import allocate_kvcache
from light_mem.demo.plan import Engine, Plan, Progress
from light_mem.demo.proof import difference, read_logits
from light_mem.demo.report import Row
from light_mem.demo.request import answer


def restart(plan: Plan, logits_file: Path, sha256: str) -> dict[str, Any]:
    kvcache = allocate_kvcache(plan.num_pages, plan.config.page_bytes)
    engine = Engine(plan.config, kvcache, plan.threads)
    prompt = plan.prompt()
    opening = perf_counter()
    with plan.service(kvcache) as service:
        service.run()
        opened = perf_counter() - opening
        table = engine.allot(plan.pages, plan.seed + 3)
        found = answer(engine, service, prompt, table, plan.steps, report_progress("restart"))
    pages = found.loaded // plan.config.tokens_per_page
    loaded = kvcache[table[:pages]]  # a copy, before the pages are used again

    # The service is closed: nothing below can come from the store.
    engine.wipe()
    table = engine.allot(plan.pages, plan.seed + 4)
    again = answer(engine, None, prompt, table, plan.steps, report_progress("recompute"))
    first = read_logits(logits_file, sha256, plan.steps)

    recomputed = kvcache[table[:pages]]
    wrong_pages = int((loaded != recomputed).any(dim=1).sum())
    same_text = found.tokens == again.tokens == first.argmax(dim=1).tolist()
    problems = {
        "this process, without the store": difference(found.logits, again.logits),
        "the first process": difference(found.logits, first),
        "loaded pages": f"{wrong_pages} of {pages} pages" if wrong_pages else None,
        "next tokens": None if same_text else "other tokens",
        "use of the store": None if pages else "nothing was loaded from it",
    }
    return {
        "opened_seconds": opened,
        "rows": [
            Row.of("after restart", found)._asdict(),
            Row.of("no cache (proof)", again)._asdict(),
        ],
        "pages_compared": pages,
        "problems": {name: text for name, text in problems.items() if text is not None},
    }


def emit(kind: str, value: object) -> None:
    sys.stdout.write(json.dumps({kind: value}) + "\n")
    sys.stdout.flush()


def report_progress(request: str) -> Progress:
    def progress(stage: str, done: int, total: int) -> None:
        emit("progress", [request, stage, done, total])

    return progress


def main(config: dict[str, str]) -> None:
    """`config` is what `run.py` wrote."""
    plan = Plan.from_json(config["plan"])
    emit("result", restart(plan, Path(config["logits_file"]), config["sha256"]))
