"""What the tests of `light-mem doctor` share."""

from __future__ import annotations

from light_mem.doctor import OK, Check

GIB = 1 << 30


def status(check: Check) -> str:
    """A check's answer; whoever is warned is told what to do, in one line."""
    assert (check.status == OK) or check.advice
    assert "\n" not in check.found + check.advice
    return check.status
