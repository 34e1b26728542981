"""One rank of tests/test_ranks.py: stores, looks up and loads prompts beside a writer that evicts.

python -m tests.ranks_child STORE GROUP_FILE RANK WORLD ROUNDS AGREE

Says on each line what it counted itself and what was agreed on, and in the end how many of the
pages that it was told to use held other bytes than those of their key and rank. With AGREE 0 each
rank takes its own count: what happens without an agreement.
"""

from __future__ import annotations

import json
import random
import sys
import time
from datetime import timedelta

import numpy as np
import torch.distributed as distributed

from light_mem import LocalCacheService, allocate_kvcache
from light_mem.ranks import RankedCache, agreement
from tests.payload import page_bytes_of

CHUNKS = 24  # of a prompt
PAGE = 4096
SLOTS = 512
SHARDS = 4


def say(*values: object) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def payload(hash_value: str, rank: int) -> np.ndarray:
    return page_bytes_of((hash_value, rank), 0, PAGE)


def outlast_the_store(service: LocalCacheService) -> None:
    """Wait until the writer has taken the room of all that was used last."""
    wanted = service.stats(ages=False)["evictions"] + 2 * SLOTS
    deadline = time.monotonic() + 50
    while service.stats(ages=False)["evictions"] < wanted:
        assert time.monotonic() < deadline, "the writer is gone"
        time.sleep(0.002)


def main(store: str, group: str, rank: int, world: int, rounds: int, agree: bool) -> None:
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{group}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=300),
    )
    least = agreement()
    counts: list[int] = []

    def noted(mine: int) -> int:
        counts.append(mine)
        return least(mine) if agree else mine

    kv = allocate_kvcache(2 * CHUNKS, PAGE)
    same = random.Random(0)  # the same choices on all ranks
    wrong = used = 0
    with LocalCacheService(store, SLOTS * PAGE, SHARDS, kv, 1) as service:
        service.run()
        cache = RankedCache(service, rank, world, noted)
        say("runs")
        distributed.barrier()
        for n in range(rounds):
            hashes = [f"prompt {n} {at}" for at in range(CHUNKS)]
            for at, h in enumerate(hashes):
                kv[at].numpy()[:] = payload(h, rank)
            assert cache.create("write", hashes, range(CHUNKS)).wait(30)
            back = n - same.randrange(0, min(3, n + 1))
            hashes = [f"prompt {back} {at}" for at in range(CHUNKS)]
            found = cache.match_prefix(hashes)
            # What an eviction may do between the answer and the load, on one rank alone.
            victim = same.randrange(world)
            if n % 3 == 0 and found and rank == victim:
                service.delete(cache.keys(hashes)[found // 2])
            if n % 15 == 7 and rank == victim:
                outlast_the_store(service)
            kv[CHUNKS:] = 0xA5
            usable = cache.load(hashes[:found], range(CHUNKS, CHUNKS + found), 30)
            for at, h in enumerate(hashes[:usable]):
                used += 1
                wrong += not np.array_equal(kv[CHUNKS + at].numpy(), payload(h, rank))
            say("round", *counts, found, usable)
            counts.clear()
            distributed.barrier()
        say("end", used, wrong)
        distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]), agree=sys.argv[6] == "1")
