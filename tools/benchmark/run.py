"""One run of the suite: its options, directory, clock and results."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark import rivals
from benchmark.contestant import Contestant, ContestantError, close_all
from benchmark.plan import Plan, Shape
from benchmark.samples import Meter


@dataclass
class Run:
    """Options of the command line, and what was found so far.

    `only` holds the parts to run, `kinds` the contestants, `gib` the bytes of a pass. `quick` makes
    every part small. Of the part `entries`: the largest index, the seconds that it may take about,
    and bytes of a block, which is one page.
    """

    directory: Path
    kinds: list[str]
    workers: int
    gib: float
    rounds: int
    warm: int
    seed: int
    quick: bool
    cpp_lightmem: str | None
    max_entries: int
    max_seconds: float = 900.0
    entry_bytes: int = 64
    results: dict[str, Any] = field(default_factory=dict)
    meter: Meter = field(default_factory=Meter)
    started: float = field(default_factory=time.perf_counter)
    _places: int = 0

    def say(self, text: str) -> None:
        """Tell how far the run is."""
        print(text, flush=True)

    @property
    def has_device(self) -> bool:
        """Whether files leave the page cache: those of a tmpfs are nowhere else."""
        return self.results["machine"]["file_system"] not in ("tmpfs", "ramfs")

    def place(self) -> Path:
        """A new directory: in one where files were deleted, ext4 makes new ones slower."""
        self._places += 1
        path = self.directory / f"{self._places:03}"
        path.mkdir()
        return path

    def plan(self, shape: Shape, at_least: int = 4, gib: float | None = None) -> Plan:
        size = (self.gib if gib is None else gib) * 2**30
        return Plan.of_size(shape, size, max(at_least, 2 * self.workers), self.seed)

    @contextmanager
    def tensor(self, plan: Plan) -> Iterator[tuple[Any, Any]]:
        """A KV tensor of random bytes, and how other processes map it."""
        import torch

        import light_mem
        from light_mem.engine.kvmemory import close_source, share_tensor

        kv = light_mem.allocate_kvcache(plan.num_pages, plan.shape.page_bytes)
        kv.copy_(torch.randint(0, 256, kv.shape, dtype=torch.uint8))
        source = share_tensor(kv)
        try:
            yield kv, source
        finally:
            close_source(source)

    def start(
        self,
        kind: str,
        directory: Path,
        source: Any,
        plan: Plan,
        options: dict[str, Any] | None = None,
    ) -> Contestant | None:
        """A contestant of `kinds`; None, and noted, when it is not installed."""
        options = dict(options or {})
        if kind.startswith("cpp-lightmem"):
            options["path"] = self.cpp_lightmem
        about = self.results.setdefault("contestants", {})
        try:
            started = Contestant(kind, directory / kind, source, plan, self.workers, options)
        except rivals.NotInstalledError as err:
            about.setdefault(kind, {"missing": str(err)})
            return None
        except (ContestantError, OSError) as err:
            if rivals.is_ours(kind):
                raise
            self._failed(kind, err)
            return None
        about[kind] = {**started.about(), **about.get(kind, {})}
        return started

    def start_all(
        self,
        directory: Path,
        source: Any,
        plan: Plan,
        kinds: Iterable[str] | None = None,
        options: dict[str, Any] | None = None,
    ) -> list[Contestant]:
        """Those of `kinds` (all of the run's) that are installed; none stays when one is bad."""
        started: list[Contestant] = []
        try:
            for kind in self.kinds if kinds is None else kinds:
                contestant = self.start(kind, directory, source, plan, options)
                started += [contestant] if contestant else []
        except BaseException:
            for contestant in started:
                contestant.kill()
            raise
        return started

    def each(self, contestants: Iterable[Contestant]) -> Iterator[Contestant]:
        """Those that have not failed."""
        return (contestant for contestant in contestants if not contestant.failed)

    @contextmanager
    def unless_it_fails(self, contestant: Contestant) -> Iterator[None]:
        """One that fails, with no room left, say, is out of the part, noted, and the run goes on.
        But LightMem must not fail."""
        try:
            yield
        except (ContestantError, OSError) as err:
            if rivals.is_ours(contestant.code):
                raise
            contestant.failed = True
            contestant.kill()
            self._failed(contestant.code, err)

    def _failed(self, kind: str, err: Exception) -> None:
        text = str(err).strip().rsplit("\n", 1)[-1]
        self.say(f"  {kind} failed: {text}")
        self.results.setdefault("contestants", {}).setdefault(kind, {})["failed"] = text

    @contextmanager
    def together(self, contestants: list[Contestant], directory: Path) -> Iterator[None]:
        """All are closed, and their files deleted, whatever happens."""
        try:
            yield
            close_all(contestants)
        except BaseException:
            for contestant in contestants:
                contestant.kill()
            raise
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def checked(self, part: str, contestant: Contestant) -> None:
        """Note what the store says of itself; LightMem looks at every byte, and raises."""
        found = contestant.check()
        if found:
            self.note_check(f"{contestant.name}: {part}", found)

    def note_check(self, part: str, found: dict[str, Any]) -> None:
        """Keep what `check()` of a part's store said."""
        self.results.setdefault("checks", []).append({"part": part, **found})
