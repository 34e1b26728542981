"""The options of the backend in SGLang's `--hicache-storage-backend-extra-config`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from light_mem import blocks
from light_mem.errors import InvalidArgumentError
from light_mem.integrations.settings import read_options

# What SGLang itself reads there.
_SGLANG = frozenset(
    """
    backend_name module_path class_name interface_v1 allocator tp_lcm_size prefetch_threshold
    prefetch_timeout_base prefetch_timeout_per_ki_token hicache_storage_pass_prefix_keys
    file_storage_path
    """.split()
)


@dataclass(frozen=True)
class StorageOptions:
    """What the extra config may say beside SGLang's own keys.

    file            directory of the store; `{pp_rank}`, `{tp_rank}` and `{dp_rank}` are put in
    storage_size    bytes of pages that the store holds at most; allocated when it is opened
    num_of_shard    shards of a new store; an existing one must have as many
    num_workers     processes that copy, for each rank (and each buffer of its host pools)
    weights         tells these weights from others, in place of what LightMem finds out
    namespace       told apart: what is stored under another text is not found
    load_timeout    seconds after which a load gives up what nobody has begun
    store_timeout   the same for a store
    pool_ratio      by the name of a side pool: pages of it that are stored for each page of KV
    verify, durability, page_cache, time_to_live   as for LocalCacheService
    """

    file: str
    storage_size: int
    num_of_shard: int = 8
    num_workers: int = 2
    weights: str | None = None
    namespace: str = ""
    load_timeout: float = 30.0
    store_timeout: float = 60.0
    pool_ratio: Mapping[str, float] = field(default_factory=dict)
    verify: bool = True
    durability: str = "kernel"
    page_cache: str = "keep"
    time_to_live: float | None = None

    @classmethod
    def parse(cls, extra_config: Mapping[str, Any]) -> StorageOptions:
        """The options; raises InvalidArgumentError for one that is missing, unknown or wrong, and
        when SGLang is not told to pass pages in place (`interface_v1`)."""
        if not extra_config.get("interface_v1"):
            raise InvalidArgumentError(
                'the LightMem backend moves pages in place only: put "interface_v1": 1 into '
                "--hicache-storage-backend-extra-config"
            )
        given = {name: value for name, value in extra_config.items() if name not in _SGLANG}
        texts = ("file", "namespace", "weights")
        found = read_options(cls, given, who="the LightMem backend", texts=texts)
        blocks.whole_number("storage_size", found.storage_size, 1, 2**63 - 1)
        blocks.seconds("load_timeout", found.load_timeout)
        blocks.seconds("store_timeout", found.store_timeout)
        _check_ratios(found.pool_ratio)
        return found

    def path(self, ranks: Mapping[str, int]) -> str:
        """`file` with the ranks, by name, put in."""
        path = self.file
        for name, rank in ranks.items():
            path = path.replace("{" + name + "}", str(rank))
        return path


def _check_ratios(ratios: object) -> None:
    fine = isinstance(ratios, Mapping) and all(
        isinstance(name, str)
        and name != "kv"
        and isinstance(ratio, (int, float))
        and not isinstance(ratio, bool)
        and 0 < ratio < math.inf
        for name, ratio in ratios.items()
    )
    if not fine:
        raise InvalidArgumentError(
            "pool_ratio gives, by the names of side pools, numbers above 0: pages stored for each "
            f"page of the pool kv, not {ratios!r}",
            pool_ratio=ratios,
        )
