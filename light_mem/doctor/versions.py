"""Python and the packages that LightMem stands on."""

from __future__ import annotations

import platform
import re
import sys
import tempfile
from pathlib import Path

from light_mem.doctor.report import FAIL, OK, WARN, Check
from light_mem.startup import version_of

LEAST = {  # as in pyproject.toml
    "torch": (2, 4),
    "numpy": (1, 24),
    "filelock": (3, 12),
    "sortedcontainers": (2, 4),
    "psutil": (5, 9),
    "xxhash": (3, 0),
    "rich": (13, 0),
}
# With an older one checksums take three times as long, where the processor has AVX-512:
# docs/performance.md, "3.93 MB and more".
QUICK_XXHASH = (4, 1)
CPUINFO = Path("/proc/cpuinfo")
FILELOCK_BELOW = (3, 20, 4)
_FILELOCK = "pip install 'filelock>=3.12,<3.20.4'"


def checks() -> list[Check]:
    """The versions."""
    return [python(sys.version_info[:3]), *(package(name) for name in LEAST)]


def python(version: tuple[int, ...]) -> Check:
    """The interpreter."""
    found = f"{'.'.join(map(str, version))} ({platform.python_implementation()})"
    if version < (3, 10):
        return Check("python", FAIL, found, "use Python 3.10 or later")
    return Check("python", OK, found)


def package(name: str) -> Check:
    """A package's version, whether a later one is faster, and whether the locks of this `filelock`
    can be trusted."""
    version = version_of(name)
    numbers = parse(version)
    least = LEAST[name]
    if version == "missing":
        if name == "torch":
            advice = "the tools work without torch, services do not: pip install torch"
            return Check(name, WARN, version, advice)
        return Check(name, FAIL, version, f"pip install {name}")
    if numbers < least:
        wanted = ".".join(map(str, least))
        return Check(name, FAIL, version, f"pip install '{name}>={wanted}'")
    if name == "xxhash" and numbers < QUICK_XXHASH and has_avx512():
        wanted = ".".join(map(str, QUICK_XXHASH))
        advice = f"{wanted} takes checksums in a third of the time here: pip install -U xxhash"
        return Check(name, WARN, version, advice)
    return filelock(version, keeps_its_file()) if name == "filelock" else Check(name, OK, version)


def has_avx512() -> bool:
    """Whether the processor is known to have AVX-512."""
    try:
        return "avx512f" in CPUINFO.read_text().split()
    except (OSError, UnicodeDecodeError):
        return False


def filelock(version: str, keeps: bool) -> Check:
    """`keeps`: whether a released lock's file stays."""
    if not keeps:
        found = f"{version}, deletes a lock's file on release: two processes can hold one lock"
        return Check("filelock", FAIL, found, _FILELOCK)
    if parse(version) >= FILELOCK_BELOW:
        advice = f"later than what LightMem asks for; some releases there break locks: {_FILELOCK}"
        return Check("filelock", WARN, version, advice)
    return Check("filelock", OK, version)


def keeps_its_file() -> bool:
    """Try it: waiters would split across two files if the first one went."""
    from filelock import FileLock

    with tempfile.TemporaryDirectory(prefix="lightmem-doctor-") as directory:
        path = Path(directory) / "lock"
        lock = FileLock(str(path))
        with lock:
            inode = path.stat().st_ino
        return path.exists() and path.stat().st_ino == inode


def parse(version: str) -> tuple[int, ...]:
    """The leading numbers of a version."""
    return tuple(int(n) for n in re.findall(r"\d+", version.split("+")[0])[:3])
