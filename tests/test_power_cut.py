"""A power cut at any moment: sectors of any age since their last sync, torn pages among them.

`moments` records every store to the files of a small store; the engine's syncs are noted among
them. A power cut then leaves, sector by sector, any version between the last sync of its file and
the moment of the cut. Opened again, every block is right or a miss.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from light_mem.engine import shard_file, slot_records, writing
from light_mem.engine.base import Outcome
from light_mem.engine.local import LocalStorageEngine
from light_mem.index import file as index_file
from tests.deaths import Files, moments, restore
from tests.engine_helpers import Block, Rig, open_local

PAGES = 12
PAGE_BYTES = 600  # a slot touches two or three sectors
BEFORE = [Block(key, 2 if key < 2 else 1) for key in range(9)]
FRESH = [Block(100, 3), Block(101, 2), Block(102, 1)]
EVERY = [*BEFORE, *FRESH]
ANOTHER_BOOT = bytes(range(16))


class Power:
    """A store whose every change is recorded, and what a cut may leave of it."""

    def __init__(self, directory: Path, durability: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self._directory = directory
        self._patch = monkeypatch
        self.rig = self.opened(directory, durability)
        self.history: list[Files] = []
        self.synced: dict[str, list[int]] = {}  # moments at which a file was synced

    def opened(self, directory: Path, durability: str = "kernel") -> Rig:
        engine = open_local(
            directory, PAGES, page_bytes=PAGE_BYTES, block_pages=8, durability=durability
        )
        return Rig(engine, PAGE_BYTES)

    def record(self, *calls: Callable[[], object]) -> list[int]:
        """Run the calls; returns the moment at which each had returned."""
        ends: list[int] = []
        pending: list[tuple[str, Files]] = []

        def note(module: ModuleType, function: str, name: str) -> None:
            sync = getattr(module, function)

            def noted(what: object) -> None:
                sync(what)
                content = (self._directory / name).read_bytes()
                pending.append((name, {name: content}))

            self._patch.setattr(module, function, noted)

        note(shard_file, "_sync", "shard-000.data")
        note(slot_records, "_sync_map", "shard-000.slots")
        for call in calls:
            seen = moments(self._directory, call)
            start = len(self.history)
            self.history += seen
            for name, files in pending:
                # The first moment that shows what was synced: from there on it is on the device.
                at = next(n for n, f in enumerate(seen) if f[name] == files[name])
                self.synced.setdefault(name, []).append(start + at)
            pending.clear()
            ends.append(len(self.history) - 1)
        self._patch.undo()
        return ends

    @property
    def engine(self) -> LocalStorageEngine:
        engine = self.rig.engine
        assert isinstance(engine, LocalStorageEngine)
        return engine

    def cut(self, dice: random.Random, at: int, sector: int) -> Files:
        """The files as a cut at that moment may leave them."""
        left: Files = {}
        for name in self.history[0]:
            oldest = max((n for n in self.synced.get(name, []) if n <= at), default=0)
            # Most sectors are all old or all new in a real cut; the mix is what finds mistakes.
            calm = dice.choice((oldest, at, None))
            versions = self.history[oldest : at + 1]
            size = len(versions[-1][name])
            parts = []
            for start in range(0, size, sector):
                of = calm if calm is not None and dice.random() < 0.8 else None
                files = self.history[of] if of is not None else dice.choice(versions)
                parts.append(files[name][start : start + sector])
            left[name] = b"".join(parts)
        return left

    def survivors(self, files: Files, target: Path, another_boot: bool) -> set[int]:
        """Open what a cut left, read every block (`Rig.read` looks at every byte), write again."""
        with self._patch.context() as patch:
            patch.setattr(writing, "ROOM_SECONDS", 0.05)
            if another_boot:
                patch.setattr(index_file, "boot_id", lambda: ANOTHER_BOOT)
            rig = self.opened(restore(files, self._directory, target))
            outcomes = dict(zip(EVERY, rig.read(*EVERY), strict=True))
            assert set(outcomes.values()) <= {Outcome.LOADED, Outcome.MISSING, Outcome.DAMAGED}
            more = [Block(200, 4), Block(201), Block(202, 8)]
            for block in more:
                [said] = rig.write(block)
                # A torn index that is believed may show slots as being written by nobody: room
                # that is lost until the index is made anew, and no more than that.
                assert said[-1] is Outcome.STORED or (
                    said[-1] is Outcome.NO_ROOM and not another_boot
                )
                if said[-1] is Outcome.STORED:
                    assert rig.read(block) == [Outcome.LOADED]
            rig.read(*EVERY)
            rig.engine.close()
        return {b.key for b, outcome in outcomes.items() if outcome is Outcome.LOADED}


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("another_boot", [True, False])
def test_a_power_cut_never_gives_wrong_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sector: int, another_boot: bool
) -> None:
    # The same boot is what no power cut leaves: an index of torn pages that is believed.
    power = Power(tmp_path / "store", "kernel", monkeypatch)
    for block in BEFORE:
        assert power.rig.write(block)[0][-1] is Outcome.STORED
    power.rig.delete(BEFORE[3], BEFORE[5])
    power.record(
        lambda: power.rig.write(*FRESH),
        lambda: power.rig.delete(BEFORE[7]),
        lambda: power.rig.write(BEFORE[3], BEFORE[5]),
    )
    power.rig.engine.close()
    dice = random.Random(sector + another_boot)
    loaded: list[int] = []
    for trial in range(120):
        at = dice.randrange(len(power.history))
        files = power.cut(dice, at, sector)
        loaded.append(len(power.survivors(files, tmp_path / f"cut-{trial}", another_boot)))
    assert max(loaded) >= 5, "a cut that leaves nothing shows nothing"


@pytest.mark.parametrize("sector", [512, 4096])
def test_what_was_finished_with_flush_survives_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sector: int
) -> None:
    power = Power(tmp_path / "store", "flush", monkeypatch)
    written = [Block(0, 2), Block(1, 2), Block(2, 1), Block(3, 1)]
    ends = power.record(*[lambda b=b: power.rig.write(b) for b in written])  # type: ignore[misc]
    power.rig.engine.close()
    assert set(power.synced) == {"shard-000.data", "shard-000.slots"}
    dice = random.Random(sector)
    for trial in range(120):
        at = dice.randrange(len(power.history))
        finished = {b.key for b, end in zip(written, ends, strict=True) if end <= at}
        files = power.cut(dice, at, sector)
        assert finished <= power.survivors(files, tmp_path / f"cut-{trial}", another_boot=True)
