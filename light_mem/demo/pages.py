"""The paged KV cache: a view of the page tensor as numbers, and the block table.

The library moves pages and knows nothing of their contents; the model sees numbers and knows
nothing of the library. This file is all that lies between: one row of the `uint8` tensor is
`[layers, 2 (K and V), tokens, kv_heads, head_dim]` in float32.

A block table lists the pages of one request in the order of its tokens. Token `i` is in page
`block_table[i // tokens_per_page]`, wherever in the tensor that page happens to lie.
"""

from __future__ import annotations

import torch
from torch import Tensor


class PagedKV:
    """K and V in the rows of `pages`, a `uint8` tensor `[num_pages, page_bytes]`.

    Shares memory with `pages`: what the library's workers copy into a row is what `gather` reads.
    """

    def __init__(
        self, pages: Tensor, *, layers: int, tokens_per_page: int, kv_heads: int, head_dim: int
    ) -> None:
        self.tokens_per_page = tokens_per_page
        shape = (pages.shape[0], layers, 2, tokens_per_page, kv_heads, head_dim)
        self._numbers = pages.view(torch.float32).view(shape)

    def write(
        self, layer: int, start: int, block_table: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        """Put `[tokens, kv_heads, head_dim]` keys and values at positions `start`, ..."""
        position = torch.arange(start, start + keys.shape[0])
        page = block_table[position // self.tokens_per_page]
        offset = position % self.tokens_per_page
        self._numbers[page, layer, 0, offset] = keys
        self._numbers[page, layer, 1, offset] = values

    def gather(self, layer: int, tokens: int, block_table: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of positions `[0, tokens)`, each `[kv_heads, tokens, head_dim]`.

        The results are contiguous copies, never views of the pages: where in the tensor a
        request's pages lie must not reach the kernels as another stride or alignment, because
        some of them then add in another order.
        """
        count = -(-tokens // self.tokens_per_page)
        rows = self._numbers[block_table[:count], layer]  # [count, 2, page, kv_heads, head_dim]
        joined = rows.permute(1, 3, 0, 2, 4).flatten(2, 3)[:, :, :tokens]
        return joined[0].contiguous(), joined[1].contiguous()
