"""vLLM restarts, in order and by kill -9, and continues from LightMem: run end to end on a CPU.

    python tools/integration/vllm_restart.py [--tokens 3000] [--only PART ...] [--keep]

Needs an environment with vLLM for CPUs and LightMem: docs/vllm.md says how to make one. Real
engines, each in processes of its own, with a tiny random model made here. Prints a line a check,
PASS or FAIL, and exits with 1 when one failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from light_mem import maintenance, monitor

HERE = Path(__file__).resolve().parent
BLOCK = 32  # tokens; vLLM on a CPU wants multiples of it
STORE_BYTES = 64 << 20
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PARTS = ["restart", "kill", "mid_store", "others"]  # methods of Run, in this order
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "2",
    "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent.parent)]),
}


class Checks:
    """Lines of PASS and FAIL."""

    def __init__(self) -> None:
        self.failed = 0

    def __call__(self, fine: bool, what: str) -> None:
        self.failed += not fine
        print(f"{'PASS' if fine else 'FAIL'}  {what}", flush=True)


def make_model(directory: Path, seed: int) -> None:
    """A Llama with random weights whose answers depend on all of a prompt: vLLM's own dummy weights
    are so small that the last token alone decides."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    hidden, inner, vocab = MODEL["hidden_size"], MODEL["intermediate_size"], MODEL["vocab_size"]
    heads = {"q": MODEL["num_attention_heads"], "k": MODEL["num_key_value_heads"]}

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * (gain / columns**0.5)

    tensors = {
        "model.embed_tokens.weight": matrix(vocab, hidden, hidden**0.5),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": matrix(vocab, hidden),
    }
    for n in range(MODEL["num_hidden_layers"]):
        layer = f"model.layers.{n}."
        width = {name: count * MODEL["head_dim"] for name, count in heads.items()}
        tensors |= {
            layer + "input_layernorm.weight": torch.ones(hidden),
            layer + "post_attention_layernorm.weight": torch.ones(hidden),
            layer + "self_attn.q_proj.weight": matrix(width["q"], hidden, 2.0),
            layer + "self_attn.k_proj.weight": matrix(width["k"], hidden, 2.0),
            layer + "self_attn.v_proj.weight": matrix(width["k"], hidden, 2.0),
            layer + "self_attn.o_proj.weight": matrix(hidden, width["q"], 2.0),
            layer + "mlp.gate_proj.weight": matrix(inner, hidden),
            layer + "mlp.up_proj.weight": matrix(inner, hidden),
            layer + "mlp.down_proj.weight": matrix(hidden, inner),
        }
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(MODEL))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


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
            "engine": {
                "skip_tokenizer_init": True,
                "enforce_eager": True,
                "seed": 0,
                "max_model_len": 8192,
                "max_num_seqs": 4,
                "block_size": BLOCK,
                "disable_log_stats": False,
            },
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
    """Holds the workers of an engine until it has answered, lets them go until some of the chunks
    that wait are stored, and stops them where they are, for the engine to be killed."""

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
        for worker in self._held:
            worker.resume()
        deadline = time.monotonic() + 60
        while not self.stored:
            self.stored = stored_blocks(store)
            if time.monotonic() > deadline:
                raise SystemExit("nothing was stored after the workers went on")
        for worker in self._held:  # finding all that is to be killed takes a moment
            worker.suspend()


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


class Run:
    """The parts of the run. Each compares with what the cold engine answered."""

    def __init__(self, directory: Path, tokens: int, check: Checks) -> None:
        rng = random.Random(0)
        prompts = [[rng.randrange(3, 1024) for _ in range(n)] for n in (tokens, 700, 333)]
        half = tokens // 2  # shows that the answer depends on what is loaded
        prompts.append([rng.randrange(3, 1024) for _ in range(half)] + prompts[0][half:])
        self.prompts = prompts
        self.chunks = sum(len(p) // BLOCK for p in prompts)
        # The chunk that holds the last token of a prompt is computed for its logits.
        self.usable = [(len(p) - 1) // BLOCK for p in prompts]
        self.directory = directory
        self.store = directory / "store"
        self.check = check
        self.engines = Engines(directory, prompts)

    def report(self, name: str, life: dict[str, Any]) -> None:
        for request, prompt in zip(life["requests"], self.prompts, strict=True):
            print(
                f"      {name}: {len(prompt)} tokens, {request['cached']} from a cache, "
                f"{request['seconds'] * 1000:.0f} ms"
            )
        print(f"      {name}: {json.dumps(life['counters'])}")

    def cold(self) -> None:
        cold = self.engines.life(self.store)
        self.report("cold", cold)
        self.answers = answers(cold)
        check, stored = self.check, stored_blocks(self.store)
        check(not any(cached(cold)), "cold: nothing from a cache")
        check(loaded(cold) == 0, "cold: nothing loaded from LightMem")
        check(self.answers[0] != self.answers[3], "cold: another first half gives other tokens")
        check(stored == self.chunks, f"cold: {stored} chunks in the store")

    def hits(self, name: str, life: dict[str, Any]) -> None:
        self.report(name, life)
        check = self.check
        all_full = cached(life) == [n * BLOCK for n in self.usable]
        check(all_full, f"{name}: all full chunks hit: {cached(life)}")
        full = loaded(life) == sum(self.usable)
        check(full, f"{name}: {loaded(life)} chunks loaded from LightMem")
        self.same(name, life)

    def same(self, name: str, life: dict[str, Any]) -> None:
        self.check(answers(life) == self.answers, f"{name}: same tokens as cold")
        failed = life["counters"].get("light_mem_failed_load_blocks", 0)
        self.check(not failed, f"{name}: no load failed")

    def whole(self, store: Path) -> None:
        maintenance.check(store)
        self.check(True, f"the store {store.name} is whole: every byte fits its checksum")

    def restart(self) -> None:
        self.hits("restart", self.engines.life(self.store))

    def kill(self) -> None:
        """Killed when all is stored, and once more when it has loaded."""
        store = self.directory / "killed"
        first = self.engines.life(store, wait_for_blocks(self.chunks))
        self.check(answers(first) == self.answers, "before kill -9: same tokens as cold")
        self.hits("restart after kill -9", self.engines.life(store))
        self.hits("before the second kill -9", self.engines.life(store, lambda store: None))
        self.hits("restart after the second kill -9", self.engines.life(store))
        self.whole(store)

    def mid_store(self) -> None:
        """Killed while most chunks are on their way to the store."""
        store = self.directory / "mid-store"
        killer = MidStore()
        shards = {"num_of_shard": 1}  # more of what is stored then begins a prompt
        life = self.engines.life(
            store, killer.when_done, killer.when_open, durability="flush", **shards
        )
        left = stored_blocks(store)
        name, check = "kill -9 in the middle of a store", self.check
        check(answers(life) == self.answers, f"{name}: same tokens as cold")
        check(killer.waiting > self.chunks // 2, f"{name}: {killer.waiting} chunks under way")
        check(
            killer.stored <= left < self.chunks,
            f"{name}: {killer.stored} chunks stored at the kill, {left} of {self.chunks} after it",
        )
        self.whole(store)
        name = "restart after it"
        life = self.engines.life(store, **shards)
        self.report(name, life)
        self.same(name, life)
        # What was stored need not begin with a prompt's first chunk: several workers write.
        check(loaded(life) <= left, f"{name}: {loaded(life)} chunks loaded from LightMem")
        from_store = sum(cached(life)) // BLOCK >= loaded(life)
        check(from_store, f"{name}: each of them saved its tokens: {cached(life)}")
        stored = stored_blocks(store)
        check(stored == self.chunks, f"{name}: {stored} chunks in the store")
        self.whole(store)
        self.hits("restart after that", self.engines.life(store, **shards))

    def others(self) -> None:
        """Another namespace, other weights: nothing in common."""
        check = self.check
        other = self.engines.life(self.store, namespace="another")
        check(loaded(other) == 0, "another namespace: nothing loaded")
        check(not any(cached(other)), "another namespace: no hit")
        check(answers(other) == self.answers, "another namespace: same tokens as cold")
        make_model(self.engines.model, seed=1)
        changed = self.engines.life(self.store)
        check(loaded(changed) == 0, "other weights in the same place: nothing loaded")
        check(answers(changed) != self.answers, "other weights in the same place: other tokens")


def answers(life: dict[str, Any]) -> list[list[int]]:
    return [request["tokens"] for request in life["requests"]]


def cached(life: dict[str, Any]) -> list[int]:
    return [request["cached"] for request in life["requests"]]


def loaded(life: dict[str, Any]) -> int:
    return int(life["counters"].get("light_mem_loaded_blocks", 0))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=3000, help="of the longest prompt")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, help="parts, all by default"
    )
    parser.add_argument("--keep", action="store_true", help="keep stores and logs")
    chosen = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="lightmem-vllm-"))
    check = Checks()
    try:
        run = Run(directory, chosen.tokens, check)
        run.cold()
        for part in PARTS:
            if part in chosen.only:
                getattr(run, part)()
    finally:
        if chosen.keep:
            print(f"kept: {directory}")
        else:
            shutil.rmtree(directory)
    print(f"{check.failed} checks failed" if check.failed else "all checks passed")
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
