"""A server of its own process for test_lightllm: `-m tests.lightllm_child DIRECTORY PAGE_BYTES`.

Persists one prompt, prints its segment's id once nothing is being written, and waits to be killed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.compat_service import cumulative, some_tokens
from tests.lightllm_caller import Caller, poll
from tests.lightllm_memory import CpuCache

PROMPT = cumulative(some_tokens(11, seed=77))


def main() -> None:
    directory, page_bytes = Path(sys.argv[1]), int(sys.argv[2])
    cache = CpuCache(16, page_bytes)
    caller = Caller(cache, directory, 64 << 20, 2)
    pages = list(range(len(PROMPT)))
    cache.fill(PROMPT, pages)
    cache.hold(PROMPT, pages)
    caller.persist(PROMPT, pages)
    poll(lambda: not caller.service.active_threads("w"))
    sys.stdout.write(f"{cache.segment.shmid}\n")
    sys.stdout.flush()
    sys.stdin.readline()


if __name__ == "__main__":
    main()
