"""Settings, environment and weights of the SGLang engine in this process, for a namespace."""

from __future__ import annotations

import os
from typing import Any

from sglang.srt import runtime_context

from light_mem.errors import InvalidArgumentError
from light_mem.integrations import weights
from light_mem.integrations.sglang import description
from light_mem.integrations.sglang.device import describe_environment


def describe_engine(given_weights: str | None) -> dict[str, Any]:
    """Settings, environment and weights as plain data.

    given_weights   what the user says of the weights

    Raises InvalidArgumentError when nothing tells which weights these are.
    """
    found: dict[str, Any] = {"environment": describe_environment(os.environ)}
    context = runtime_context.get_context()
    groups = {
        name: context.config_bag(name)
        for name in description.GROUPS
        if context.is_config_namespace_published(name)
    }
    model = groups.get("model")
    if model is None:
        # Without it neither the revision nor the type of the cache is known: only the user can
        # tell.
        if given_weights is None:
            raise InvalidArgumentError(
                "LightMem cannot find the settings of the engine in this process. Set "
                '"weights" in --hicache-storage-backend-extra-config to a text that is another one '
                "for other weights, another quantization or another type of the cache"
            )
        return {**found, "weights": {"given": given_weights}}
    found["settings"] = description.describe_settings(groups)
    hub = None if given_weights is not None else _hub_cache(model)
    dummy = getattr(model, "load_format", None) == "dummy"
    found["weights"] = weights.identify(
        model.model_path,
        given=given_weights,
        revision=model.revision,
        hub_cache=hub,
        dummy=dummy,
    )
    draft = getattr(groups.get("spec"), "speculative_draft_model_path", None)
    if draft is not None:
        found["draft_weights"] = weights.identify(
            draft,
            given=given_weights,
            revision=groups["spec"].speculative_draft_model_revision,
            hub_cache=hub,
            dummy=dummy,
        )
    return found


def _hub_cache(model: Any) -> str:
    from huggingface_hub import constants

    return str(model.download_dir or constants.HF_HUB_CACHE)
