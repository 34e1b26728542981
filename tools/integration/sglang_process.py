"""Processes that `sglang_backend.py` talks to line by line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
MARK = "@@ "  # of a line that is an answer


class Process:
    """A script of this directory that answers each line with a line."""

    def __init__(self, script: str, log: Path, **environment: str) -> None:
        self._log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent.parent)]),
                    **environment,
                },
                start_new_session=True,
            )

    def send(self, *command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-40:])
        raise SystemExit(f"a process ended with status {self._process.wait()}:\n{tail}")

    def ask(self, *command: Any) -> Any:
        self.send(*command)
        return self.answer()

    def workers(self) -> list[psutil.Process]:
        """LightMem's worker processes of this one."""
        return psutil.Process(self._process.pid).children(recursive=True)

    def kill(self) -> list[psutil.Process]:
        """SIGKILL for this process alone; returns the workers that it had."""
        family = self.workers()
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()
        return family

    def end(self) -> int:
        """Leaves in order; the status."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(120)

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def extra_config(store: Path, **options: Any) -> dict[str, Any]:
    """What a user gives as --hicache-storage-backend-extra-config."""
    return {
        "backend_name": "light_mem",
        "module_path": "light_mem.integrations.sglang.backend",
        "class_name": "LightMemStorage",
        "interface_v1": 1,
        "allocator": "shm",
        "file": str(store),
        "storage_size": 64 << 20,
        "num_of_shard": 2,
        "num_workers": 1,
        "weights": "w",
        **options,
    }
