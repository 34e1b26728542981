#!/usr/bin/env python3
"""`light-mem verify` and `light-mem rebuild` from a checkout that is not installed.

    python3 tools/recover_index.py verify ./cache_storage --repair
    python3 tools/recover_index.py rebuild ./cache_storage --dry-run

Needs numpy, xxhash, filelock, sortedcontainers, psutil and rich; not torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TEXT = "Check a store, and make its index anew, from a checkout that is not installed."
EXAMPLES = """\
examples:
  python3 tools/recover_index.py verify ./cache_storage --repair
  python3 tools/recover_index.py rebuild ./cache_storage --dry-run
"""


def main(argv: Sequence[str] | None = None) -> int:
    try:
        from light_mem.cli import run
        from light_mem.commands import rebuild, verify
    except ModuleNotFoundError as error:
        print(f"recover_index.py: {error}; pip install {error.name}", file=sys.stderr)
        return 2
    return run((verify, rebuild), "recover_index.py", TEXT, EXAMPLES, argv)


if __name__ == "__main__":
    sys.exit(main())
