#!/usr/bin/env python3
"""Measures the recovery tool: rebuild of a large index, bytes of index an entry, rate of verify.

    python3 tools/bench_recovery.py                         # 1,000,000 blocks; some 4 GB of disk
    python3 tools/bench_recovery.py --blocks 100000 --gib 0.5 --directory /mnt/disk

The stores are synthetic: records and bytes are written straight into the shard files, as a server
would have left them, because a server would take minutes for a million blocks.

verify is compared with plain readers of the same data files: as many processes, started before
the clock, that read pieces of 1 MiB (`read`) and call the checksum once a block (`read+xxh3`).
Cold: the kernel was asked to forget the files before. Rounds alternate. Of rebuild the best one
counts, because what else runs only ever slows it down; of verify the medians, for the ratios.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import xxhash

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from light_mem.engine.local import LocalStorageEngine
from light_mem.index import format as fmt
from light_mem.index import keys as keymath
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
        first["crc"] = checksums(first, fmt.RECORD_CRC_BYTES) & 0xFFFFFFFF
        with (directory / f"shard-{shard:03}.slots").open("r+b") as file:
            file.seek(fmt.SHARD_HEADER_BYTES)
            file.write(records.tobytes())
    (directory / "index").unlink()


def write_data(path: Path, keys: np.ndarray, nbytes: int) -> np.ndarray:
    """Bytes of the blocks, one after the other; returns their checksums."""
    rng = np.random.Generator(np.random.SFC64(0))
    batch = max(1, (8 << 20) // nbytes)
    framed = np.empty((min(batch, len(keys)), 16 + nbytes), np.uint8)  # the key, then the bytes
    sums = []
    with path.open("r+b") as file:
        file.seek(fmt.SHARD_HEADER_BYTES)
        for at in range(0, len(keys), batch):
            part = keys[at : at + batch]
            frames = framed[: len(part)]
            frames[:, :16] = part.view(np.uint8)
            frames[:, 16:] = rng.integers(0, 256, (len(part), nbytes), np.uint8)
            file.write(frames[:, 16:].tobytes())
            sums.append(checksums(frames, 16 + nbytes))
    return np.concatenate(sums) if sums else np.empty(0, np.uint64)


def checksums(rows: np.ndarray, nbytes: int) -> np.ndarray:
    """xxh3-64 of the first `nbytes` of each row, uint64; without a line of Python a row."""
    raw = memoryview(np.ascontiguousarray(rows).view(np.uint8).reshape(-1))
    size = len(raw) // max(1, len(rows))
    pieces = (raw[at : at + nbytes] for at in range(0, len(raw), size))
    return np.frombuffer(b"".join(map(xxhash.xxh3_64_digest, pieces)), ">u8").astype(np.uint64)


def forget(directory: Path) -> None:
    """Ask the kernel to drop the cached pages of the store's files."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


class PlainReaders:
    """JOBS processes that read the data files in pieces, and no more: what `verify` is held up
    against. They are started before the clock is; each takes every JOBS-th part of a file."""

    PROGRAM = """
import os, sys
sys.path[:] = sys.argv[1].split(os.pathsep)
from xxhash import xxh3_64_digest as digest
number, jobs, piece, block, end = map(int, sys.argv[2:7])
buffer = memoryview(bytearray(piece + 16))
step = max(1, min(block, piece))
frames = [buffer[at : at + 16 + step] for at in range(0, piece, step)]
parts = [(path, at) for path in sys.argv[7:] for at in range(0, end, 64 * piece)]
for line in sys.stdin:
    hashing = line.strip() == "hash"
    for path, start in parts[number::jobs]:
        descriptor = os.open(path, os.O_RDONLY)
        for at in range(start, min(start + 64 * piece, end), piece):
            count = os.preadv(descriptor, [buffer[16:]], at)
            if hashing:
                b"".join(map(digest, frames[: -(-count // step)]))
        os.close(descriptor)
    print("done", flush=True)
"""

    def __init__(self, directory: Path, block: int, nbytes: int) -> None:
        """`block` bytes are hashed by one call, with 16 bytes before them as if a key; a file has
        `nbytes` of blocks at most."""
        files = sorted(map(str, directory.glob("shard-*.data")))
        end = fmt.SHARD_HEADER_BYTES + nbytes
        self._children = [
            subprocess.Popen(
                [sys.executable, "-S", "-c", self.PROGRAM, os.pathsep.join(sys.path)]
                + [str(n) for n in (number, JOBS, PIECE_BYTES, block, end)]
                + files,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
            )
            for number in range(JOBS)
        ]

    def run(self, what: bytes) -> None:
        """`b"read"` or `b"hash"`; returns when all have done it."""
        for child in self._children:
            child.stdin.write(what + b"\n")
        for child in self._children:
            if child.stdout.readline() != b"done\n":
                raise RuntimeError("a plain reader failed")

    def close(self) -> None:
        for child in self._children:
            child.stdin.close()
            child.wait()
            child.stdout.close()


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


def bench_verify(directory: Path, block: int, nbytes: int, rounds: int) -> None:
    assert verify(directory).nbytes == nbytes
    readers = PlainReaders(directory, block, largest_share(directory, block))
    ways: dict[str, Callable[[], object]] = {
        "read": lambda: readers.run(b"read"),
        "read+xxh3": lambda: readers.run(b"hash"),
        "verify": lambda: verify(directory),
    }
    try:
        for temperature in ("cold", "in page cache"):
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(rounds):
                for name, call in ways.items():
                    if temperature == "cold":
                        forget(directory)
                    seconds[name].append(timed(call))
            rates = {name: nbytes / median(taken) / 1e9 for name, taken in seconds.items()}
            text = ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items())
            ratio = rates["verify"] / rates["read+xxh3"]
            print(f"  {temperature}: {text} GB/s; verify is {ratio:.2f} of read+xxh3")
    finally:
        readers.close()


def largest_share(directory: Path, block: int) -> int:
    """Bytes of blocks in the shard that has the most."""
    return max(
        (path.stat().st_size - fmt.SHARD_HEADER_BYTES) // block * block
        for path in directory.glob("shard-*.data")
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=1_000_000, help="for rebuild (%(default)s)")
    parser.add_argument("--gib", type=float, default=2.0, help="for verify (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--only", choices=("rebuild", "verify"), help="one part (default: both)")
    parser.add_argument("--directory", help="where to make the stores (default: a temporary one)")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="light-mem-bench-", dir=arguments.directory))
    try:
        make_store(root / "many", arguments.blocks, 256, 1)
        if arguments.only == "verify":
            rebuild(root / "many")
        else:
            bench_rebuild(root / "many", arguments.blocks, arguments.rounds)
        if arguments.only == "rebuild":
            return
        print(f"verify, {arguments.blocks:,} blocks of 256 bytes")
        bench_verify(root / "many", 256, arguments.blocks * 256, arguments.rounds)
        shutil.rmtree(root / "many")
        for page_bytes, pages in ((4096, 1), (65536, 1), (65536, 64)):
            size = page_bytes * pages
            blocks = int(arguments.gib * 2**30) // size
            make_store(root / "store", blocks, page_bytes, pages)
            rebuild(root / "store")
            print(f"verify, {blocks:,} blocks of {size // 1024:,} KiB")
            bench_verify(root / "store", size, blocks * size, arguments.rounds)
            shutil.rmtree(root / "store")
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
