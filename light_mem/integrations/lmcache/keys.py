"""KeySpace: hashes of LMCache's keys, with all that decides which bytes a key names.

LMCache's ObjectKey holds the hash of the tokens up to the end of a chunk, the model's name, the
rank, the object group and the salt. It does not hold the shape and the type of the object, which
two engines may set apart for one model; nor the weights. So a key is hashed together with the
layout of its object, under a digest of what the whole server has in common.
"""

from __future__ import annotations

import json
import operator
import threading
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from light_mem.errors import InvalidArgumentError

VERSION = 1  # of what goes into a hash; another one shares nothing with this one
CONTENT = "chunk_hash"  # the field of a key that differs most
NO_LAYOUT = b""
_PERSON = b"lightmem.lmcache"
_MAX_STATES = 4096
_MAX_LAYOUTS = 1024  # one a shape of an object group, so some ten are usual


class KeySpace:
    """Hashes of keys, below 2**128. Any thread.

    fields  names of a key's fields, all of which are hashed; their values are bytes, str or int
    text    the description: JSON with sorted keys
    name    32 hex digits: servers share blocks when theirs are the same
    """

    def __init__(self, description: Mapping[str, Any], fields: Sequence[str]) -> None:
        """`description` is plain data, all of it part of every hash.

        Raises InvalidArgumentError for keys without a chunk hash.
        """
        if CONTENT not in fields:
            raise InvalidArgumentError(
                f"LMCache's keys have the fields {fields}, no {CONTENT}",
                found=list(fields),
                expected=CONTENT,
            )
        others = sorted(set(fields) - {CONTENT})
        whole = {"key_version": VERSION, "key_fields": others, **description}
        self.text = json.dumps(whole, sort_keys=True, separators=(",", ":"))
        digest = blake2b(self.text.encode(), digest_size=32, person=_PERSON).digest()
        self.name = digest.hex()[:32]
        self._keyed = blake2b(digest_size=16, key=digest, person=_PERSON)
        self._others = operator.attrgetter(*others) if others else lambda _: ()
        self._content = operator.attrgetter(CONTENT)
        self._states: dict[tuple[Any, bytes], Any] = {}
        self._layouts: dict[bytes, None] = {}  # seen, whatever the key, the oldest first
        self._guard = threading.Lock()

    def hash(self, key: Any, layout: bytes) -> int:
        """The hash of one key whose object has this layout (`layout_text`)."""
        return self._hash(self._others(key), self._content(key), layout)

    def hashes(self, keys: Iterable[Any], layouts: Iterable[bytes]) -> list[int]:
        """`hash` of each key with its layout."""
        return [self.hash(key, layout) for key, layout in zip(keys, layouts, strict=True)]

    def known_hashes(self, key: Any) -> list[int]:
        """The hashes of a key under each layout that any key was hashed with before: of those, at
        most, that it may be stored under."""
        others = self._others(key)
        with self._guard:
            layouts = list(self._layouts)
        return [self._hash(others, self._content(key), layout) for layout in layouts]

    def _hash(self, others: Any, content: bytes, layout: bytes) -> int:
        state = self._states.get((others, layout))
        if state is None:
            state = self._state(others, layout)
        state = state.copy()
        state.update(content)
        return int.from_bytes(state.digest(), "big")

    def _state(self, others: Any, layout: bytes) -> Any:
        """What all keys that differ in their content alone have in common. The content comes
        last and everything before it tells its length: no two keys hash the same bytes."""
        state = self._keyed.copy()
        for value in (*(others if isinstance(others, tuple) else (others,)), layout):
            state.update(_encode(value))
        with self._guard:
            if len(self._states) >= _MAX_STATES:  # salts may be as many as users
                self._states.clear()
            if layout not in self._layouts:
                if len(self._layouts) >= _MAX_LAYOUTS:
                    del self._layouts[next(iter(self._layouts))]
                    self._states.clear()  # so that a layout in use is seen again
                self._layouts[layout] = None
            self._states[others, layout] = state
        return state


def layout_text(shapes: Iterable[Iterable[int]], dtypes: Iterable[object]) -> bytes:
    """A layout as text: shapes and types of the tensors that an object consists of."""
    parts = [[list(map(int, shape)), str(t)] for shape, t in zip(shapes, dtypes, strict=True)]
    return json.dumps(parts, separators=(",", ":")).encode()


def _encode(value: object) -> bytes:
    if isinstance(value, bytes):
        kind, data = b"b", value
    elif isinstance(value, str):
        kind, data = b"s", value.encode("utf-8", "surrogatepass")
    elif isinstance(value, int):
        kind, data = b"i", str(int(value)).encode()
    else:
        raise InvalidArgumentError(
            f"LMCache's keys have a field that LightMem cannot hash: {value!r}", value=value
        )
    return kind + len(data).to_bytes(8, "little") + data
