"""Every moment of a call: what a kill would leave then, what another process may do then.

A process that is killed leaves what it stored to the mappings until then. `moments` looks between
any two instructions of a call, and copies the files whenever one of them has changed: between two
stores of Python code there is no moment that it does not see.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from light_mem.index import description
from light_mem.index.format import MAX_OWNERS, OWNER
from tests.opcodes import LIBRARY, watch_opcodes

OWNERS_BYTES = 4 * OWNER.itemsize  # the tests have no more owners
Files = dict[str, bytes]


class Camera:
    """Read-only mappings of a store's files; `shot` says what is new."""

    def __init__(self, directory: Path) -> None:
        self._maps: dict[str, mmap.mmap] = {}
        names = {"index", "owners", *(p.name for p in directory.glob("shard-*[as]"))}
        for name in sorted(names.intersection(p.name for p in directory.iterdir())):
            size = OWNERS_BYTES if name == "owners" else 0
            with (directory / name).open("rb") as file:
                self._maps[name] = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        self.last: Files = {name: mapped[:] for name, mapped in self._maps.items()}

    def shot(self) -> Files | None:
        """The files, when they have changed since the last one."""
        now: Files = {name: mapped[:] for name, mapped in self._maps.items()}
        if now == self.last:
            return None
        self.last = now
        return now

    def close(self) -> None:
        for mapped in self._maps.values():
            mapped.close()


def moments(directory: Path, call: Callable[[], object]) -> list[Files]:
    """The files of the store at every moment of `call`, from before to after."""
    camera = Camera(directory)
    seen = [camera.last]

    def look() -> None:
        shot = camera.shot()
        if shot is not None:
            seen.append(shot)

    watch_opcodes(call, look)
    last = camera.shot()
    camera.close()
    return seen if last is None else [*seen, last]


def interleave(
    call: Callable[[], Any],
    change: Callable[[], object],
    at: int,
    where: tuple[str, ...] = (LIBRARY,),
) -> tuple[Any, bool]:
    """What `call` returns when `change` happens before its `at`-th opcode in the library, or in
    these files, and whether it had as many."""
    left = at

    def look() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            change()

    result = watch_opcodes(call, look, where)
    return result, left <= 0


def restore(files: Files, source: Path, target: Path) -> Path:
    """The files as the dead process left them, and the description, in a new directory."""
    target.mkdir(parents=True)
    for name, content in files.items():
        (target / name).write_bytes(content)
        if name == "owners":
            os.truncate(target / name, MAX_OWNERS * OWNER.itemsize)
    if (source / description.NAME).exists():
        (target / description.NAME).write_bytes((source / description.NAME).read_bytes())
    return target
