"""What a worker does with a MemorySource, for kvmemory_helpers: `kvmemory_child.py SOURCE_JSON`.

Prints "attached", waits for a line, then checks that the parent's bytes are there and writes its
own. Exits with a message on stderr when anything is wrong.
"""

from __future__ import annotations

import json
import sys

import numpy as np

from light_mem.engine.kvmemory import MemorySource, attach


def main() -> str | None:
    view = attach(MemorySource(**json.loads(sys.argv[1])))
    sys.stdout.write("attached\n")
    sys.stdout.flush()
    sys.stdin.readline()
    steps = np.arange(view.size)
    if not np.array_equal(view, (steps * 7 + 3) % 251):
        return "the parent's bytes are not there"
    view[:] = (steps * 13 + 5) % 241
    heavy = {"torch", "psutil"} & set(sys.modules)
    return f"imported {heavy}" if heavy else None


if __name__ == "__main__":
    sys.exit(main())
