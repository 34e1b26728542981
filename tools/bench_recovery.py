#!/usr/bin/env python3
"""Measures the recovery tool: rebuild of a large index, bytes of index an entry, rate of verify.

    python3 tools/bench_recovery.py                         # 1,000,000 blocks; some 4 GB of disk
    python3 tools/bench_recovery.py --blocks 100000 --gib 0.5 --directory /mnt/disk

The stores are synthetic: records and bytes are written straight into the shard files, as a server
would have left them, because a server would take minutes for a million blocks.

verify is compared with plain readers of the same data files, as many threads, the same pieces:
`read` only reads, `read+xxh3` also takes one running checksum. Cold: the kernel was asked to
forget the files before. Rounds alternate and the best of each counts, because what else runs on
the machine only ever slows things down.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from light_mem.engine.local import LocalStorageEngine
from light_mem.index import format as fmt
from light_mem.index import keys as keymath
from light_mem.index.recovery import record_crc
from light_mem.maintenance import inspect, rebuild, verify
from light_mem.maintenance.data import MAX_JOBS
from light_mem.maintenance.data_file import PIECE_BYTES

SHARDS = 4
JOBS = min(MAX_JOBS, os.cpu_count() or 1)


def make_store(directory: Path, blocks: int, page_bytes: int, pages: int) -> None:
    """A store of `blocks` blocks of `pages` pages, its records written, without an index."""
    keys = np.random.default_rng(1).integers(0, 2**64, (blocks, 2), np.uint64)
    shards = keymath.shards_of(keymath.mix(keys), SHARDS)
    slots = int(np.bincount(shards, minlength=SHARDS).max()) * pages
    LocalStorageEngine.open_store(
        directory,
        page_bytes=page_bytes,
        num_of_shard=SHARDS,
        storage_size=slots * SHARDS * page_bytes,
        block_pages=pages,
        kind="tool",
    ).close()
    now = time.time_ns()
    for shard in range(SHARDS):
        mine = keys[shards == shard]
        sums = write_data(directory / f"shard-{shard:03}.data", mine, page_bytes * pages)
        records = np.zeros(slots, fmt.RECORD)
        first = records[: len(mine) * pages : pages]
        first["low"], first["high"], first["checksum"] = mine[:, 0], mine[:, 1], sums
        first["tag"], first["nbytes"], first["run"] = fmt.LIVE, page_bytes * pages, pages
        first["used"] = now + np.random.default_rng(shard).permutation(len(mine))
        first["crc"] = [record_crc(record) for record in first]
        with (directory / f"shard-{shard:03}.slots").open("r+b") as file:
            file.seek(fmt.SHARD_HEADER_BYTES)
            file.write(records.tobytes())
    (directory / "index").unlink()


def write_data(path: Path, keys: np.ndarray, nbytes: int) -> list[int]:
    """Bytes of the blocks, one after the other; returns their checksums."""
    rng = np.random.Generator(np.random.SFC64(0))
    batch = max(1, (8 << 20) // nbytes)
    sums = []
    with path.open("r+b") as file:
        file.seek(fmt.SHARD_HEADER_BYTES)
        for at in range(0, len(keys), batch):
            part = keys[at : at + batch]
            data = rng.integers(0, 256, (len(part), nbytes), np.uint8)
            file.write(data.data)
            for row, key in zip(data, part, strict=True):
                checksum = xxhash.xxh3_64(key.tobytes())
                checksum.update(row.data)
                sums.append(checksum.intdigest())
    return sums


def forget(directory: Path) -> None:
    """Ask the kernel to drop the cached pages of the store's files."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_plainly(directory: Path, nbytes: int, hashing: bool) -> None:
    """Read the data files with JOBS threads, each a part of a file at a time."""
    parts = []
    for path in sorted(directory.glob("shard-*.data")):
        size = min(path.stat().st_size, fmt.SHARD_HEADER_BYTES + nbytes)
        parts += [(path, at, min(at + (256 << 20), size)) for at in range(0, size, 256 << 20)]

    def read(part: tuple[Path, int, int]) -> None:
        path, at, end = part
        buffer = memoryview(bytearray(PIECE_BYTES))
        checksum = xxhash.xxh3_64()
        descriptor = os.open(path, os.O_RDONLY)
        while at < end:
            count = os.preadv(descriptor, [buffer[: min(PIECE_BYTES, end - at)]], at)
            if hashing:
                checksum.update(buffer[:count])
            at += count
        os.close(descriptor)

    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(read, parts))


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def bench_rebuild(directory: Path, blocks: int, rounds: int) -> None:
    print(f"rebuild, {blocks:,} blocks in {SHARDS} shards, {JOBS} cores")
    for name in ("index missing", "index there, order of use kept"):
        seconds = []
        for _ in range(rounds):
            if name == "index missing":
                (directory / "index").unlink(missing_ok=True)
            report = rebuild(directory)
            assert report.blocks == blocks, report
            seconds.append(report.seconds)
        kept = f", {report.kept_order:,} kept their order" if report.kept_order else ""
        print(f"  {name}: {min(seconds):.2f} s (of {rounds}: up to {max(seconds):.2f}){kept}")
    store = inspect(directory)
    print(f"  index: {store.index_bytes / blocks:.1f} bytes an entry")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"  most memory of this process: {peak / 1e6:.0f} MB")


def bench_verify(directory: Path, nbytes: int, rounds: int) -> None:
    total = verify(directory).nbytes
    assert total == nbytes
    ways: dict[str, Callable[[], object]] = {
        "read": lambda: read_plainly(directory, nbytes, False),
        "read+xxh3": lambda: read_plainly(directory, nbytes, True),
        "verify": lambda: verify(directory),
    }
    for temperature in ("cold", "in page cache"):
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(rounds):
            for name, call in ways.items():
                if temperature == "cold":
                    forget(directory)
                best[name] = min(best[name], timed(call))
        rates = {name: nbytes / seconds / 1e9 for name, seconds in best.items()}
        text = ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items())
        ratio = rates["verify"] / rates["read+xxh3"]
        print(f"  {temperature}: {text} GB/s; verify is {ratio:.2f} of read+xxh3")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=1_000_000, help="for rebuild (%(default)s)")
    parser.add_argument("--gib", type=float, default=2.0, help="for verify (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--directory", help="where to make the stores (default: a temporary one)")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="light-mem-bench-", dir=arguments.directory))
    try:
        make_store(root / "many", arguments.blocks, 256, 1)
        bench_rebuild(root / "many", arguments.blocks, arguments.rounds)
        print(f"verify, {arguments.blocks:,} blocks of 256 bytes")
        bench_verify(root / "many", arguments.blocks * 256, arguments.rounds)
        shutil.rmtree(root / "many")
        for page_bytes, pages in ((4096, 1), (65536, 1), (65536, 64)):
            blocks = int(arguments.gib * 2**30) // (page_bytes * pages)
            make_store(root / "store", blocks, page_bytes, pages)
            rebuild(root / "store")
            print(f"verify, {blocks:,} blocks of {page_bytes * pages // 1024:,} KiB")
            bench_verify(root / "store", blocks * page_bytes * pages, arguments.rounds)
            shutil.rmtree(root / "store")
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
