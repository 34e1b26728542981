"""What a check says, and where checks look."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

OK, WARN, FAIL = "ok", "warn", "fail"


class Check(NamedTuple):
    """One thing that was looked at."""

    name: str
    status: str  # OK; WARN: it works, worse than it could; FAIL: it will not work or is not safe
    found: str
    advice: str = ""  # what to do; "" when OK


class Machine(NamedTuple):
    """Where the kernel shows itself."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    shm: Path = Path("/dev/shm")

    def text(self, *parts: str) -> str | None:
        """A file below /proc; None when it is not there."""
        return read_text(self.proc.joinpath(*parts))

    def number(self, *parts: str) -> int | None:
        """The one number in a file below /proc."""
        return as_number(self.text(*parts))

    def meminfo(self) -> dict[str, int]:
        """/proc/meminfo in bytes, and counts of huge pages."""
        found: dict[str, int] = {}
        for line in (self.text("meminfo") or "").splitlines():
            name, _, rest = line.partition(":")
            words = rest.split()
            if words and words[0].isdigit():
                found[name] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
        return found


def read_text(path: Path) -> str | None:
    """A small file's text without blanks at its ends; None when it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def as_number(text: str | None) -> int | None:
    """A whole number; None for anything else."""
    return int(text) if text is not None and text.isdigit() else None
