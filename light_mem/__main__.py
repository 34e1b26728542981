"""`python -m light_mem` is `light-mem`."""

from __future__ import annotations

import sys

from light_mem.cli import main

if __name__ == "__main__":
    sys.exit(main())
