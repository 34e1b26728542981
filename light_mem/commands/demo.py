"""`light-mem demo`: a KV cache that survives its process, proved bit for bit."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile

from light_mem.commands.arguments import Commands, add_command, path
from light_mem.commands.output import Screen
from light_mem.errors import LightMemError

DEMO_HELP = """\
A prompt of a small transformer is computed, stored, and continued after a restart in another
process, which proves that not one bit of its logits differs from computing it again.

example:
  light-mem demo
  light-mem demo --store ./kv --tokens 8000 --workers 4    # run it twice: the store is kept

exit code: 0 all bits equal, 1 not equal, 2 the demo could not run
"""


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command."""
    summary = "show a KV cache that survives its process, and prove it bit for bit"
    demo = add_command(commands, "demo", run, summary, DEMO_HELP, store=False)
    demo.add_argument(
        "--store",
        metavar="DIR",
        type=path,
        help="where to store; kept (default: a temporary directory)",
    )
    demo.add_argument("--keep", action="store_true", help="keep the temporary directory too")
    demo.add_argument(
        "--tokens", type=int, default=4000, help="length of the prompt, in bytes (%(default)s)"
    )
    demo.add_argument(
        "--next", type=int, default=32, dest="steps", help="tokens to decode (%(default)s)"
    )
    demo.add_argument(
        "--workers", type=int, default=2, help="worker processes of the service (%(default)s)"
    )
    demo.add_argument("--threads", type=int, help="threads of the model (default: torch's own)")
    demo.add_argument("--seed", type=int, default=0, help="of weights and pages (%(default)s)")
    demo.add_argument(
        "--drop-page-cache",
        action="store_true",
        help="before the restart, ask the kernel to forget the store's files (Linux)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the demo."""
    # Before torch is loaded, here and in the second process. Threads that wait by spinning take
    # the core from those they wait for: on a busy machine that made the demo 25 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    # Here, not above: `light-mem --help` need not import torch.
    from light_mem.demo.plan import Plan
    from light_mem.demo.report import show
    from light_mem.demo.run import default_threads, run_demo

    console = Screen(stderr=arguments.json)  # with --json, standard output is JSON only
    store = arguments.store or tempfile.mkdtemp(prefix="light-mem-demo-")
    plan = Plan(
        store=store,
        tokens=arguments.tokens,
        steps=arguments.steps,
        workers=arguments.workers,
        seed=arguments.seed,
        threads=default_threads() if arguments.threads is None else arguments.threads,
    )
    is_to_go = arguments.store is None and not arguments.keep
    try:
        report = run_demo(plan, console, drop_cache=arguments.drop_page_cache)
        report.removed = is_to_go
    except (LightMemError, ValueError, RuntimeError, OSError) as error:
        Screen(stderr=True).print(f"light-mem demo: {error}", style="red", markup=False)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        if is_to_go:
            shutil.rmtree(store, ignore_errors=True)
    if arguments.json:
        sys.stdout.write(json.dumps(report.as_dict(), indent=2) + "\n")
    else:
        show(report, console)
    return 0 if report.equal else 1
