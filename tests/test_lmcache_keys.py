"""What a key of LMCache is hashed with, and which keys its ledger believes to be stored."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from typing import Any

import pytest
import torch

from light_mem import InvalidArgumentError
from light_mem.integrations.lmcache import keys as module
from light_mem.integrations.lmcache.keys import KeySpace, layout_text
from light_mem.integrations.lmcache.ledger import Entries, Ledger
from tests.lmcache_fakes import ObjectKey

FIELDS = [field.name for field in dataclasses.fields(ObjectKey)]
KEY = ObjectKey(bytes(range(32)), "org/model", 0x01000100, 2, "salt")
LAYOUT = layout_text([(2, 4, 256, 128)], ["torch.float16"])


def space(fields: list[str] | None = None, **description: Any) -> KeySpace:
    return KeySpace(description, fields or FIELDS)


def test_hashes_are_keyed_blake2b_for_good() -> None:
    # A change here makes every store of a user cold: then VERSION is to change too.
    text = (
        b'{"key_fields":["cache_salt","kv_rank","model_name","object_group_id"],"key_version":1,'
        b'"namespace":"n"}'
    )
    digest = hashlib.blake2b(text, digest_size=32, person=b"lightmem.lmcache").digest()
    keyed = hashlib.blake2b(digest_size=16, key=digest, person=b"lightmem.lmcache")
    for part in (b"ssalt", b"i16777472", b"sorg/model", b"i2", b"b" + LAYOUT):
        keyed.update(part[:1] + (len(part) - 1).to_bytes(8, "little") + part[1:])
    keyed.update(bytes(range(32)))
    made = space(namespace="n")
    assert made.hash(KEY, LAYOUT) == int.from_bytes(keyed.digest(), "big")
    assert made.text.encode() == text
    assert made.name == digest.hex()[:32]
    assert LAYOUT == b'[[[2,4,256,128],"torch.float16"]]'


def test_every_field_the_layout_and_the_description_count() -> None:
    changed = [
        dataclasses.replace(KEY, chunk_hash=b"x"),
        dataclasses.replace(KEY, chunk_hash=KEY.chunk_hash + b"\0"),
        dataclasses.replace(KEY, model_name="org/model2"),
        dataclasses.replace(KEY, kv_rank=1),
        dataclasses.replace(KEY, object_group_id=0),
        dataclasses.replace(KEY, cache_salt=""),
    ]
    layouts = [
        b"",
        layout_text([(2, 4, 128, 256)], ["torch.float16"]),
        layout_text([(2, 4, 256, 128)], ["torch.bfloat16"]),
        layout_text([(2, 4, 256), (128,)], ["torch.float16"] * 2),
    ]
    seen = [space().hash(key, LAYOUT) for key in (KEY, *changed)]
    seen += [space().hash(KEY, layout) for layout in layouts]
    seen += [space(namespace="x").hash(KEY, LAYOUT), space(lmcache="2").hash(KEY, LAYOUT)]
    assert len(set(seen)) == 1 + 6 + 4 + 2
    assert all(0 <= value < 1 << 128 for value in seen)


def test_values_that_run_together_are_told_apart() -> None:
    texts = ["", "a", "b", "ab", "1", "11", "\ud800"]
    keys = [
        ObjectKey(b, m, r, 0, s)
        for m, s, r, b in itertools.product(texts, texts, (1, 11), (b"", b"1", b"a"))
    ]
    hashes = space().hashes(keys, [LAYOUT] * len(keys))
    assert len(set(hashes)) == len(keys)


def test_a_field_that_a_later_lmcache_adds_counts_or_is_refused() -> None:
    @dataclasses.dataclass(frozen=True)
    class Later(ObjectKey):
        adapter: Any = ""

    fields = [field.name for field in dataclasses.fields(Later)]
    a, b = (Later(b"c", "m", 1, adapter=text) for text in "ab")
    made = space(fields)
    assert made.hash(a, LAYOUT) != made.hash(b, LAYOUT)
    with pytest.raises(InvalidArgumentError, match="cannot hash") as caught:
        made.hash(Later(b"c", "m", 1, adapter=1.5), LAYOUT)
    assert caught.value.values == {"value": 1.5}
    with pytest.raises(InvalidArgumentError, match="chunk_hash") as caught:
        space(["content"])
    assert caught.value.values == {"found": ["content"], "expected": "chunk_hash"}


def test_known_hashes_are_those_of_layouts_seen_with_any_key() -> None:
    made = space()
    assert made.known_hashes(KEY) == []
    other = dataclasses.replace(KEY, chunk_hash=b"other")
    first, second = made.hash(KEY, LAYOUT), made.hash(KEY, b"")
    assert set(made.known_hashes(KEY)) == {first, second}
    assert set(made.known_hashes(other)) == {made.hash(other, LAYOUT), made.hash(other, b"")}
    salted = dataclasses.replace(KEY, cache_salt="z")
    known = set(made.known_hashes(salted))
    assert known == {made.hash(salted, LAYOUT), made.hash(salted, b"")}


def test_users_without_number_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_STATES", 10)
    made = space()
    keys = [dataclasses.replace(KEY, cache_salt=str(n)) for n in range(100)]
    other = made.hash(KEY, b"other")
    assert made.hashes(keys, [LAYOUT] * 100) == made.hashes(keys, [LAYOUT] * 100)
    assert len(made._states) <= 10
    # None of them is forgotten: what is deleted is deleted.
    assert all(made.hash(key, LAYOUT) in made.known_hashes(key) for key in keys)
    assert other in made.known_hashes(KEY)


def test_of_layouts_without_number_those_in_use_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_LAYOUTS", 4)
    made = space()
    for n in range(20):
        made.hash(KEY, b"%d" % n)
        used = made.hash(KEY, LAYOUT)
    assert used in made.known_hashes(KEY)
    assert len(made.known_hashes(KEY)) <= 4


def test_layouts_of_torch_are_text() -> None:
    shapes, dtypes = [torch.Size([3, 4])], [torch.bfloat16]
    assert layout_text(shapes, dtypes) == b'[[[3,4],"torch.bfloat16"]]'


# --- the ledger -----------------------------------------------------------------------------------


def test_the_ledger_tells_new_keys_once_and_pushes_out_the_least_used() -> None:
    ledger = Ledger(10)
    none = Entries([], [])
    assert ledger.stored(["a", "b"], [4, 4]) == (Entries(["a", "b"], [4, 4]), none)
    assert ledger.stored(["a"], [4]) == (none, none)  # is used now
    ledger.used(["b", "unknown"])
    assert ledger.stored(["c"], [4]) == (Entries(["c"], [4]), Entries(["a"], [4]))
    assert ledger.gone(["b", "b", "z"]) == Entries(["b"], [4])
    assert ledger.stored(["d"], [6]) == (Entries(["d"], [6]), none)
    assert len(ledger) == 2


def test_an_object_larger_than_the_store_is_told_and_untold() -> None:
    ledger = Ledger(10)
    assert ledger.stored(["a"], [11]) == (Entries(["a"], [11]), Entries(["a"], [11]))
    assert len(ledger) == 0
