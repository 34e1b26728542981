"""The part of `sglang_backend.py` that has SGLang's radix cache above the backend."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import psutil
from checks import Checks
from sglang_process import Process, extra_config

from light_mem import maintenance

PAGE_SIZE = 16  # tokens, as in sglang_cpu.py


class Servers:
    """Servers on one store, one after another: caches from the radix tree down."""

    def __init__(self, directory: Path, check: Checks) -> None:
        self.directory = directory
        self.store = directory / "radix"
        self.check = check

    def extra(self) -> dict[str, Any]:
        """SGLang asks the store for any whole page; what the weights are LightMem finds out."""
        return extra_config(self.store, weights=None, prefetch_threshold=PAGE_SIZE)

    def server(self, **changes: Any) -> Process:
        """A process with SGLang's radix cache over the store."""
        server = Process("sglang_radix.py", self.directory / "servers.log")
        server.answer()
        extra = self.extra()
        fields = {"model_path": str(self.directory / "model"), "served_model_name": "m", **changes}
        error = server.ask("open", extra, fields)
        if error is not None:
            raise SystemExit(f"the radix cache does not start: {error}")
        return server

    def run(self) -> None:
        """All of it."""
        check, rng = self.check, random.Random(0)
        self.make_model(0)
        prompts = [[rng.randrange(32000) for _ in range(n)] for n in (640, 400, 272)]
        prompts.append(prompts[0][:320] + [rng.randrange(32000) for _ in range(80)])
        pages = [len(p) // PAGE_SIZE for p in prompts]
        with self.server() as server:
            server.ask("insert", prompts)
            found = server.ask("fetch", prompts[0])
            check(found["on_device"] == 640 and found["right"], "radix: a prompt is on the device")
            families = server.kill()
        psutil.wait_procs(families, timeout=20)
        stored = maintenance.inspect(self.store).blocks
        wanted = sum(pages) - 320 // PAGE_SIZE
        check(stored == wanted, f"radix: {stored} pages in the store, a shared prefix once")
        with self.server() as server:
            self.hits(server, prompts, "after SIGKILL")
            longer = prompts[1] + [rng.randrange(32000) for _ in range(160)]
            server.ask("insert", [longer])
            server.kill()
        with self.server() as server:
            self.hits(server, [*prompts, longer], "after a second SIGKILL")
            other = [prompts[0][0] + 1, *prompts[0][1:]]
            found = server.ask("fetch", other)
            check(found["loaded"] == 0, "radix: another first token, and nothing is found")
            check(server.end() == 0, "radix: a server that leaves in order ends with status 0")
        changed: dict[str, dict[str, Any]] = {
            "another served name": {"served_model_name": "n"},
            "another type of the cache": {"kv_cache_dtype": "fp8_e4m3"},
            "other overrides of the model": {"json_model_override_args": '{"rope_theta": 1}'},
        }
        for what, fields in changed.items():
            self.nothing(prompts[0], what, **fields)
        self.make_model(1)
        self.nothing(prompts[0], "other weights under the same path")
        self.make_model(0)
        with self.server() as server:
            check(server.ask("detach") is None, "radix: SGLang detaches the backend")
            check(server.ask("fetch", prompts[2])["loaded"] == 0, "radix: then nothing is loaded")
            extra = json.dumps(self.extra())
            check(server.ask("attach", extra, "m") is None, "radix: and attaches it again")
            self.hits(server, prompts, "attached again")
            check(server.ask("clear") is True, "radix: SGLang clears the store")
            server.end()
        self.nothing(prompts[0], "after the store was cleared the same server")

    def hits(self, server: Process, prompts: list[list[int]], when: str) -> None:
        for prompt in prompts:
            began = time.monotonic()
            found = server.ask("fetch", prompt)
            print(f"      {when}: {len(prompt)} tokens, {json.dumps(found)}, ", end="")
            print(f"{(time.monotonic() - began) * 1000:.0f} ms")
            from_store = found["loaded"] == len(prompt) - found["on_device"]
            fine = from_store and found["usable"] == len(prompt) and found["right"]
            self.check(
                fine, f"radix: {when} a prompt of {len(prompt)} tokens is a whole, right hit"
            )

    def nothing(self, prompt: list[int], what: str, **fields: Any) -> None:
        with self.server(**fields) as server:
            found = server.ask("fetch", prompt)
            self.check(found["loaded"] == found["usable"] == 0, f"radix: {what} finds nothing")
            server.end()

    def make_model(self, seed: int) -> None:
        """Something that LightMem takes for a model: its files are all that it looks at."""
        model = self.directory / "model"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text('{"model_type": "llama"}')
        (model / "model.safetensors").write_bytes(random.Random(seed).randbytes(3 << 20))
