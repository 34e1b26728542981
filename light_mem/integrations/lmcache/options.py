"""The options of the adapter: `adapter_params` in LMCache's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from light_mem import blocks
from light_mem.integrations.settings import read_options


@dataclass(frozen=True)
class AdapterOptions:
    """What `adapter_params` may say.

    file              directory of the store
    storage_size      bytes of objects that the store holds at most; allocated when it is opened
    num_of_shard      shards of a new store; an existing one must have as many
    num_workers       processes that copy
    slot_bytes        unit in which a new store gives out room; an existing one must have the same
    namespace         told apart: what is stored under another text is not found
    layout_in_keys    objects of another shape or type are not found; false with LMCache's serde
    max_queued_bytes  bytes of stores that may be under way; more are dropped. 0: half the pool
    store_timeout     seconds after which a store is given up
    load_timeout      seconds after which a load gives up what nobody has begun
    shutdown_timeout  seconds that closing waits for stores
    verify, durability, page_cache, time_to_live   as for LocalCacheService
    """

    file: str
    storage_size: int
    num_of_shard: int = 8
    num_workers: int = 4
    slot_bytes: int = 65536
    namespace: str = ""
    layout_in_keys: bool = True
    max_queued_bytes: int = 0
    store_timeout: float = 60.0
    load_timeout: float = 30.0
    shutdown_timeout: float = 10.0
    verify: bool = True
    durability: str = "kernel"
    page_cache: str = "keep"
    time_to_live: float | None = None

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> AdapterOptions:
        """The options; raises InvalidArgumentError for one that is missing, unknown or wrong."""
        texts = ("file", "namespace")
        found = read_options(cls, options, who="the LightMem adapter", texts=texts)
        blocks.yes_or_no("layout_in_keys", found.layout_in_keys)
        blocks.whole_number("slot_bytes", found.slot_bytes, 64, 2**31)
        blocks.whole_number("max_queued_bytes", found.max_queued_bytes, 0, 2**63 - 1)
        for name in ("store_timeout", "load_timeout", "shutdown_timeout"):
            blocks.seconds(name, getattr(found, name))
        return found
