"""Processes with a storage manager of LMCache that `lmcache_restart.py` talks to line by line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import psutil

HERE = Path(__file__).resolve().parent
SLOT = 16384
MIB = 1 << 20


class Life:
    """One process with a storage manager. `all`: those that still run."""

    all: ClassVar[list[Life]] = []

    def __init__(self, log: Path, store: Path, l1_gb: float = 0.25, **options: Any) -> None:
        top = {name: options.pop(name) for name in ("serde", "eviction") if name in options}
        params = {"file": str(store), "storage_size": 512 * MIB, "slot_bytes": SLOT}
        params |= {"num_of_shard": 2, "num_workers": 2, **options}
        spec = {
            "type": "plugin",
            "module_path": "light_mem.integrations.lmcache.adapter",
            "class_name": "LightMemL2Adapter",
            "adapter_params": params,
            **top,
        }
        read, write = os.pipe()
        arguments = ["--l1-size-gb", str(l1_gb), "--no-l1-use-lazy", "--eviction-policy", "LRU"]
        arguments += ["--l2-adapter", json.dumps(spec)]
        environment = {**os.environ, "LMCACHE_TRACK_USAGE": "false"}
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent.parent), str(HERE)])
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "lmcache_manager.py"), str(write), *arguments],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                pass_fds=[write],
                env=environment,
                text=True,
            )
        os.close(write)
        self._answers = os.fdopen(read)
        Life.all.append(self)
        self.started = self("start")

    def __call__(self, command: str, **options: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, options]) + "\n")
        self.process.stdin.flush()
        line = self._answers.readline()
        if not line:
            raise SystemExit(f"the process is gone: {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill(self) -> None:
        """SIGKILL; the workers go with their server."""
        workers = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGKILL)
        self._end()
        Life.all.remove(self)
        assert workers
        _, alive = psutil.wait_procs(workers, 20)
        assert not alive, f"left behind: {alive}"
        # LMCache's own, which it removes when a server of the same name starts.
        Path(f"/dev/shm/lmcache_l1_pool_{self.process.pid}").unlink(missing_ok=True)

    def leave(self) -> None:
        """Close in order."""
        self("leave")
        self._end()
        Life.all.remove(self)

    def _end(self) -> None:
        self.process.wait()
        self.process.stdin.close()  # type: ignore[union-attr]
        self._answers.close()
