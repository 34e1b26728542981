"""SGLang's HiCache keeps its pages in LightMem: SGLang's real classes, run on a CPU.

    python tools/integration/sglang_backend.py [--keep]

Needs an environment with SGLang and LightMem: docs/sglang.md says how to make one. SGLang has no
server for CPUs without its kernels; what is real here is what touches the backend: the factory with
its dynamic loader, the allocator "shm", the host pools, the controller with its threads, and the
radix cache above it. Ranks are processes; they are killed and started again. Prints a line a check,
PASS or FAIL, and exits with 1 when one failed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from sglang_process import Checks, Process, extra_config
from sglang_servers import Servers

from light_mem import maintenance

TOKENS = 512  # of a device pool; its host pool has twice as many
PAGES = 48
NUMBERS = list(range(PAGES))
ELSEWHERE = [PAGES - 1 - n for n in NUMBERS]
SHAPES = [(kind, layout) for kind in ("mha", "mla") for layout in ("page_first", "layer_first")]
SHAPES.append(("mha", "page_first_direct"))


class Run:
    """The checks, on stores in one directory."""

    def __init__(self, directory: Path, check: Checks) -> None:
        self.directory = directory
        self.check = check

    def arguments(
        self, kind: str, layout: str, store: str, options: dict[str, Any], **config: Any
    ) -> dict[str, Any]:
        return {
            "kind": kind,
            "layout": layout,
            "tokens": TOKENS,
            "extra_config": extra_config(self.directory / store, **options),
            "config": config,
        }

    def rank(self, **environment: str) -> Process:
        return Process("sglang_rank.py", self.directory / "ranks.log", **environment)

    def open(
        self,
        rank: Process,
        name: str,
        kind: str,
        layout: str,
        store: str,
        options: dict[str, Any] | None = None,
        **config: Any,
    ) -> None:
        error = rank.ask("open", name, self.arguments(kind, layout, store, options or {}, **config))
        if error is not None:
            raise SystemExit(f"the backend {name} does not start: {error}")

    def fakes(self) -> None:
        with self.rank() as rank:
            rank.answer()
            found = rank.ask("differences")
            self.check(not found, f"the fakes of the tests are as SGLang's classes: {found}")

    # --- ranks ------------------------------------------------------------------------------------

    def both(self) -> tuple[Process, Process]:
        ranks = self.rank(), self.rank()
        for rank in ranks:
            rank.answer()
        return ranks

    def open_all(self, ranks: tuple[Process, Process]) -> None:
        for kind, layout in SHAPES:
            for n, rank in enumerate(ranks):
                name = f"{kind}-{layout}"
                self.open(rank, name, kind, layout, name, tp_rank=n, tp_size=2)

    def ranks(self) -> None:
        check = self.check
        ranks = self.both()
        with ranks[0], ranks[1]:
            self.open_all(ranks)
            about = ranks[0].ask("about", "mha-page_first")
            print(f"      {json.dumps(about)}")
            check(about["backend"] == "LightMemStorage", "the real factory loads the backend")
            check(about["allocator"] == "ShmHostTensorAllocator", 'the pool is of allocator "shm"')
            self.store_all(ranks)
            samples = {
                name: ranks[0].ask("sample", name, 20, salt_of(name, 0))
                for name in ("mha-page_first", "mla-layer_first")
            }
            families = [process for rank in ranks for process in rank.kill()]
        gone, alive = psutil.wait_procs(families, timeout=20)
        check(len(gone) > 0 and not alive, f"SIGKILL of both ranks ends their {len(gone)} workers")
        for name in samples:
            maintenance.check(self.directory / name)
        ranks = self.both()
        with ranks[0], ranks[1]:
            self.open_all(ranks)
            self.load_all(ranks)
            self.other_keys(ranks[0])
            for rank in ranks:
                check(rank.end() == 0, "a rank that leaves in order ends with status 0")
        for name, sample in samples.items():
            self.damage(name, sample)
        self.damaged(samples)

    def store_all(self, ranks: tuple[Process, Process]) -> None:
        for kind, layout in SHAPES:
            name = f"{kind}-{layout}"
            found = [rank.ask("exists", name, NUMBERS) for rank in ranks]
            self.check(found == [0, 0], f"{name}: nothing is found in a new store")
            for n, rank in enumerate(ranks):  # both at once; of MLA both store the same keys
                rank.send("store", name, NUMBERS, NUMBERS, salt_of(name, n))
            done = [rank.answer() for rank in ranks]
            self.check(done == [[True] * PAGES] * 2, f"{name}: both ranks store {PAGES} pages")
            blocks = maintenance.inspect(self.directory / name).blocks
            wanted = PAGES if kind == "mla" else 2 * PAGES
            self.check(blocks == wanted, f"{name}: {blocks} blocks in the store")

    def load_all(self, ranks: tuple[Process, Process]) -> None:
        for kind, layout in SHAPES:
            name = f"{kind}-{layout}"
            found = [rank.ask("exists", name, [*NUMBERS, 999]) for rank in ranks]
            self.check(found == [PAGES] * 2, f"{name}: after SIGKILL new ranks find {found}")
            for n, rank in enumerate(ranks):
                rank.send("load", name, NUMBERS, ELSEWHERE, salt_of(name, n))
            results = [rank.answer() for rank in ranks]
            fine = all(all(r["done"]) and all(r["right"]) for r in results)
            self.check(fine, f"{name}: all pages load, byte by byte, into other pages")
            strays = [r["strays"] for r in results]
            self.check(strays == [0, 0], f"{name}: no other page is touched")
            seconds = max(r["seconds"] for r in results)
            print(f"      {name}: {PAGES} pages a rank in {seconds * 1000:.1f} ms")

    def other_keys(self, rank: Process) -> None:
        """What has other bytes is not found, whoever asks on the same store."""
        others: dict[str, dict[str, Any]] = {
            "another model": {"model_name": "another"},
            "another number of ranks": {"tp_size": 4},
            "another pipeline stage": {"pp_rank": 1, "pp_size": 2},
            "another context-parallel rank": {"attn_cp_rank": 1, "attn_cp_size": 2},
            "other weights": {"options": {"weights": "others"}},
            "another namespace": {"options": {"namespace": "n"}},
        }
        for what, changes in others.items():
            fields = {"tp_rank": 0, "tp_size": 2, **changes}
            self.open(rank, what, "mha", "page_first", "mha-page_first", **fields)
            found = rank.ask("exists", what, NUMBERS)
            result = rank.ask("load", what, NUMBERS, NUMBERS, "")
            nothing = found == 0 and not any(result["done"]) and result["strays"] == 0
            self.check(nothing, f"{what} finds nothing")
            rank.ask("close", what)
        same = {"tp_rank": 0, "tp_size": 2, "dp_rank": 1}
        self.open(rank, "replica", "mha", "page_first", "mha-page_first", **same)
        self.check(rank.ask("exists", "replica", NUMBERS) == PAGES, "a replica finds all pages")
        rank.ask("close", "replica")

    # --- damage, eviction, stopped workers, private memory ----------------------------------------

    def damage(self, name: str, sample: str) -> None:
        """Turn one bit of the page that has these bytes."""
        wanted = bytes.fromhex(sample)
        for path in sorted((self.directory / name).glob("shard-*")):
            at = path.read_bytes().find(wanted)
            if at >= 0:
                with path.open("r+b") as file:
                    file.seek(at)
                    first = file.read(1)[0]
                    file.seek(at)
                    file.write(bytes([first ^ 0x10]))
                return
        raise SystemExit(f"{name}: the page is in no file of the store")

    def damaged(self, samples: dict[str, str]) -> None:
        with self.rank() as rank:
            rank.answer()
            for name in samples:
                kind, layout = name.split("-")
                self.open(rank, name, kind, layout, name, tp_rank=0, tp_size=2)
                result = rank.ask("load", name, NUMBERS, ELSEWHERE, salt_of(name, 0))
                fine = [n != 20 for n in NUMBERS]
                self.check(result["done"] == fine, f"{name}: a damaged page does not load")
                self.check(
                    all(r for r, f in zip(result["right"], fine, strict=True) if f),
                    f"{name}: the other pages do, and are right",
                )
                found = rank.ask("exists", name, NUMBERS)
                self.check(found == 20, f"{name}: the prefix ends at the damaged page: {found}")

    def eviction(self) -> None:
        with self.rank() as rank:
            rank.answer()
            page = 2 * 2 * 64 * 2 * 16 * 4  # K and V, heads, dim, bytes, tokens, layers
            options = {"storage_size": 160 * page, "num_of_shard": 1}
            self.open(rank, "small", "mha", "page_first", "small", options)
            batch, batches = 32, 10
            for n in range(batches):
                numbers = list(range(n * batch, (n + 1) * batch))
                done = rank.ask("store", "small", numbers, list(range(batch)), "s")
                if not all(done):
                    self.check(False, f"eviction: batch {n} is stored")
            self.check(rank.ask("exists", "small", [0]) == 0, "eviction: the oldest page is gone")
            last = list(range((batches - 1) * batch, batches * batch))
            self.check(rank.ask("exists", "small", last) == batch, "eviction: the newest are there")
            wrong = found = 0
            for n in range(batches):
                numbers = list(range(n * batch, (n + 1) * batch))
                result = rank.ask("load", "small", numbers, list(range(batch)), "s")
                found += sum(result["done"])
                wrong += sum(
                    d and not r for d, r in zip(result["done"], result["right"], strict=True)
                )
            self.check(wrong == 0, f"eviction: {found} pages of {batches * batch} load, all right")
            self.check(batch <= found <= 160, "eviction: the store holds no more than its size")
            self.check(rank.ask("clear", "small") is True, "the store can be cleared")
            self.check(rank.ask("exists", "small", last) == 0, "then nothing is found")

    def stopped_worker(self) -> None:
        """Workers that are stopped before and in the middle of a load."""
        with self.rank() as rank:
            rank.answer()
            numbers, longest, given_up, wrong = list(range(64)), 0.0, 0, 0
            for attempt in range(6):
                name = f"stopped {attempt}"
                options = {"load_timeout": 0.3}
                self.open(rank, name, "mha", "page_first", "stopped", options)
                rank.ask("store", name, numbers, numbers, "s")
                workers = rank.workers()
                rank.send("load", name, numbers, numbers[::-1], "s")
                time.sleep(attempt * 0.002)  # somewhere in it, or before
                for worker in workers:
                    worker.suspend()
                result = rank.answer()
                for worker in workers:
                    try:
                        worker.resume()
                    except psutil.NoSuchProcess:
                        pass  # ended, because it did not let go of its pages
                again = rank.ask("load", name, numbers, numbers[::-1], "s")
                longest = max(longest, result["seconds"])
                given_up += not all(result["done"])
                for found in (result, again):
                    pairs = zip(found["done"], found["right"], strict=True)
                    wrong += found["strays"] + sum(done and not right for done, right in pairs)
                rank.ask("close", name)
            self.check(longest < 45, f"stopped workers hold a load up for {longest:.1f} s at most")
            self.check(given_up > 0, f"{given_up} of 6 loads are given up")
            self.check(wrong == 0, "no page that such loads answer for is wrong, no other touched")

    def states(self) -> None:
        """A side pool of recurrent states, in two buffers."""
        slots, kept = 24, [3, 7, 11]  # pages at whose end there is a state

        def opened() -> Process:
            rank = self.rank()
            rank.answer()
            arguments = self.arguments("mha", "page_first", "hybrid", {})
            error = rank.ask("open", "h", {**arguments, "states": slots})
            if error is not None:
                raise SystemExit(f"a hybrid model does not start: {error}")
            return rank

        with opened() as rank:
            done = rank.ask("store", "h", NUMBERS[:14], NUMBERS[:14], "s")
            done += rank.ask("store_states", "h", kept, [0, 1, 2], "s")
            self.check(all(done), "hybrid: pages and states are stored")
            rank.kill()
        with opened() as rank:
            found = rank.ask("usable", "h", NUMBERS)
            self.check(
                found == [n + 1 for n in kept], f"hybrid: prefixes that have a state: {found}"
            )
            result = rank.ask("load_states", "h", [*kept, 5], [20, 4, 9, 1], "s")
            self.check(result["done"] == [True] * 3 + [False], "hybrid: states load after SIGKILL")
            self.check(result["right"] == result["done"], "hybrid: and are right, in both buffers")
            self.check(result["strays"] == 0, "hybrid: no other state is touched")
            result = rank.ask("load", "h", NUMBERS[:14], ELSEWHERE[:14], "s")
            self.check(all(result["right"]), "hybrid: so do pages")
            self.check(rank.end() == 0, "hybrid: the end in order has status 0")

    def private_memory(self) -> None:
        with self.rank(SGLANG_HICACHE_HOST_PARALLEL_ALLOC_THREADS="1") as rank:
            rank.answer()
            arguments = self.arguments("mha", "page_first", "private", {"allocator": "default"})
            error = rank.ask("open", "private", arguments)
            self.check(
                error is not None and '"allocator": "shm"' in error,
                f"a private pool is refused with the setting that helps: {error}",
            )
            arguments = self.arguments("mha", "page_first", "private", {"interface_v1": 0})
            error = rank.ask("open", "tensors", arguments)
            self.check(
                error is not None and "interface_v1" in error,
                f"so is a configuration that passes tensors: {error}",
            )


def salt_of(name: str, rank: int) -> str:
    """What makes a rank's bytes its own; MLA ranks hold the same."""
    return name if name.startswith("mla") else f"{name}-{rank}"


def run(directory: Path, check: Checks) -> None:
    checks = Run(directory, check)
    checks.fakes()
    checks.ranks()
    checks.eviction()
    checks.stopped_worker()
    checks.states()
    checks.private_memory()
    Servers(directory, check).run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="keep stores and logs")
    chosen = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="lightmem-sglang-"))
    check = Checks()
    began = time.monotonic()
    try:
        run(directory, check)
    finally:
        if chosen.keep:
            print(f"kept: {directory}")
        else:
            shutil.rmtree(directory)
    print(f"{time.monotonic() - began:.0f} s")
    print(f"{check.failed} checks failed" if check.failed else "all checks passed")
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
