"""A shared library whose `posix_fadvise` does nothing, made by the C compiler that is there."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from benchmark.rivals.base import NotInstalledError

_SOURCE = """#include <sys/types.h>
int posix_fadvise(int file, off_t at, off_t length, int advice) { return 0; }
int posix_fadvise64(int file, off_t at, off_t length, int advice) { return 0; }
"""


@functools.cache
def library() -> str:
    """Its path, for LD_PRELOAD; made once a run. Raises NotInstalledError."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise NotInstalledError("no C compiler to make its posix_fadvise a no-op")
    folder = tempfile.mkdtemp(prefix="light-mem-bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made, source = Path(folder) / "no_advice.so", Path(folder) / "no_advice.c"
    source.write_text(_SOURCE)
    command = [compiler, "-shared", "-fPIC", "-D_LARGEFILE64_SOURCE", "-o", made, source]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as err:
        raise NotInstalledError(
            f"{compiler} did not make its posix_fadvise a no-op: {err}"
        ) from err
    return str(made)


def is_loaded() -> bool:
    """Whether this process has it: the loader only warns, on a file system without execution."""
    return "/no_advice.so" in Path("/proc/self/maps").read_text()
