"""Every moment of a call: what a kill would leave then, what another process may do then.

A process that is killed leaves what it stored to the mappings until then. `moments` runs a call
under an opcode trace and copies the files whenever one of them has changed: between two stores of
Python code there is no moment that it does not see.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import light_mem
from light_mem.index import description
from light_mem.index.format import MAX_OWNERS, OWNER

LIBRARY = str(Path(light_mem.__file__).parent)
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

    def look(frame: FrameType, event: str, _: Any) -> Any:
        shot = camera.shot()
        if shot is not None:
            seen.append(shot)
        return look

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(LIBRARY):
            return None
        frame.f_trace_opcodes = True
        return look

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        call()
    finally:
        sys.settrace(before)
    last = camera.shot()
    camera.close()
    return seen if last is None else [*seen, last]


def interleave(call: Callable[[], Any], change: Callable[[], object], at: int) -> tuple[Any, bool]:
    """What `call` returns when `change` happens after its `at`-th opcode in the library, and
    whether it had as many."""
    left = at

    def count(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if event == "opcode":
            left -= 1
            if left == 0:
                sys.settrace(None)
                change()
        return count

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        if left <= 0 or not frame.f_code.co_filename.startswith(LIBRARY):
            return None
        frame.f_trace_opcodes = True
        return count

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        result = call()
    finally:
        sys.settrace(before)
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
