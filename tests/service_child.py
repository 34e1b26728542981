"""Another process that a test talks to, line by line: a script, JSON both ways."""

from __future__ import annotations

import base64
import json
import os
import pickle
import selectors
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

_PRELUDE = """
import base64, json, os, pickle, sys, time
def say(*values): print(json.dumps(values), flush=True)
def hear(): return json.loads(sys.stdin.readline())
def unpack(text): return pickle.loads(base64.b64decode(text))
def pack(value): return base64.b64encode(pickle.dumps(value)).decode()
"""


def pack(value: object) -> str:
    """A picklable object as text; the child's `unpack` gives it back."""
    return base64.b64encode(pickle.dumps(value)).decode()


def unpack(text: str) -> Any:
    """What the child packed."""
    return pickle.loads(base64.b64decode(text))


class Child:
    """A running script. It hears what is said to it with `hear()` and answers with `say(...)`."""

    def __init__(self, script: str, *arguments: object, through: Sequence[str] = ()) -> None:
        """`through`: a command that runs the command that follows it, such as unshare."""
        program = [sys.executable, "-c", _PRELUDE + textwrap.dedent(script)]
        self.process = subprocess.Popen(
            [*through, *program, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self._rest = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    def say(self, *values: object) -> None:
        """Send one line."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(values).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self, seconds: float = 30.0) -> list[Any]:
        """The next line; fails when the child ends or stays silent."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                assert selector.select(seconds), f"the child said nothing for {seconds} s"
                piece = os.read(self.process.stdout.fileno(), 1 << 16)
                assert piece, f"the child ended with status {self.process.wait()}"
                self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        values: list[Any] = json.loads(line)
        return values

    def end(self, seconds: float = 30.0) -> int:
        """Wait for its end; returns the status."""
        return self.process.wait(seconds)

    def kill(self) -> None:
        """SIGKILL, and reaped."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
