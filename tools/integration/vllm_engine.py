"""One life of a vLLM engine for `vllm_restart.py`: prompts in, tokens and counts out, as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def counters(llm: Any) -> dict[str, float]:
    """vLLM's metrics of the tier and of the connector, those that have a value."""
    found: dict[str, float] = {}
    for metric in llm.get_metrics():
        if "offload" in metric.name and hasattr(metric, "value"):
            tier = metric.labels.get("tier")
            name = metric.name.removeprefix("vllm:kv_offload_") + (f" {tier}" if tier else "")
            found[name] = found.get(name, 0) + metric.value
    return found


def main(config: dict[str, Any], answer: Path) -> None:
    """Answer the prompts one by one; then leave, or wait to be killed."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(**config["kv_transfer_config"])
    llm = LLM(model=config["model"], kv_transfer_config=transfer, **config["engine"])
    sampling = SamplingParams(temperature=0, max_tokens=config["max_tokens"], ignore_eos=True)
    requests = []
    for tokens in config["prompts"]:
        started = time.perf_counter()
        (output,) = llm.generate({"prompt_token_ids": tokens}, sampling, use_tqdm=False)
        requests.append(
            {
                "tokens": list(output.outputs[0].token_ids),
                "cached": output.num_cached_tokens,
                "seconds": time.perf_counter() - started,
            }
        )
    # A step takes the counts of what ended before it along.
    llm.generate({"prompt_token_ids": [1, 2, 3]}, sampling, use_tqdm=False)
    result = {"requests": requests, "counters": counters(llm)}
    part = answer.with_suffix(".part")
    part.write_text(json.dumps(result))
    os.replace(part, answer)
    if config["wait_to_be_killed"]:
        while True:
            time.sleep(1)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
