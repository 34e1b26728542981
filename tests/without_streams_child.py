"""A server without standard streams: it writes, reads, and complains on standard error.

Arguments: a directory, where "said" gets what is to be told.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from light_mem import State
from tests.service_rig import rig

LINE = b"[W socket.cpp:1234] what a C++ library says on standard error\n"


def streams() -> list[str]:
    return [os.readlink(f"/proc/self/fd/{n}") if is_open(n) else "closed" for n in range(3)]


def is_open(number: int) -> bool:
    return os.path.lexists(f"/proc/self/fd/{number}")


def main(directory: Path) -> None:
    with rig(directory) as r:
        for _ in range(400):
            os.write(2, LINE)
        r.write(["a"], [0])
        states = r.read(["a"], [1]).state()
        right = states == [State.Finished] and r.holds("a", [1])
        (directory / "said").write_text(f"{right} {' '.join(streams())}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
