"""The model: one that makes itself, or a local checkpoint; and what its pages depend on.

Nothing is downloaded. `tiny` and `small` have random weights from a fixed seed, so their text is
noise; what they are good for is to see the time to the first token, and that the tokens are the
same with and without the cache.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig
from transformers.cache_utils import DynamicLayer

from .pages import PageLayout
from .prefix import identity

# The default of transformers, 0.02, makes an untrained model look at all tokens alike: each of
# them drowns in the mean, and a wrong page would hardly show. Larger weights make it pick some.
_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.15,
    },
    "small": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "initializer_range": 0.05,
    },
}
_SEED = 0
_VOCABULARY = 256  # of the random models: a token is a byte


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: Sequence[int]) -> str: ...


class ByteTokenizer:
    """A token is a byte of UTF-8."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")


@dataclass(frozen=True)
class Model:
    network: Any  # a transformers model for causal language modelling
    tokenizer: Tokenizer | None  # None: the checkpoint has none, requests must give tokens
    layout: PageLayout
    identity: bytes
    vocabulary: int
    max_tokens: int  # prompt and answer together
    end_tokens: frozenset[int]


def load_model(name: str, tokens_per_page: int, dtype: torch.dtype | None = None) -> Model:
    """`name` is `tiny`, `small` or the directory of a checkpoint in the format of transformers.

    `dtype=None` is float32 for the random models and the checkpoint's own for a checkpoint.
    Raises ValueError for a model whose K and V cannot be kept in pages, see `layout_of`.
    """
    tokenizer: Tokenizer | None = ByteTokenizer()
    if name in _SIZES:
        config = LlamaConfig(
            vocab_size=_VOCABULARY,
            max_position_embeddings=16384,
            bos_token_id=None,
            eos_token_id=None,
            **_SIZES[name],
        )
        torch.manual_seed(_SEED)
        network = AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)
    elif Path(name).is_dir():
        network = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype or "auto", local_files_only=True
        )
        has_tokenizer = (Path(name) / "tokenizer_config.json").exists()
        tokenizer = (
            AutoTokenizer.from_pretrained(name, local_files_only=True) if has_tokenizer else None
        )
    else:
        raise ValueError(f"{name!r} is no directory, and none of {', '.join(_SIZES)}")
    network.eval()
    layout = layout_of(network, tokens_per_page)
    text_config = network.config.get_text_config()
    ends = network.generation_config.eos_token_id
    return Model(
        network=network,
        tokenizer=tokenizer,
        layout=layout,
        identity=identity_of(network, layout),
        vocabulary=text_config.vocab_size,
        max_tokens=text_config.max_position_embeddings,
        end_tokens=frozenset([ends] if isinstance(ends, int) else ends or []),
    )


@torch.inference_mode()
def layout_of(network: Any, tokens_per_page: int) -> PageLayout:
    """The shape of the model's K and V, from those of one token.

    Raises ValueError if a page could not hold them: layers with a sliding window forget tokens,
    state-space layers have no K and V, and this example knows one shape for all layers; or if they
    depend on more than the tokens up to their own.
    """
    rope = json.dumps(getattr(network.config.get_text_config(), "rope_parameters", None))
    for kind in ("dynamic", "longrope"):
        if f'"{kind}"' in rope:
            raise ValueError(f"rope_type {kind!r}: K would depend on the length of the sequence")
    cache: Any = DynamicCache(config=network.config)
    network(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
    if not all(type(layer) is DynamicLayer for layer in cache.layers):
        kinds = sorted({type(layer).__name__ for layer in cache.layers})
        raise ValueError(f"only full attention can be cached in pages, not {', '.join(kinds)}")
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    if len({(tensor.shape, tensor.dtype) for tensor in tensors}) != 1:
        raise ValueError("K and V differ in shape or type between layers")
    _, heads, _, head_dim = tensors[0].shape
    return PageLayout(len(cache.layers), heads, head_dim, tensors[0].dtype, tokens_per_page)


def identity_of(network: Any, layout: PageLayout) -> bytes:
    """What the bytes of a page depend on, apart from the tokens.

    The weights themselves rather than a name or a revision: a fine-tuned copy under the old name
    and an adapter that was merged in are other models. xxh3 takes them at the speed of memory; it
    guards against mistakes, not against someone who makes weights that collide.

    Not in it: the release of torch, the CPU, the number of threads. They change the order of sums
    and so the last bits, as another batch size does, but not what the numbers mean.
    """
    config = network.config.to_dict()
    for name in ("transformers_version", "_name_or_path"):
        config.pop(name, None)
    weights = xxhash.xxh3_128()
    for name, tensor in sorted(network.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return identity(
        {
            "format": "light-mem example server, pages 1",  # change it with PageLayout
            "config": json.dumps(config, sort_keys=True, default=str),
            "weights": weights.hexdigest(),
            **asdict(layout),
        }
    )
