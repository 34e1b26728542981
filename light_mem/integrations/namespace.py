"""Namespace: what a key of a server means besides the tokens it stands for.

A server's key is a hash of the tokens up to the end of a chunk or page (with an adapter's name, a
salt and the like). It does not hold the model, its weights, the type of the cache or the layout of
a row: the same key names other bytes under any other of those. So a key is hashed together with a
digest of all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any

VERSION = 1  # of what a namespace is made of; another one shares nothing with this one
_PERSON = b"lightmem.vllm"  # of whichever server: another one would make stores cold


class Namespace:
    """Hashes of a server's keys, for LightMem, under one description. Immutable; any thread.

    text   the description: JSON with sorted keys
    name   32 hex digits: two namespaces share blocks when they have the same name
    """

    def __init__(self, description: Mapping[str, Any]) -> None:
        """`description` is plain data, all of it part of the namespace."""
        whole = {"namespace_version": VERSION, **description}
        self.text = json.dumps(whole, sort_keys=True, separators=(",", ":"))
        digest = blake2b(self.text.encode(), digest_size=32, person=_PERSON).digest()
        self.name = digest.hex()[:32]
        self._keyed = blake2b(digest_size=16, key=digest, person=_PERSON)

    def hash(self, key: bytes) -> int:
        """The hash, below 2**128, of one key of the server."""
        keyed = self._keyed.copy()
        keyed.update(key)
        return int.from_bytes(keyed.digest(), "big")

    def hashes(self, keys: Iterable[bytes]) -> list[int]:
        """`hash` of each key."""
        return [self.hash(key) for key in keys]
