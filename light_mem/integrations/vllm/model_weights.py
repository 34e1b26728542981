"""Which weights an engine of vLLM has, for a namespace: the model's, and those of its draft."""

from __future__ import annotations

from typing import Any

from light_mem.integrations import weights


def identify(engine: Any, model: str, given: str | None) -> dict[str, Any]:
    """`weights`, and `draft_weights` where a draft model has others, as plain data.

    engine  vLLM's VllmConfig
    model   the name of the model, as a tier is told it
    given   what the user says of the weights, all of them

    A draft model has layers of its own in the cache: their rows are another model's bytes too.
    Raises InvalidArgumentError when nothing tells which weights these are.
    """
    revision = engine.model_config.revision
    found = {"weights": _identify(model, revision, engine.load_config, given)}
    speculative: Any = getattr(engine, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    # n-grams have the target itself for a draft, and layers that guess several tokens mostly lie
    # in the model's own files.
    target = engine.model_config.model
    if draft is not None and (draft.model, draft.revision) != (target, revision):
        load_config = speculative.draft_load_config or engine.load_config
        found["draft_weights"] = _identify(draft.model, draft.revision, load_config, given)
    return found


def _identify(
    model: str, revision: str | None, load_config: Any, given: str | None
) -> dict[str, Any]:
    from huggingface_hub import constants

    return weights.identify(
        model,
        given=given,
        revision=revision,
        hub_cache=load_config.download_dir or constants.HF_HUB_CACHE,
        dummy=load_config.load_format == "dummy",
    )
