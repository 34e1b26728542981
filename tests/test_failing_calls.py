"""The n-th operation fails, for every n: an error or a failed block, and the store stays right."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from light_mem.engine import writing
from light_mem.engine.base import Outcome
from light_mem.errors import LightMemError
from tests.engine_helpers import Block, Rig, open_local

PAGES = 12
BEFORE = [Block(1, 3), Block(2, 1), Block(3, 4), Block(4, 2)]
FRESH = [Block(10, 4), Block(11, 1), Block(12, 2)]
EIO, ENOSPC, EMFILE = errno.EIO, errno.ENOSPC, errno.EMFILE
CALLS: dict[str, dict[str, tuple[int, ...]]] = {
    "make": {
        "open": (EIO, EMFILE),
        "pwrite": (EIO, ENOSPC),
        "pwritev": (EIO,),
        "posix_fallocate": (ENOSPC, EIO),
        "fsync": (EIO,),
        "replace": (EIO,),
        "write": (ENOSPC,),
    },
    "write": {"open": (EIO, EMFILE), "pwritev": (EIO, ENOSPC)},
    "grow": {
        "open": (EIO, EMFILE),
        "pwrite": (EIO,),
        "posix_fallocate": (ENOSPC, EIO),
        "fsync": (EIO,),
        "replace": (EIO,),
        "write": (ENOSPC,),
    },
    "shrink": {
        "open": (EIO, EMFILE),
        "pwrite": (EIO,),
        "ftruncate": (EIO,),
        "fsync": (EIO,),
        "replace": (EIO,),
        "write": (ENOSPC,),
    },
    "rebuild": {
        "open": (EIO, EMFILE),
        "pwrite": (EIO,),
        "posix_fallocate": (ENOSPC,),
        "fsync": (EIO,),
        "replace": (EIO,),
    },
}
PAIRS = [(operation, name) for operation, names in CALLS.items() for name in names]


class Failing:
    """Makes the n-th call of one function of `os` fail once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, code: int, nth: int) -> None:
        self._left = nth
        self._real: Callable[..., Any] = getattr(os, name)
        self._code = code
        self.failed = False
        monkeypatch.setattr(os, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            self.failed = True
            raise OSError(self._code, os.strerror(self._code))
        return self._real(*args, **kwargs)


def opened(directory: Path, pages: int = PAGES, durability: str = "flush") -> Rig:
    return Rig(open_local(directory, pages, block_pages=4, durability=durability))


def new_store(directory: Path) -> None:
    rig = opened(directory)
    rig.write(*BEFORE)
    rig.engine.close()


def write_and_evict(directory: Path) -> None:
    rig = opened(directory)
    try:
        rig.write(*FRESH)
    finally:
        rig.engine.close()


def grow(directory: Path) -> None:
    opened(directory, 2 * PAGES).engine.close()


def shrink(directory: Path) -> None:
    opened(directory, PAGES - 3).engine.close()


def rebuild(directory: Path) -> None:
    (directory / "index").unlink(missing_ok=True)
    opened(directory).engine.close()


OPERATIONS: dict[str, Callable[[Path], None]] = {
    "make": new_store,
    "write": write_and_evict,
    "grow": grow,
    "shrink": shrink,
    "rebuild": rebuild,
}


@pytest.mark.parametrize(("operation", "name"), PAIRS)
def test_a_store_survives_any_call_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, name: str
) -> None:
    monkeypatch.setattr(writing, "ROOM_SECONDS", 0.05)
    happened = 0
    for code in CALLS[operation][name]:
        for nth in range(1, 60):
            directory = tmp_path / f"{code}-{nth}"
            if operation != "make":
                new_store(directory)
            with monkeypatch.context() as patch:
                failing = Failing(patch, name, code, nth)
                try:
                    OPERATIONS[operation](directory)
                except (LightMemError, OSError):
                    assert failing.failed
            if not failing.failed:
                break
            happened += 1
            check(directory, kept=BEFORE if operation in ("grow", "rebuild") else [])
    assert happened, f"{operation} does not call {name}"


def check(directory: Path, kept: list[Block]) -> None:
    """The next process opens the store, finds what it must, and works."""
    rig = opened(directory)
    outcomes = rig.read(*BEFORE, *FRESH)
    assert set(outcomes) <= {Outcome.LOADED, Outcome.MISSING}
    assert all(o is Outcome.LOADED for o in outcomes[: len(kept)])
    assert rig.write(Block(90, 4))[0][-1] is Outcome.STORED
    assert rig.read(Block(90, 4)) == [Outcome.LOADED]
    rig.engine.close()


@pytest.mark.parametrize("name", ["pwrite", "pwritev"])
def test_a_short_write_is_finished_by_further_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real = getattr(os, name)
    cut = 0

    def short(descriptor: int, data: Any, at: int) -> int:
        nonlocal cut
        cut += 1
        raw = b"".join(data) if isinstance(data, list) else bytes(data)
        return (
            os.pwrite(descriptor, raw[: max(1, len(raw) // 2)], at)
            if name != "pwrite"
            else int(real(descriptor, raw[: max(1, len(raw) // 2)], at))
        )

    rig = opened(tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setattr(os, name, short)
        assert all(o[-1] is Outcome.STORED for o in rig.write(*BEFORE))
    assert rig.read(*BEFORE) == [Outcome.LOADED] * len(BEFORE)
    rig.engine.close()
    if name == "pwritev":
        assert cut
