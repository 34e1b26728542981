"""LMCache is killed and continues from LightMem: its real storage manager, run end to end.

    python tools/integration/lmcache_restart.py [--vllm] [--keep]

Needs an environment with LMCache and LightMem: docs/lmcache.md says how to make one. Real storage
managers with their L1 pools, controllers and the adapter that LMCache's factory makes from
`--l2-adapter`, each in a process of its own. With --vllm also a real server of LMCache and real
engines of vLLM for CPUs in front of it. Prints a line a check, PASS or FAIL, and exits with 1 when
one failed.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
sys.path.insert(0, str(HERE))

from checks import Checks  # noqa: E402
from lmcache_life import MIB, SLOT, Life  # noqa: E402
from lmcache_types import check_types  # noqa: E402

from light_mem import maintenance  # noqa: E402

# Bytes of an object: number of objects. Odd ones, less than a slot, many slots.
SIZES = {4096: 8, 10_000: 8, 3 * SLOT: 8, MIB + 4096: 8, 7 * MIB + 123: 4}


def until(condition: Callable[[], bool], what: str) -> None:
    """Poll what another process brings about."""
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within 60 s: {what}")
        time.sleep(0.002)


def store_all(life: Life, **fields: Any) -> None:
    for n, (nbytes, count) in enumerate(SIZES.items()):
        life("store", numbers=list(range(100 * n, 100 * n + count)), nbytes=nbytes, **fields)


def load_all(life: Life, **fields: Any) -> tuple[int, int]:
    """Hits from L2, and how many of them have wrong bytes."""
    hits = wrong = 0
    for n, (nbytes, count) in enumerate(SIZES.items()):
        numbers = list(range(100 * n, 100 * n + count))
        found = life("load", numbers=numbers, nbytes=nbytes, **fields)
        hits, wrong = hits + found["from_l2"], wrong + found["wrong"]
    return hits, wrong


def run(directory: Path, check: Checks) -> None:
    log, total = directory / "log", sum(SIZES.values())
    store = directory / "store"
    life = Life(log, store)
    check(life.started["adapter"] == "LightMemL2Adapter", "LMCache's factory makes the adapter")
    check(load_all(life) == (0, 0), "an empty store: no hit")
    store_all(life)
    stored = life("status")["stored_blocks"]
    check(stored == total, f"{stored} objects of {len(SIZES)} sizes stored")
    life("forget")
    check(load_all(life) == (total, 0), "with L1 emptied all are loaded from LightMem, same bytes")
    life.kill()

    life = Life(log, store)
    check(load_all(life) == (total, 0), "after kill -9 all are loaded, same bytes")
    # LMCache keeps what it prefetched only until it was read.
    check(load_all(life) == (total, 0), "once more: all are loaded again, same bytes")
    store_all(life, model_name="another")
    before = maintenance.inspect(store).blocks  # `used` has slots that are being written as well
    life("store", numbers=list(range(900, 960)), nbytes=3 * MIB, wait=False)
    until(lambda: maintenance.inspect(store).blocks > before, "a block of the last store")
    life.kill()
    inspection = maintenance.inspect(store)
    maintenance.check(store)
    check(True, f"killed amid stores: {inspection.blocks} blocks, every byte fits its checksum")
    life = Life(log, store)
    hits, wrong = 0, 0
    for n in range(900, 960):
        found = life("load", numbers=[n], nbytes=3 * MIB)
        hits, wrong = hits + found["from_l2"], wrong + found["wrong"]
    check(hits > 0 and not wrong, f"of 60 that were under way {hits} are found, none wrong")
    for what, fields in {
        "another salt": {"cache_salt": "someone"},
        "another rank": {"kv_rank": 5},
        "another model": {"model_name": "a third"},
        "another type of the cache": {"dtype": "int8"},
    }.items():
        check(load_all(life, **fields) == (0, 0), f"{what}: nothing found")
    life.leave()
    life = Life(log, store, namespace="n")
    check(load_all(life) == (0, 0), "another namespace: nothing found")
    life.leave()
    life = Life(log, store)
    check(load_all(life) == (total, 0), "after closing in order all are loaded, same bytes")
    life.leave()
    damaged(directory, log, check)
    eviction(directory, log, check)
    forced(directory, log, check)
    overflow(directory, log, check)
    quotas(directory, log, check)
    serde(directory, log, check)


def damaged(directory: Path, log: Path, check: Checks) -> None:
    store = directory / "damaged"
    numbers = list(range(8))
    life = Life(log, store, num_of_shard=1)
    for n in numbers:
        life("store", numbers=[n], nbytes=MIB)
    life.leave()
    data = store / "shard-000.data"
    with data.open("r+b") as file:  # the fourth object: they lie in the order of their stores
        file.seek(4096 + 3 * MIB + 1000)
        old = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([old[0] ^ 1]))
    life = Life(log, store, num_of_shard=1)
    found = life("load", numbers=numbers, nbytes=MIB)
    check(found["hits"] == [0, 1, 2] and not found["wrong"], f"one bit flipped: hits {found}")
    status = life("status")
    check(status["failed_load_blocks"] == 1, "the load of one failed, LMCache shortened the prefix")
    life("forget")
    life("store", numbers=[3], nbytes=MIB)
    life("forget")
    found = life("load", numbers=numbers, nbytes=MIB)
    check(found["hits"] == numbers and not found["wrong"], "computed anew and stored: all hit")
    life.leave()


def eviction(directory: Path, log: Path, check: Checks) -> None:
    life = Life(log, directory / "small", storage_size=32 * MIB, l1_gb=0.125)
    listed: list[int] = []
    for n in range(0, 120, 10):
        life("store", numbers=list(range(n, n + 10)), nbytes=MIB)
        life("forget")
        listed += range(n, n + 10)
    hits, wrong = [], 0
    for n in listed:
        found = life("load", numbers=[n], nbytes=MIB)
        hits += [n] * found["from_l2"]
        wrong += found["wrong"]
        life("forget")
    check(not wrong, f"120 MiB through a store of 32: {len(hits)} found, none wrong")
    check(24 <= len(hits) <= 32 and min(hits) >= 80, f"the least recently used went: {hits}")
    check(life("status")["used"] <= 32 * MIB, "and it holds no more than its size")
    life.leave()


def forced(directory: Path, log: Path, check: Checks) -> None:
    """Clearing L1 by force takes the memory of objects away while they are stored: LMCache warns
    of it. What was copied from it must not be found."""
    life = Life(log, directory / "forced", l1_gb=0.125)
    rounds, hits, wrong = 12, 0, 0
    for n in range(rounds):
        for start in range(0, 40, 10):
            numbers = [100 * n + start + k for k in range(10)]
            life("store", numbers=numbers, nbytes=MIB, wait=False)
            time.sleep(0.0005 * n)  # meets the store at another point each time
            life("forget")
        for k in range(40):
            found = life("load", numbers=[100 * n + k], nbytes=MIB)
            hits, wrong = hits + found["from_l2"], wrong + found["wrong"]
            life("forget")
    what = f"L1 cleared by force amid stores: of {40 * rounds} objects {hits} found, none wrong"
    check(hits > 0 and not wrong, what if not wrong else f"{what}? {wrong} wrong")
    life.leave()


def overflow(directory: Path, log: Path, check: Checks) -> None:
    life = Life(log, directory / "narrow", max_queued_bytes=4 * MIB)
    life("store", numbers=list(range(20)), nbytes=MIB)
    status = life("status")
    check(
        (status["stored_blocks"], status["dropped_blocks"]) == (4, 16),
        f"a store of 20 MiB with 4 allowed: {status['dropped_blocks']} dropped and counted",
    )
    life("forget")
    found = life("load", numbers=list(range(20)), nbytes=MIB)
    check(found["hits"] == [0, 1, 2, 3] and not found["wrong"], "what was stored is a prefix")
    life("store", numbers=list(range(10, 14)), nbytes=MIB)
    check(life("status")["stored_blocks"] == 8, "then there is room again")
    life.leave()


def quotas(directory: Path, log: Path, check: Checks) -> None:
    """LMCache deletes what users have no quota for: once a second, by the keys it was told of."""
    life = Life(log, directory / "quotas", eviction={"eviction_policy": "IsolatedLRU"})
    life("store", numbers=list(range(4)), nbytes=MIB, cache_salt="nobody")
    until(lambda: life("status")["used"] == 0, "LMCache's eviction")
    check(life("status")["by_salt"].get("nobody", 0) == 0, "LMCache's quotas delete and account")
    life("forget")
    found = life("load", numbers=list(range(4)), nbytes=MIB, cache_salt="nobody")
    check(found["from_l2"] == 0, "what they deleted is not found")
    life.leave()


def serde(directory: Path, log: Path, check: Checks) -> None:
    store, options = directory / "serde", {"serde": {"type": "fp8"}, "layout_in_keys": False}
    life = Life(log, store, **options)
    life("store", numbers=list(range(4)), nbytes=MIB, dtype="bfloat16")
    check(life("status")["used"] == 4 * MIB // 2, "with LMCache's serde fp8: half the bytes stored")
    life.kill()
    life = Life(log, store, **options)
    found = life("load", numbers=list(range(4)), nbytes=MIB, dtype="bfloat16")
    check(found["hits"] == [0, 1, 2, 3], "and found after kill -9")  # fp8 changes the bytes
    life.leave()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", action="store_true", help="with LMCache's server and vLLM")
    parser.add_argument("--only-vllm", action="store_true", help="that alone")
    parser.add_argument("--keep", action="store_true", help="keep stores and logs")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # nothing stays behind then either
    directory = Path(tempfile.mkdtemp(prefix="lightmem-lmcache-"))
    check = Checks()
    began = time.monotonic()
    try:
        if not chosen.only_vllm:
            check_types(check)
            run(directory, check)
        if chosen.vllm or chosen.only_vllm:
            from lmcache_vllm import run_vllm

            run_vllm(directory, check)
    finally:
        for life in list(Life.all):
            life.kill()
        if chosen.keep or check.failed:
            print(f"kept: {directory}")
        else:
            shutil.rmtree(directory)
    print(f"{time.monotonic() - began:.0f} s")
    return check.end()


if __name__ == "__main__":
    sys.exit(main())
