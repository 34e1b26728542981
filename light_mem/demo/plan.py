"""What both processes of the demo must agree on, and what each builds from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.resources import files

import torch
from torch import Tensor

from light_mem import LocalCacheService
from light_mem.demo.model import ModelConfig, Transformer
from light_mem.demo.pages import PagedKV

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, the tokens done and the tokens in all."""


@dataclass(frozen=True)
class Plan:
    """The request and the store; goes to the second process as JSON, on its command line."""

    store: str
    tokens: int  # of the prompt
    steps: int  # tokens to decode after it
    workers: int
    seed: int
    threads: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        return cls(**json.loads(text))

    def service(self, kvcache: Tensor) -> LocalCacheService:
        """The service of one process; both open the store with the same numbers."""
        return LocalCacheService(
            file=self.store,
            storage_size=self.storage_size,
            num_of_shard=4,
            kvcache=kvcache,
            num_workers=self.workers,
        )

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(seed=self.seed)

    @property
    def pages(self) -> int:
        """Pages of one request."""
        return self.config.pages_for(self.tokens + self.steps)

    @property
    def num_pages(self) -> int:
        """Rows of the page tensor: more than a request needs, so that every request gets others."""
        return self.pages + self.pages // 4 + 8

    @property
    def storage_size(self) -> int:
        """Room for twice the request and some: hashes do not fall evenly on the shards."""
        return max(256 << 20, (2 * self.pages + 64) * self.config.page_bytes)

    def prompt(self) -> list[int]:
        return list(prompt_text()[: self.tokens])


def prompt_text() -> bytes:
    return files("light_mem.demo").joinpath("text.txt").read_bytes()


class Engine:
    """The model and its page tensor: one process's half of a server."""

    def __init__(self, config: ModelConfig, kvcache: Tensor, threads: int) -> None:
        torch.set_num_threads(threads)  # part of what makes sums repeatable
        self.config = config
        self.kvcache = kvcache
        self.model = Transformer(config)
        self.cache = PagedKV(
            kvcache,
            layers=config.layers,
            tokens_per_page=config.tokens_per_page,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
        )
        # The first call of every kernel and the first touch of every page are slow, in each
        # process. Paid here, or the first request of the comparison would pay them.
        self.model_warm_up()

    def model_warm_up(self) -> None:
        table = torch.arange(self.config.pages_per_chunk)
        with torch.inference_mode():
            self.model.forward([0] * self.config.tokens_per_chunk, 0, self.cache, table)
        self.wipe()

    def wipe(self) -> None:
        """Forget all K and V, so that nothing but the store can bring them back."""
        self.kvcache.zero_()

    def allot(self, pages: int, seed: int) -> Tensor:
        """A block table of `pages` pages in random order: no request gets 0, 1, 2, ..."""
        order = torch.randperm(len(self.kvcache), generator=torch.Generator().manual_seed(seed))
        return order[:pages]
