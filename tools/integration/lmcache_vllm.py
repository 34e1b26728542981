"""LMCache's server with LightMem behind it and vLLM's engines in front, for `lmcache_restart.py`.

Every process is real: `lmcache server` as the documentation starts it, engines of vLLM for CPUs
with a tiny random model made here. Both are stopped or killed, started anew, and asked the same.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from vllm_lives import BLOCK, ENGINE, ENVIRONMENT, HERE, stored_blocks
from vllm_model import make_model

from light_mem import maintenance

CHUNK = 2 * BLOCK  # tokens of an object of LMCache
MIB = 1 << 20


class Family:
    """A process and its children, in a session of their own."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT, "LMCACHE_TRACK_USAGE": "false"},
                start_new_session=True,
            )

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 600
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-60:])
                raise SystemExit(f"{what} did not come, status {self.process.poll()}:\n{tail}")
            time.sleep(0.05)

    def end(self, number: signal.Signals) -> None:
        """Signal the process (SIGKILL: all of them at once); returns when they are gone. What they
        leave in /dev/shm when they are killed is removed here."""
        try:
            family = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        left: set[str] = set()
        for pid in [self.process.pid, *(member.pid for member in family)]:
            try:
                maps = Path(f"/proc/{pid}/maps").read_text()
            except OSError:
                continue
            left |= set(re.findall(r"/dev/shm/(?:psm_|vllm_|lmcache_|sem\.mp-)\S+", maps))
        try:
            if number is signal.SIGKILL:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)
        except ProcessLookupError:
            pass
        self.process.wait(60)
        _, alive = psutil.wait_procs(family, timeout=30)
        for member in alive:
            member.kill()
        for path in left:
            Path(path).unlink(missing_ok=True)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody has now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Stack:
    """A server and engines in front of it, life by life."""

    def __init__(self, directory: Path, prompts: list[list[int]]) -> None:
        self.directory = directory
        self.prompts = prompts
        self.model = directory / "model"
        make_model(self.model, seed=0)
        self._lives = 0

    def life(self, store: Path, kill: bool, stored: int = 0, **params: Any) -> dict[str, Any]:
        """A server and an engine answer the prompts; then both leave in order, or are killed once
        so many objects are stored."""
        self._lives += 1
        name = self.directory / f"vllm-life-{self._lives}"
        port, http = free_ports(2)
        server = Family(self._server(store, port, http, params), name.with_suffix(".lm"))
        try:
            server.wait(
                lambda: "cache server is running..." in server.log.read_text(errors="replace"),
                "the server",
            )
            answer = name.with_suffix(".answer.json")
            name.with_suffix(".json").write_text(json.dumps(self._engine(port, kill)))
            engine = Family(
                [
                    sys.executable,
                    str(HERE / "vllm_engine.py"),
                    str(name.with_suffix(".json")),
                    str(answer),
                ],
                name.with_suffix(".log"),
            )
            try:
                engine.wait(answer.exists, "an answer")
                if stored:
                    server.wait(lambda: stored_blocks(store) >= stored, f"{stored} objects")
                if not kill:
                    engine.process.wait(60)
            finally:
                engine.end(signal.SIGKILL)
            found: dict[str, Any] = json.loads(answer.read_text())
            return found
        finally:
            server.end(signal.SIGKILL if kill else signal.SIGINT)

    def _server(self, store: Path, port: int, http: int, params: dict[str, Any]) -> list[str]:
        adapter = {
            "type": "plugin",
            "module_path": "light_mem.integrations.lmcache.adapter",
            "class_name": "LightMemL2Adapter",
            "adapter_params": {
                "file": str(store),
                "storage_size": 128 * MIB,
                "num_of_shard": 2,
                "num_workers": 2,
                "slot_bytes": 16384,
                **params,
            },
        }
        return [
            *(sys.executable, "-m", "lmcache.cli.main", "server"),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--http-host", "127.0.0.1", "--http-port", str(http)),
            "--disable-metrics",
            *("--chunk-size", str(CHUNK), "--l1-size-gb", "0.25", "--no-l1-use-lazy"),
            *("--eviction-policy", "LRU"),
            *("--supported-transfer-mode", "engine_driven", "--shm-name", f"lightmem_{port}"),
            *("--l2-adapter", json.dumps(adapter)),
        ]

    def _engine(self, port: int, wait: bool) -> dict[str, Any]:
        return {
            "model": str(self.model),
            "prompts": self.prompts,
            "max_tokens": 16,
            "wait_to_be_killed": wait,
            "engine": ENGINE,
            "kv_transfer_config": {
                "kv_connector": "LMCacheMPConnector",
                "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {
                    "lmcache.mp.host": "tcp://127.0.0.1",
                    "lmcache.mp.port": port,
                },
            },
        }


def run_vllm(directory: Path, check: Callable[[bool, str], None]) -> None:
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 1024) for _ in range(n)] for n in (2000, 700, 333)]
    prompts.append([rng.randrange(3, 1024) for _ in range(1000)] + prompts[0][1000:])
    whole = sum(len(p) // CHUNK for p in prompts)
    usable = [(len(p) - 1) // CHUNK * CHUNK for p in prompts]
    stack = Stack(directory, prompts)

    def answers(life: dict[str, Any]) -> list[list[int]]:
        return [request["tokens"] for request in life["requests"]]

    def report(name: str, life: dict[str, Any]) -> list[int]:
        for request, prompt in zip(life["requests"], prompts, strict=True):
            print(
                f"      {name}: {len(prompt)} tokens, {request['cached']} from a cache, "
                f"{request['seconds'] * 1000:.0f} ms"
            )
        return [request["cached"] for request in life["requests"]]

    store = directory / "vllm-store"
    cold = stack.life(store, kill=True, stored=whole)
    check(report("cold", cold) == [0] * len(prompts), "vLLM, cold: nothing from a cache")
    check(stored_blocks(store) == whole, f"vLLM, cold: {whole} objects stored")
    check(answers(cold)[0] != answers(cold)[3], "vLLM: another first half gives other tokens")
    for name, kill in (("after kill -9 of both", False), ("after closing both in order", True)):
        life = stack.life(store, kill)
        cached = report(name, life)
        check(cached == usable, f"vLLM, {name}: all whole chunks come from LightMem: {cached}")
        check(answers(life) == answers(cold), f"vLLM, {name}: same tokens as cold")
    other = stack.life(store, kill=True, namespace="another")
    check(report("another namespace", other) == [0] * len(prompts), "vLLM, another namespace: none")
    check(answers(other) == answers(cold), "vLLM, another namespace: same tokens as cold")
    maintenance.check(store)
    check(True, "vLLM: every byte of the store fits its checksum")
