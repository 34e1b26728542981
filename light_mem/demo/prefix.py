"""Names of pages: a chain of hashes, so that one name stands for a page and all before it.

K and V of a token depend on every token before it. So does the name: `h[i]` is blake2b, 128 bits,
of `h[i-1]` and the tokens of page `i`. The chain starts from the identity of the model: a store
that serves two models, or two sizes of page, never gives the pages of one to the other.
"""

from __future__ import annotations

import hashlib
import platform
import struct
from collections.abc import Sequence
from dataclasses import asdict

import torch

from light_mem.demo.model import ModelConfig

HASH_BYTES = 16  # 32 hex digits, which the library takes as they are


def identity(config: ModelConfig) -> str:
    """Everything that the bytes of a page depend on, apart from the tokens.

    The last line is there for this demo's claim of equal bits: another torch, CPU or number of
    threads adds in another order. A server that is content with equal answers leaves it out.
    """
    sizes = ",".join(f"{name}={value}" for name, value in sorted(asdict(config).items()))
    arithmetic = (
        f"torch={torch.__version__},threads={torch.get_num_threads()},"
        f"cpu={platform.machine()}/{torch.backends.cpu.get_cpu_capability()}"
    )
    return f"light-mem demo model 1\n{sizes},dtype=float32\n{arithmetic}"


def page_hashes(identity: str, tokens: Sequence[int], tokens_per_page: int) -> list[str]:
    """One name for each *full* page of `tokens`; what is left over has no name."""
    previous = hashlib.blake2b(identity.encode(), digest_size=HASH_BYTES).digest()
    names = []
    for end in range(tokens_per_page, len(tokens) + 1, tokens_per_page):
        # Four bytes a token, little-endian on every machine: parts of a fixed length, so that no
        # two different pages give the same bytes.
        page = struct.pack(f"<{tokens_per_page}I", *tokens[end - tokens_per_page : end])
        previous = hashlib.blake2b(previous + page, digest_size=HASH_BYTES).digest()
        names.append(previous.hex())
    return names
