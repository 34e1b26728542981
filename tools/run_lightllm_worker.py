"""Runs LightLLM's own DiskCacheWorker, unmodified, against this package.

    python tools/run_lightllm_worker.py CHECKOUT    # its repository, or its disk_cache_worker.py

The worker is imported from its file; only what it imports from LightLLM is replaced: the server's
name, the logger, and the CPU cache client, which keeps pages and reference counts in this process
over System V shared memory that is allocated as LightLLM does. Pages hold bytes that their hashes
determine. `--hash-bits 64` is for the worker of LightLLM's first disk cache, which passes hashes of
that size as `tokens`. Every phase is a process of its own on the same directory:

    persist     `run()` in a thread offloads prompts; then the process kills itself with SIGKILL
    load        a new process finds and loads them, and ends
    load again  once more after an orderly end, from 500 threads at once
    other size  pages of another size are refused

Prints a PASS or FAIL line a check; exits with 1 after any FAIL or a phase that dies otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from light_mem.blocks import BLOCK_SIZE_VARIABLE  # noqa: E402 - needs the path
from tests.compat_service import cumulative, some_tokens  # noqa: E402
from tests.lightllm_memory import CpuCache  # noqa: E402

PACKAGE = "lightllm.server.multi_level_kv_cache"
PAGES, PAGE_BYTES = 512, 128 << 10
STORAGE_GIB = 1  # the first disk cache had 32 shards: several blocks each
LENGTHS = (1, 63, 64, 65, 131)  # pages a prompt; a block of the default size has 64
THREADS = 500
HASH_BITS = "RUN_LIGHTLLM_HASH_BITS"  # from the parent to the phases
_failures: list[str] = []


def check(name: str, passed: object, detail: object = "") -> None:
    print(
        f"{'PASS' if passed else 'FAIL'} {name}{f': {detail}' if detail != '' else ''}", flush=True
    )
    if not passed:
        _failures.append(name)


def import_worker(source: Path) -> Any:
    """DiskCacheWorker from its file, with stubs for what it imports from LightLLM."""

    def stub(name: str, **names: object) -> None:
        module = types.ModuleType(name)
        module.__path__ = []  # a package
        vars(module).update(names)
        sys.modules[name] = module

    for name in ("lightllm", "lightllm.utils", "lightllm.server", PACKAGE):
        stub(name)
    stub("lightllm.utils.envs_utils", get_unique_server_name=lambda: "stub")
    stub("lightllm.utils.log_utils", init_logger=logging.getLogger)
    stub(f"{PACKAGE}.cpu_cache_client", CpuKvCacheClient=CpuCache)
    name = f"{PACKAGE}.disk_cache_worker"
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module.DiskCacheWorker


def page_hashes(length: int, seed: int) -> list[int]:
    bits = int(os.environ[HASH_BITS])
    return [value % (1 << bits) for value in cumulative(some_tokens(length, seed))]


def prompts() -> list[list[int]]:
    return [page_hashes(length, seed) for seed, length in enumerate(LENGTHS)]


def within(condition: Callable[[], object], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def open_worker(
    source: Path, directory: Path, page_bytes: int = PAGE_BYTES
) -> tuple[Any, CpuCache]:
    cache = CpuCache(PAGES * PAGE_BYTES // page_bytes, page_bytes)
    cache.segment.remove()  # goes with its last user; workers can still attach it by its id
    return import_worker(source)(STORAGE_GIB, cache, str(directory)), cache


# --- phases ------------------------------------------------------------------------------------


def persist(source: Path, directory: Path) -> None:
    worker, cache = open_worker(source, directory)
    service = worker.service
    check("starts", service._n == 64, f"{service._n} pages a block")
    check("its workers run", service.service.worker_pids, len(service.service.worker_pids))
    threading.Thread(target=worker.run, daemon=True).start()
    free = 0
    for hashs in prompts():
        pages = list(range(free, free + len(hashs)))
        free += len(hashs)
        cache.fill(hashs, pages)
        cache.offload(hashs, pages)
    check("lets go of every page once", within(lambda: not cache.users()), f"{free} pages")
    check("finishes its writes", within(lambda: not service.active_threads("w")))
    longest = prompts()[-1]
    longer = longest + page_hashes(20, seed=99)
    pages = list(range(len(longer)))
    cache.fill(longer, pages)
    cache.offload(longer, pages)
    check("lets go of a stored prefix and the rest", within(lambda: not cache.users()))
    within(lambda: not service.active_threads("w"))
    found = service.query(longer)
    check("stores what was new", all(found), f"{len(found)} blocks")
    written = service.service.stats()["blocks_written"]
    blocks = sum(-(-length // 64) for length in LENGTHS) + 1  # a short block became a longer one
    check("writes each block once", written == blocks, f"{written} of {blocks}")
    os.kill(os.getpid(), signal.SIGKILL)


def load(source: Path, directory: Path) -> None:
    worker, cache = open_worker(source, directory)
    for hashs in prompts():
        length = len(hashs)
        cache.wipe()
        whole = worker.query_loadable_pages(hashs, 0) == length
        pages = list(range(PAGES - length, PAGES))
        came = worker.load_pages(hashs, pages)
        check(f"loads {length} pages", whole and came and cache.holds(hashs, pages))
    hashs, pages = prompts()[-1], list(range(len(prompts()[-1])))
    cache.wipe()
    came = worker.load_pages(hashs, pages, start_pos=70)
    right = cache.wiped(pages[:64]) and cache.holds(hashs[64:], pages[64:])
    check("loads from a position, at its block", came and right)
    missing = page_hashes(5, seed=1234)
    cache.wipe()
    none = worker.query_loadable_pages(missing, 0) == 0
    none = none and not worker.load_pages(missing, list(range(5)))
    check("loads nothing that is not stored", none and cache.wiped(range(PAGES)))


def load_again(source: Path, directory: Path) -> None:
    worker, cache = open_worker(source, directory)
    cache.wipe()
    hashs = prompts()[0]
    began = time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        came = list(pool.map(lambda page: worker.load_pages(hashs, [page]), range(THREADS)))
    right = all(came) and cache.holds(hashs * THREADS, range(THREADS))
    check(f"loads in {THREADS} threads", right, f"{time.monotonic() - began:.1f} s")


def other_size(source: Path, directory: Path) -> None:
    try:
        open_worker(source, directory, PAGE_BYTES // 2)
    except ValueError as error:
        check("refuses pages of another size", "page_bytes" in str(error), error)
    else:
        check("refuses pages of another size", False)


PHASES: dict[str, tuple[Callable[[Path, Path], None], int]] = {
    "persist": (persist, -signal.SIGKILL),
    "load": (load, 0),
    "load again": (load_again, 0),
    "other size": (other_size, 0),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="LightLLM's repository, or the worker's file")
    parser.add_argument("--hash-bits", type=int, default=128, choices=(64, 128))
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    source: Path = arguments.checkout.resolve()
    if source.is_dir():
        source = source / PACKAGE.replace(".", "/") / "disk_cache_worker.py"
    if arguments.phase:
        try:
            PHASES[arguments.phase][0](source, arguments.directory)
        except Exception:
            traceback.print_exc()
            check(f"phase {arguments.phase}", False, "raised")
        return bool(_failures)
    print(f"{source.name}: sha256 {hashlib.sha256(source.read_bytes()).hexdigest()}", flush=True)
    environment = {**os.environ, HASH_BITS: str(arguments.hash_bits)}
    environment.pop(BLOCK_SIZE_VARIABLE, None)
    with tempfile.TemporaryDirectory() as directory:
        for phase, (_, expected) in PHASES.items():
            print(f"{phase}:", flush=True)
            command = [sys.executable, __file__, str(source)]
            result = subprocess.run(
                [*command, "--phase", phase, "--directory", directory],
                env=environment,
                check=False,
            )
            if result.returncode != expected:
                check(f"phase {phase} ends with {expected}", False, result.returncode)
    print("FAIL" if _failures else "PASS", "as a whole")
    return bool(_failures)


if __name__ == "__main__":
    sys.exit(main())
