"""vLLM restarts, in order and by kill -9, and continues from LightMem: run end to end on a CPU.

    python tools/integration/vllm_restart.py [--tokens 3000] [--only PART ...] [--keep]

Needs an environment with vLLM for CPUs and LightMem: docs/vllm.md says how to make one. Real
engines, each in processes of its own, with a tiny random model made here. Prints a line a check,
PASS or FAIL, and exits with 1 when one failed.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from checks import Checks
from vllm_lives import BLOCK, Engines, MidStore, stored_blocks, wait_for_blocks
from vllm_model import make_model

from light_mem import maintenance

PARTS = ["restart", "kill", "mid_store", "others"]  # methods of Run, in this order


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
    return check.end()


if __name__ == "__main__":
    sys.exit(main())
