"""A client, and a server to run it against: what the tests and `tools/bench_ttft.py` use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

_ROOT = Path(__file__).resolve().parents[2]


class Answer(NamedTuple):
    first_token_seconds: float  # from sending the request to its first event
    result: dict[str, Any]  # the last event: tokens, cached_tokens, pid, ...


def generate(url: str, timeout: float = 600.0, **request: Any) -> Answer:
    """POST /generate and read the stream to its end.

    Raises urllib.error.HTTPError when the request is refused, ConnectionError when the stream
    ends without a result because the process died.
    """
    body = json.dumps(request).encode()
    started = perf_counter()
    first = 0.0
    event: dict[str, Any] = {}
    with urllib.request.urlopen(f"{url}/generate", body, timeout) as response:
        for line in response:
            if line.startswith(b"data: "):
                first = first or perf_counter() - started
                event = json.loads(line[6:])
    if not event.get("done"):
        raise ConnectionError("the stream ended without a result")
    return Answer(first, event)


def get(url: str, path: str, timeout: float = 60.0) -> dict[str, Any]:
    """GET /health or /stats."""
    with urllib.request.urlopen(url + path, timeout=timeout) as response:
        found: dict[str, Any] = json.load(response)
        return found


class RunningServer:
    """`python -m examples.server` on a free port; entering waits until all processes are ready.

    Raises RuntimeError if one of them does not come up. Leaving stops it as SIGTERM does.
    """

    def __init__(self, *arguments: object, processes: int = 1) -> None:
        command = [sys.executable, "-m", "examples.server", "--port", "0"]
        command += ["--processes", str(processes), *map(str, arguments)]
        paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self.command = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self.pids: list[int] = []
        self.url = ""
        try:
            self.url = self._hear("listening on ")
            while len(self.pids) < processes:
                self.pids.append(self.next_ready())
        except BaseException:
            self.close()
            raise

    def next_ready(self) -> int:
        """Wait until one more process is ready; returns its pid."""
        return int(self._hear("process ", " is ready"))

    def _hear(self, start: str, end: str = "") -> str:
        assert self.command.stdout is not None
        for line in self.command.stdout:
            line = line.strip()
            if line.startswith(start) and line.endswith(end):
                return line[len(start) : len(line) - len(end)]
        raise RuntimeError(f"the server ended with status {self.command.wait()}")

    def kill(self) -> None:
        """SIGKILL, the command and its processes: nobody gets to say or store anything."""
        self.command.send_signal(signal.SIGSTOP)  # it would replace those that die first
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        self.command.kill()

    def close(self) -> None:
        """Stop it if it runs; returns when it and its processes have ended."""
        assert self.command.stdout is not None
        if self.command.poll() is None:
            self.command.terminate()
        self.command.wait()
        # Its processes have the other end of this pipe: it ends when the last of them has.
        self.command.stdout.read()
        self.command.stdout.close()

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def wait_stored(url: str, pids: Sequence[int]) -> None:
    """Return when these processes have nothing left to store."""
    busy = set(pids)
    while busy:  # a process answers for itself, and whichever is free answers
        stats = get(url, "/stats")
        if not stats["prefixes"]["pending"]:
            busy.discard(stats["pid"])
