"""What usually goes wrong on a machine, checked before it does. Changes nothing and leaves nothing.

report.py     a check's answer; the machine as files, so that tests can have another one
versions.py   Python and the packages
kernel.py     what the kernel offers, limits of the process, dirty pages
memory.py     /dev/shm and what was left there, memory, swap, huge pages, limits of the container
directory.py  the file system below a store, its room, what it can do; the store itself
"""

from __future__ import annotations

import os
from pathlib import Path

from light_mem.doctor import directory, kernel, memory, versions
from light_mem.doctor.report import FAIL, OK, WARN, Check, Machine

__all__ = ["FAIL", "OK", "WARN", "Check", "Machine", "examine"]


def examine(path: str | os.PathLike[str] | None) -> list[Check]:
    """All checks; with `path`, a store or where one is to be, those of that directory too.

    Raises NotADirectoryError for a path that is something else. Makes files without a name in the
    directory, for a moment.
    """
    machine = Machine()
    checks = [*versions.checks(), *kernel.checks(machine), *memory.checks(machine)]
    return checks if path is None else [*checks, *directory.checks(Path(path))]
