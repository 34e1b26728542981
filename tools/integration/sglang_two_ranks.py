"""The part of `sglang_backend.py` with two ranks on every kind of pool, killed and damaged."""

from __future__ import annotations

import json
from typing import Any

import psutil
from sglang_pools import ELSEWHERE, NUMBERS, PAGES, Ranks
from sglang_process import Process

from light_mem import maintenance

SHAPES = [(kind, layout) for kind in ("mha", "mla") for layout in ("page_first", "layer_first")]
SHAPES.append(("mha", "page_first_direct"))


class TwoRanks(Ranks):
    """A store a shape, both ranks on it."""

    def run(self) -> None:
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


def salt_of(name: str, rank: int) -> str:
    """What makes a rank's bytes its own; MLA ranks hold the same."""
    return name if name.startswith("mla") else f"{name}-{rank}"
