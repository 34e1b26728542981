"""How children that copy are started: what glibc is told, and who has the last word."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from light_mem.engine.pieces import PIECE_BYTES, SMALL_PAGE_BYTES
from light_mem.engine.program import COPY_TUNABLES, environment

# sysdeps/x86/dl-cacheinfo.h: glibc keeps its own threshold unless it is told more than this.
GLIBC_MINIMUM = 0x4040
# sysdeps/x86_64/multiarch/memmove-vec-unaligned-erms.S, LOG_4X_MEMCPY_THRESH: from so many times
# the threshold on it copies four pages of the kernel side by side.
FOUR_PAGES = 16


TOLD = {
    name: int(value, 16)
    for name, value in (setting.split("=") for setting in COPY_TUNABLES.split(":"))
}
THRESHOLD = TOLD["glibc.cpu.x86_non_temporal_threshold"]


def test_pages_are_copied_straight_from_the_length_on_that_goes_around_the_caches() -> None:
    assert THRESHOLD == SMALL_PAGE_BYTES
    assert THRESHOLD > GLIBC_MINIMUM


def test_a_piece_is_long_enough_to_be_copied_from_four_pages_side_by_side() -> None:
    assert FOUR_PAGES * THRESHOLD <= PIECE_BYTES


def test_no_copy_of_a_piece_is_by_rep_movsb() -> None:
    assert TOLD["glibc.cpu.x86_rep_movsb_threshold"] > PIECE_BYTES


def test_a_user_who_has_tunables_of_his_own_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert environment({"A": "1"})["GLIBC_TUNABLES"] == COPY_TUNABLES
    for own in ("", "glibc.malloc.check=0"):
        monkeypatch.setenv("GLIBC_TUNABLES", own)
        assert environment({})["GLIBC_TUNABLES"] == own


@pytest.mark.skipif(sys.platform != "linux", reason="the loader of glibc says what it was told")
def test_the_loader_takes_what_it_is_told() -> None:
    maps = Path("/proc/self/maps").read_text()
    loaders = re.findall(r"\S+/ld-linux\S*", maps)
    if not loaders or os.uname().machine != "x86_64":
        pytest.skip("not glibc on x86-64")
    answer = subprocess.run(
        [loaders[0], "--list-tunables"],
        env={"GLIBC_TUNABLES": COPY_TUNABLES},
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode:
        pytest.skip("this loader lists no tunables")
    for name, wanted in TOLD.items():
        [line] = [each for each in answer.stdout.splitlines() if each.startswith(f"{name}:")]
        assert int(line.split()[1], 16) == wanted, line
