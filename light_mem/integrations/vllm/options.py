"""The options of the tier in vLLM's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from light_mem import blocks
from light_mem.errors import InvalidArgumentError
from light_mem.integrations.settings import read_options


@dataclass(frozen=True)
class TierOptions:
    """What an entry of `secondary_tiers` may say beside `type`, `module_path`, `backpressure`.

    file               directory of the store
    storage_size       bytes of chunks that the store holds at most; allocated when it is opened
    num_of_shard       shards of a new store; an existing one must have as many
    num_workers        processes that copy
    weights            tells these weights from others, in place of what LightMem finds out
    namespace          told apart: what is stored under another text is not found
    max_queued_blocks  chunks of stores that may wait; more are dropped. 0: half the primary tier
    load_timeout       seconds after which a load gives up what nobody has begun
    shutdown_timeout   seconds that the shutdown waits for stores
    verify, durability, page_cache, time_to_live   as for LocalCacheService
    locality           "LOCAL" or "REMOTE", for vLLM's filter of tiers
    """

    file: str
    storage_size: int
    num_of_shard: int = 8
    num_workers: int = 4
    weights: str | None = None
    namespace: str = ""
    max_queued_blocks: int = 0
    load_timeout: float = 30.0
    shutdown_timeout: float = 10.0
    verify: bool = True
    durability: str = "kernel"
    page_cache: str = "keep"
    time_to_live: float | None = None
    locality: str = "LOCAL"

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> TierOptions:
        """The options; raises InvalidArgumentError for one that is missing, unknown or wrong."""
        texts = ("file", "namespace", "weights", "locality")
        found = read_options(cls, options, who="the light_mem tier", texts=texts)
        if found.locality not in ("LOCAL", "REMOTE"):
            raise InvalidArgumentError(
                f'locality is "LOCAL" or "REMOTE", not {found.locality!r}', locality=found.locality
            )
        blocks.whole_number("max_queued_blocks", found.max_queued_blocks, 0, 2**31)
        blocks.seconds("load_timeout", found.load_timeout)
        blocks.seconds("shutdown_timeout", found.shutdown_timeout)
        return found
