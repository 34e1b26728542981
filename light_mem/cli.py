"""`light-mem`: its sub-commands are in `light_mem/commands`, what they do is in the library."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from light_mem import __version__
from light_mem.commands import (
    change,
    demo,
    doctor,
    look,
    metrics,
    rebuild,
    stats,
    top,
    transfer,
    verify,
)
from light_mem.commands.arguments import take_late_hashes
from light_mem.commands.output import CLEAN, forget, guarded, speak_anyway
from light_mem.index.format import FORMAT_VERSION

COMMANDS = (demo, doctor, look, stats, top, metrics, verify, rebuild, transfer, change)

TEXT = """\
A persistent, multi-process disk tier for LLM KV caches: see it work, look into a store, watch
its servers, check it, mend it, move it.
"""
EXAMPLES = """\
examples:
  light-mem demo
  light-mem doctor ./cache_storage
  light-mem top ./cache_storage
  light-mem inspect ./cache_storage
  light-mem verify ./cache_storage --repair

COMMAND --help has more, and the exit codes; docs/tools.md has all of it.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    return run(COMMANDS, "light-mem", TEXT, EXAMPLES, argv)


def run(
    modules: Sequence[ModuleType],
    program: str,
    text: str,
    examples: str,
    argv: Sequence[str] | None,
) -> int:
    """Run one of the commands that these modules add."""
    speak_anyway()
    parser = argparse.ArgumentParser(
        prog=program,
        description=text,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"%(prog)s {__version__}, store format {FORMAT_VERSION}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in modules:
        module.add(commands)
    arguments, left = parser.parse_known_args(argv)
    try:
        left = take_late_hashes(arguments, left)
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument HASH: {error}")
    if left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    code = CLEAN  # of what goes on until nobody reads any more: `light-mem dump | head`
    try:
        code = guarded(arguments.name, lambda: arguments.command(arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        forget(sys.stdout)
    return code


if __name__ == "__main__":
    sys.exit(main())
