"""A decoder-only transformer in plain torch, small enough to read and real enough to cost time.

Byte-level tokens, RMSNorm before each part, rotary positions, causal attention with grouped key
and value heads, a gated MLP, float32. The weights are random but seeded: nothing is downloaded,
and two processes build the same model from the same number. So the text it writes is noise; what
the demo looks at is the time to the first token and whether every bit of every logit agrees.

Keys and values live in `PagedKV` only: the model keeps nothing between two calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu, softmax

from light_mem.demo.pages import PagedKV

VOCABULARY = 256  # a token is a byte


@dataclass(frozen=True)
class ModelConfig:
    """The sizes; the defaults make a prefill of 4,000 tokens cost seconds on two cores."""

    layers: int = 8
    heads: int = 12
    kv_heads: int = 4
    head_dim: int = 64
    hidden: int = 2048
    tokens_per_page: int = 32
    tokens_per_chunk: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads")
        if self.tokens_per_chunk % self.tokens_per_page:
            raise ValueError("a prefill chunk must be a whole number of pages")

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def page_bytes(self) -> int:
        """One page: K and V of `tokens_per_page` tokens for all layers, in float32."""
        return self.layers * 2 * self.tokens_per_page * self.kv_heads * self.head_dim * 4

    @property
    def pages_per_chunk(self) -> int:
        return self.tokens_per_chunk // self.tokens_per_page

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.tokens_per_page)


class Layer(NamedTuple):
    """The weights of one layer, each `[in, out]`."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


class Transformer:
    """`forward` takes some tokens at known positions and gives the logits after the last one.

    Bit-for-bit repeatability rests on three things that a caller must keep: the same shapes for
    the same tokens (see `request.prefill`), the same number of threads, and the same torch on
    the same kind of CPU. Then every kernel adds the same numbers in the same order.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        generator = torch.Generator().manual_seed(config.seed)

        def weight(inputs: int, outputs: int, gain: float = 1.0) -> Tensor:
            return torch.randn(inputs, outputs, generator=generator).mul_(gain / inputs**0.5)

        dim, kv_dim = config.dim, config.kv_heads * config.head_dim
        self.embedding = weight(VOCABULARY, dim, gain=VOCABULARY**0.5)
        self.layers = [
            Layer(
                # An untrained head looks at all tokens alike and drowns each of them in the
                # mean. A gain makes it pick some, so that one wrong page shows in the logits.
                query=weight(dim, dim, gain=3.0),
                key=weight(dim, kv_dim),
                value=weight(dim, kv_dim),
                output=weight(dim, dim),
                gate=weight(dim, config.hidden),
                up=weight(dim, config.hidden),
                down=weight(config.hidden, dim),
            )
            for _ in range(config.layers)
        ]
        self.head = weight(dim, VOCABULARY)
        self.frequencies = 10000.0 ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)

    def forward(
        self, tokens: Sequence[int], start: int, cache: PagedKV, block_table: Tensor
    ) -> Tensor:
        """Append `tokens` at positions `start`, `start + 1`, ... and return logits `[256]`.

        Positions `[0, start)` must already be in the pages that `block_table` lists; the K and V
        of `tokens` are written there as well.
        """
        config = self.config
        count = len(tokens)
        x = self.embedding[torch.tensor(tokens)]
        turns = torch.arange(start, start + count)[:, None] * self.frequencies
        cos, sin = turns.cos()[:, None], turns.sin()[:, None]  # [tokens, 1, head_dim / 2]
        for number, layer in enumerate(self.layers):
            normed = rms_norm(x, (config.dim,))
            query = (normed @ layer.query).view(count, config.heads, config.head_dim)
            key = (normed @ layer.key).view(count, config.kv_heads, config.head_dim)
            value = (normed @ layer.value).view(count, config.kv_heads, config.head_dim)
            cache.write(number, start, block_table, rotate(key, cos, sin), value)
            # Read back what was just written, with all that came before it: the new tokens take
            # the same way through the pages as the old ones.
            keys, values = cache.gather(number, start + count, block_table)
            mixed = attention(rotate(query, cos, sin), keys, values, start)
            x = x + mixed @ layer.output
            normed = rms_norm(x, (config.dim,))
            x = x + (silu(normed @ layer.gate) * (normed @ layer.up)) @ layer.down
        return rms_norm(x[-1], (config.dim,)) @ self.head


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position: turn each pair of halves of `x` `[tokens, heads, head_dim]`."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def attention(query: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """Causal attention of queries at `start`, ... over all keys from position 0 on.

    `query` is `[tokens, heads, head_dim]`, `keys` and `values` are `[kv_heads, context,
    head_dim]`, contiguous; the result is `[tokens, heads * head_dim]`.
    """
    count, heads, head_dim = query.shape
    kv_heads, context, _ = keys.shape
    # The query heads that share a key head stand below each other: one product for all of them.
    grouped = query.view(count, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)
    scores = grouped.reshape(kv_heads, -1, head_dim) @ keys.transpose(1, 2)
    scores = scores.mul_(head_dim**-0.5).view(kv_heads, -1, count, context)
    later = torch.ones(count, context, dtype=torch.bool).triu(start + 1)
    weights = softmax(scores.masked_fill_(later, float("-inf")), dim=-1)
    mixed = weights.view(kv_heads, -1, context) @ values
    return mixed.view(heads, count, head_dim).transpose(0, 1).reshape(count, heads * head_dim)
