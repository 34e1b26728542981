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
import shutil
import sys
import tempfile
import time
from pathlib import Path

import psutil
from checks import Checks
from sglang_pools import ELSEWHERE, NUMBERS, Ranks
from sglang_process import Process
from sglang_servers import Servers
from sglang_two_ranks import TwoRanks


class Run(Ranks):
    """The checks with one rank."""

    def fakes(self) -> None:
        with self.rank() as rank:
            rank.answer()
            found = rank.ask("differences")
            self.check(not found, f"the fakes of the tests are as SGLang's classes: {found}")

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


def run(directory: Path, check: Checks) -> None:
    checks = Run(directory, check)
    checks.fakes()
    TwoRanks(directory, check).run()
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
    return check.end()


if __name__ == "__main__":
    sys.exit(main())
