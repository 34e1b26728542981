"""EngineSettings: what a service asks of its engine and of those of its workers."""

from __future__ import annotations

from typing import NamedTuple


class EngineSettings(NamedTuple):
    """How blocks are written and read; `LocalCacheService` describes each. JSON through
    `_asdict()`."""

    verify: bool = True
    durability: str = "kernel"  # or "flush"
    page_cache: str = "keep"  # or "drop"
    time_to_live: float | None = None  # seconds after which what this engine writes is absent


DEFAULTS = EngineSettings()
