"""The entry point of `vllm.general_plugins`: vLLM calls `register` in each of its processes."""

from __future__ import annotations

import logging

log = logging.getLogger("light_mem")

TIER_TYPE = "light_mem"


def register() -> None:
    """Make `"type": "light_mem"` a secondary tier; nothing is opened before a server uses it.

    Calling it again does nothing, and so does a vLLM without secondary tiers.
    """
    try:
        from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
    except ImportError as error:
        log.debug("this vLLM has no secondary tiers: %s", error)
        return
    try:
        SecondaryTierFactory.register_tier(
            TIER_TYPE, "light_mem.integrations.vllm.tier", "LightMemTier"
        )
    except ValueError:
        log.debug("the tier %s is registered already", TIER_TYPE)
