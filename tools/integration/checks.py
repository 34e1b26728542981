"""What the runs of this directory print."""

from __future__ import annotations


class Checks:
    """Lines of PASS and FAIL."""

    def __init__(self) -> None:
        self.failed = 0

    def __call__(self, fine: bool, what: str) -> None:
        self.failed += not fine
        print(f"{'PASS' if fine else 'FAIL'}  {what}", flush=True)

    def end(self) -> int:
        """Say how many failed; the status that the run ends with."""
        print(f"{self.failed} checks failed" if self.failed else "all checks passed")
        return 1 if self.failed else 0
