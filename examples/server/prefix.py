"""Names of pages: a chain of hashes, so that one name stands for a page and all before it.

K and V of a token depend on every token before it, so the name must as well: `h[i]` is BLAKE2b-128
of `h[i-1]` and the tokens of page `i`. Two prompts share the names of the pages up to the first
token in which they differ, and none after it.

The chain starts from the identity of the model. The store believes its names: if two models, two
revisions of the weights, two number formats or two page sizes could give the same name, a server
would be handed numbers that mean something else, and nothing would notice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

_DIGEST_BYTES = 16  # 32 hex digits, which LightMem takes as they are


def identity(parts: Mapping[str, object]) -> bytes:
    """One digest of everything but the tokens that the bytes of a page depend on.

    `parts` in any order. Each name and value goes in with its length: `{"a": "bc"}` and
    `{"ab": "c"}` are two identities.
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for name in sorted(parts):
        for text in (name, str(parts[name])):
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def page_hashes(identity: bytes, tokens: Sequence[int], tokens_per_page: int) -> list[str]:
    """One name for each *full* page of `tokens`; what is left over has no name.

    Servers that must keep their tenants apart (a hit is faster, and that can be measured) put the
    tenant into `identity`.
    """
    # Four bytes a token, little-endian everywhere: no two pages of tokens give the same bytes.
    data = np.asarray(tokens, dtype="<u4")
    previous, names = identity, []
    for end in range(tokens_per_page, len(tokens) + 1, tokens_per_page):
        page = data[end - tokens_per_page : end].tobytes()
        previous = hashlib.blake2b(previous + page, digest_size=_DIGEST_BYTES).digest()
        names.append(previous.hex())
    return names
