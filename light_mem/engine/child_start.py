"""What a process of our own runs at its start: where it finds modules, and what it is told.

The current directory may be anybody's, and another one by the time a worker is replaced: a file
json.py there must not run as the server's user. So the child imports nothing that lies in a file
before it has the path that it is told, and that path was made absolute when the service was.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from light_mem.descriptors import memory_file

# -S: what `site` would do is in the path that is handed over; it saves start time. -P: later
# versions import `linecache` before the first line of a -c program, so that tracebacks show it
# (Python/pythonrun.c), and take one in the current directory. 3.10 does not, and has no -P.
_FLAGS = ["-S", "-P"] if sys.version_info >= (3, 11) else ["-S"]

# `sys` and `open` are part of the interpreter, and so is the codec: none is looked for in a file.
_PROGRAM = """\
import sys
with open(int(sys.argv[1]), "rb") as told:
    *path, config = told.read().split(b"\\0")
sys.path[:] = [entry.decode("utf-8", "surrogatepass") for entry in path]
import json
from {module} import main
main(json.loads(config))
"""


def search_path() -> list[str]:
    """Where this process finds modules now, for children whose current directory may be another.

    What stands for the current directory itself (`python -c`, a notebook) comes last: the modules
    that a child needs were imported here before, and a file that happens to lie there (queue.py)
    must not be taken for one of them. Where there is no such directory any more, what is relative
    to it is left out.
    """
    try:
        here = os.getcwd()
    except OSError:
        here = ""
    # An import passes over entries that are no str; no path has a NUL.
    entries = [entry for entry in sys.path if isinstance(entry, str) and "\0" not in entry]
    path = [os.path.join(here, entry) for entry in entries if entry]
    path.append(str(Path(__file__).resolve().parents[2]))
    if "" in entries:
        path.append(here)
    return [entry for entry in path if os.path.isabs(entry)]


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """`given` for a child: of PYTHONPATH only what is absolute. An empty part of it, as a colon at
    its end leaves, means the current directory, where the interpreter looks for its codecs."""
    parts = given.get("PYTHONPATH", "").split(os.pathsep)
    rest = {name: value for name, value in given.items() if name != "PYTHONPATH"}
    absolute = os.pathsep.join(filter(os.path.isabs, parts))
    return {**rest, "PYTHONPATH": absolute} if absolute else rest


@contextmanager
def command(
    module: str, config: Mapping[str, Any], path: Sequence[str]
) -> Iterator[tuple[list[str], int]]:
    """The command that runs `main(config)` of a module that is looked for in `path`, and the
    descriptor to be passed on to it. `config` goes through JSON.

    They go through a memory file: one argument has room for 128 KiB, a pipe for 64 until somebody
    reads it, and what `ps` shows is nobody's business. Raises OSError.
    """
    from multiprocessing import spawn  # slow to import, and only parents need it

    executable = os.fsdecode(spawn.get_executable() or sys.executable)
    parts = [entry.encode("utf-8", "surrogatepass") for entry in path]
    told = memory_file("light-mem-start")
    try:
        view = memoryview(b"\0".join([*parts, json.dumps(config).encode()]))
        at = 0
        while at < len(view):  # the child shares the offset, and is to find it at the start
            at += os.pwrite(told, view[at:], at)
        program = _PROGRAM.format(module=module)
        yield [executable, *_FLAGS, "-c", program, str(told)], told
    finally:
        os.close(told)
