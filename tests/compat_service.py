"""What the tests of the drop-in interface share: a small service, prompts, pages by their key."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from light_mem import PyLocalCacheService, PyState, PyTask, allocate_kvcache
from tests.payload import page_bytes_of

PAGE = 512  # bytes
N = 64  # pages a block: small pages make full blocks
PAGES = 512
STORAGE = 4 * 16 * N * PAGE  # four shards of 16 full blocks
FINISHED, ABORTED = PyState.Finished, PyState.Aborted


@contextmanager
def opened(
    directory: Path, *, page: int = PAGE, storage: int = STORAGE, shards: int = 4
) -> Iterator[Rig]:
    """A service of two workers over a tensor of its own."""
    kv = allocate_kvcache(PAGES, page)
    with PyLocalCacheService(kv, str(directory), storage, shards, 2) as service:
        rig = Rig(service, kv)
        yield rig
        # pytest keeps a fixture's value beyond its end, and with it the mappings of the service.
        vars(rig).clear()


class Rig:
    """A service, its tensor, and short words for filling, wiping and comparing pages."""

    def __init__(self, service: PyLocalCacheService, kv: torch.Tensor) -> None:
        self.service = service
        self.kv = kv

    def fill(self, prompt: object, pages: Sequence[int]) -> None:
        """Give pages the bytes of a prompt's first, second, ... page."""
        for at, page in enumerate(pages):
            self.kv[page] = self.expected(prompt, at)

    def wipe(self) -> None:
        self.kv.fill_(0xEE)

    def holds(self, prompt: object, at: int, page: int) -> bool:
        """Whether a page has the bytes of a prompt's `at`-th page."""
        return bool(torch.equal(self.kv[page], self.expected(prompt, at)))

    def wiped(self, page: int) -> bool:
        return bool((self.kv[page] == 0xEE).all())

    def expected(self, prompt: object, at: int) -> torch.Tensor:
        return torch.from_numpy(page_bytes_of(prompt, at, self.kv.shape[1]))


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with opened(tmp_path / "cache_file") as rig:
        yield rig


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """One service for calls that must change nothing."""
    with opened(tmp_path_factory.mktemp("idle") / "cache_file") as rig:
        yield rig


def finish(task: PyTask) -> list[PyState]:
    assert task.wait(20)
    return task.state()


def indexer(pages: Sequence[int]) -> torch.Tensor:
    return torch.tensor(pages, dtype=torch.int32)


def some_tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(150_000), k=count)


def cumulative(tokens: Sequence[int]) -> list[int]:
    """A 128-bit hash of everything up to each token: the newer generation's argument."""
    running = xxhash.xxh3_128()
    hashes = []
    for token in tokens:
        running.update(np.uint64(token).tobytes())
        hashes.append(running.intdigest())
    return hashes
