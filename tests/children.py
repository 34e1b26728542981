"""Other processes for tests: a few lines of code that say what they have done."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]


@contextmanager
def child(code: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that runs `code` with `path` and `say`; it is killed in the end."""
    program = (
        "import os, sys, time, pathlib\n"
        "from light_mem.index.locks import PathLock, RangeLock\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "def say(what): print(what, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program + code, str(path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    """The next thing that the child says."""
    assert process.stdout is not None
    return process.stdout.readline().strip()
