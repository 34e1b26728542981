"""Engines of vLLM that `vllm_restart.py` starts, follows and kills, and what is in their stores."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from vllm_model import make_model

from light_mem import maintenance, monitor
from light_mem.index import description
from light_mem.index import file as index_file
from light_mem.index.file import IndexFile

HERE = Path(__file__).resolve().parent
BLOCK = 32  # tokens; vLLM on a CPU wants multiples of it
STORE_BYTES = 64 << 20
ENGINE = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "seed": 0,
    "max_model_len": 8192,
    "max_num_seqs": 4,
    "block_size": BLOCK,
    "disable_log_stats": False,
}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "2",
    "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent.parent)]),
}


class Engines:
    """Starts engines, one after another, on stores in one directory."""

    def __init__(self, directory: Path, prompts: list[list[int]]) -> None:
        self.directory = directory
        self.prompts = prompts
        self.model = directory / "model"
        make_model(self.model, seed=0)
        self._lives = 0

    def life(
        self,
        store: Path,
        when_done: Callable[[Path], None] | None = None,
        when_open: Callable[[Path], None] | None = None,
        **tier: Any,
    ) -> dict[str, Any]:
        """One engine answers the prompts. It leaves in order, or is killed (SIGKILL, all of its
        processes at once) when `when_done(store)` returns. `when_open(store)` is called as soon as
        its LightMem workers run."""
        self._lives += 1
        engine_id = f"lightmem-restart-{os.getpid()}-{self._lives}"
        name = self.directory / f"life-{self._lives}"
        answer, log = name.with_suffix(".answer.json"), name.with_suffix(".log")
        name.with_suffix(".json").write_text(
            json.dumps(self._config(engine_id, store, when_done is not None, tier))
        )
        command = [sys.executable, str(HERE / "vllm_engine.py")]
        command += [str(name.with_suffix(".json")), str(answer)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT},
                start_new_session=True,
            )
        try:
            if when_open:
                self._await_workers(process, log, store, int(tier.get("num_workers", 2)))
                when_open(store)
            self._follow(process, answer, log, store, when_done)
        finally:
            _kill(process)
        found: dict[str, Any] = json.loads(answer.read_text())
        found["log"] = log.read_text(errors="replace")
        return found

    def _follow(
        self,
        process: subprocess.Popen[bytes],
        answer: Path,
        log: Path,
        store: Path,
        when_done: Callable[[Path], None] | None,
    ) -> None:
        deadline = time.monotonic() + 1200
        while not (answer.exists() if when_done else process.poll() is not None):
            if process.poll() is not None or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        if not answer.exists():
            _give_up("an engine did not answer", process, log)
        if when_done:
            when_done(store)

    def _await_workers(
        self, process: subprocess.Popen[bytes], log: Path, store: Path, wanted: int
    ) -> None:
        deadline = time.monotonic() + 600
        while len(workers_of(store)) < wanted:
            if process.poll() is not None or time.monotonic() > deadline:
                _give_up("an engine did not open its store", process, log)
            time.sleep(0.05)

    def _config(
        self, engine_id: str, store: Path, wait: bool, tier: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "model": str(self.model),
            "prompts": self.prompts,
            "max_tokens": 16,
            "wait_to_be_killed": wait,
            "engine": ENGINE,
            "kv_transfer_config": {
                "kv_connector": "OffloadingConnector",
                "kv_role": "kv_both",
                "engine_id": engine_id,
                "kv_connector_extra_config": {
                    "spec_name": "CpuTieringSpec",
                    "spec_module_path": "vllm_cpu_spec",
                    "cpu_bytes_to_use": 32 << 20,
                    "secondary_tiers": [
                        {
                            "type": "light_mem",
                            "file": str(store),
                            "storage_size": STORE_BYTES,
                            "num_workers": 2,
                            **tier,
                        }
                    ],
                },
            },
        }


def _kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for all of an engine's processes at once; returns when they are gone.

    vLLM then leaves its shared memory behind: what they had mapped is removed here.
    """
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    left: set[str] = set()
    for pid in [process.pid, *(member.pid for member in family)]:
        try:
            left.update(
                re.findall(
                    r"/dev/shm/(?:psm_|vllm_|sem\.mp-)\S+", Path(f"/proc/{pid}/maps").read_text()
                )
            )
        except OSError:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)  # its own session: nobody else is in it
    except ProcessLookupError:
        pass
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    for member in alive:
        member.kill()
    for path in left:
        Path(path).unlink(missing_ok=True)


def _give_up(what: str, process: subprocess.Popen[bytes], log: Path) -> None:
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-60:])
    raise SystemExit(f"{what}, status {process.poll()}:\n{tail}")


def workers_of(store: Path) -> list[psutil.Process]:
    """LightMem's workers of the engine that has the store open, once they all run."""
    if not (store / "store.json").exists():
        return []
    for server in monitor.look(store, ages=False).servers:
        if server.numbers.gauges["workers"] == server.workers:
            children = psutil.Process(server.pid).children()
            return [c for c in children if any("light_mem" in part for part in c.cmdline())]
    return []


class MidStore:
    """Holds the workers of an engine until it has answered, lets one go until some of the chunks
    that wait are stored, and stops it where it is, for the engine to be killed."""

    def __init__(self) -> None:
        self.waiting = 0
        self.stored = 0
        self._held: list[psutil.Process] = []

    def when_open(self, store: Path) -> None:
        self._held = workers_of(store)
        for worker in self._held:
            worker.suspend()

    def when_done(self, store: Path) -> None:
        (server,) = monitor.look(store, ages=False).servers
        self.waiting = server.numbers.gauges["write_queue"]
        # One alone stores a batch after the other, and the next one is some 20 ms away: too soon to
        # look at all of the store in between.
        worker, geometry = self._held[0], description.load(store)
        assert geometry is not None
        blocks = IndexFile(store / index_file.NAME, geometry, writable=False).control["blocks"]
        worker.resume()
        deadline = time.monotonic() + 60
        while not self.stored:
            self.stored = int(blocks.sum())
            if time.monotonic() > deadline:
                raise SystemExit("nothing was stored after the worker went on")
        worker.suspend()  # finding all that is to be killed takes a moment


def stored_blocks(store: Path) -> int:
    """Blocks in a store, looked up from outside."""
    return maintenance.inspect(store).blocks


def wait_for_blocks(wanted: int) -> Callable[[Path], None]:
    """Return when so many blocks are in the store: what is killed before that is not stored."""

    def wait(store: Path) -> None:
        deadline = time.monotonic() + 60
        while stored_blocks(store) < wanted:
            if time.monotonic() > deadline:
                raise SystemExit(f"{stored_blocks(store)} blocks stored, not {wanted}")
            time.sleep(0.05)

    return wait
