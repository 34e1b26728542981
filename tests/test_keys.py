"""Hash values as keys: what stands for itself, what is digested, and how keys spread."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import pytest
import torch

from light_mem.errors import InvalidArgumentError
from light_mem.index import keys as keymath
from light_mem.index.keys import HashValue, as_key, as_keys


def number(value: HashValue) -> int:
    low, high = as_key(value)
    return high << 64 | low


SAMPLES: list[HashValue] = [
    0,
    1,
    2**64 - 1,
    2**64,
    2**128 - 1,
    "",
    "hash_key",
    "ÿ€𝄞",
    "a" * 100_000,
    "0" * 32,
    "f" * 32,
    "F" * 32,
    "0123456789abcdef" * 2,
    "0123456789abcdef" * 2 + "0",
    "0123456789abcdeg" * 2,
    "\ud800",
    b"",
    b"hash_key",
    b"\x00" * 16,
    b"0" * 32,
]


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 1, 2**63, 2**64 - 1, 2**64, 2**127, 2**128 - 1])
def test_an_int_below_2_to_128_stands_for_itself(value: int) -> None:
    assert number(value) == value
    assert number(f"{value:032x}") == value


def test_a_numpy_int_is_the_same_hash_as_a_python_int() -> None:
    assert as_key(np.uint64(2**64 - 1)) == as_key(2**64 - 1)
    assert as_keys([np.int32(7), np.uint64(8)]).tolist() == [[7, 0], [8, 0]]


def test_a_key_is_printed_as_the_hex_string_that_it_stands_for() -> None:
    value = 0x00112233_44556677_8899AABB_CCDDEEFF
    assert keymath.key_text(*as_key(value)) == f"{value:032x}"
    assert number(keymath.key_text(*as_key("any string"))) == number("any string")


@pytest.mark.parametrize("value", ["a", "A" * 32, "g" * 32, "a" * 31, "a" * 33, "\uff10" * 32])
def test_every_other_string_goes_through_a_cryptographic_digest(value: str) -> None:
    digest = blake2b(value.encode(), digest_size=16, person=b"lightmem.str").digest()
    assert number(value) == int.from_bytes(digest, "big")


def test_bytes_are_digested_apart_from_strings() -> None:
    digest = blake2b(b"a", digest_size=16, person=b"lightmem.bytes").digest()
    assert number(b"a") == number(bytearray(b"a")) == int.from_bytes(digest, "big")
    assert number(b"a") != number("a")
    assert number(b"0" * 32) != number("0" * 32)


def test_different_hashes_have_different_keys() -> None:
    numbers = [number(v) for v in SAMPLES]
    # Only the all-zero and the all-one hex string are ints of the list as well.
    same = {(i, j) for i, a in enumerate(numbers) for j, b in enumerate(numbers[:i]) if a == b}
    assert same == {(9, 0), (10, 4)}


# --- many at a time -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        SAMPLES,
        [v for v in SAMPLES if isinstance(v, int)],
        [v for v in SAMPLES if isinstance(v, str) and len(v) == 32],
        [0, 1, 2**63, 2**64 - 1],
        [1, 2**64],
        [f"{v:032x}" for v in (0, 1, 2**128 - 1, 0xABC)],
        [v for v in SAMPLES if isinstance(v, bytes)],
    ],
    ids=["mixed", "ints", "32 characters", "words", "a word and more", "hex", "bytes"],
)
def test_many_keys_are_the_keys_of_each(values: list[HashValue]) -> None:
    keys = as_keys(values)
    assert keys.shape == (len(values), 2)
    assert keys.dtype == np.uint64
    assert keys.flags["C_CONTIGUOUS"]
    assert [tuple(k) for k in keys.tolist()] == [as_key(v) for v in values]
    assert np.array_equal(as_keys(tuple(values)), keys)
    assert np.array_equal(as_keys(iter(values)), keys)


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True)], ids=repr)
def test_a_bool_of_any_library_is_one(value: object) -> None:
    assert keymath.is_bool(value)


@pytest.mark.parametrize("value", [1, np.int64(1), torch.tensor(1), "True", 1.0, None], ids=repr)
def test_what_is_no_bool_is_none(value: object) -> None:
    assert not keymath.is_bool(value)


def test_no_hashes_are_no_keys() -> None:
    assert as_keys([]).shape == (0, 2)
    assert keymath.mix(as_keys([])).shape == (0,)


@pytest.mark.parametrize("wrong", [-1, 2**128, None, 1.0, True, ["a"], ("a",), object()])
def test_what_is_no_hash_is_refused_alone_and_among_others(wrong: object) -> None:
    for call in (
        lambda: as_key(wrong),  # type: ignore[arg-type]
        lambda: as_keys([wrong]),  # type: ignore[list-item]
        lambda: as_keys(["a", wrong]),  # type: ignore[list-item]
        lambda: as_keys([1, wrong]),  # type: ignore[list-item]
        lambda: as_keys([2**64, wrong]),  # type: ignore[list-item]
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            call()
        assert isinstance(caught.value, ValueError)


def test_the_checksum_opens_with_the_key_as_it_lies_on_disk() -> None:
    keys = as_keys([0x00112233_44556677_8899AABB_CCDDEEFF])
    assert keymath.key_bytes(*keys[0].tolist()) == keys.astype("<u8").tobytes()


# --- places ---------------------------------------------------------------------------------------


def test_scalar_and_vectorised_places_agree() -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 2**64, (2000, 2), np.uint64)
    keys[:3] = [[0, 0], [2**64 - 1, 0], [2**64 - 1, 2**64 - 1]]
    mixed = keymath.mix(keys)
    for shards in (1, 2, 3, 7, 1000):
        places = keymath.shards_of(mixed, shards).tolist()
        for (low, high), m, place in zip(keys.tolist(), mixed.tolist(), places, strict=True):
            assert keymath.mix_one(low, high) == m
            if shards == 1:
                assert keymath.mix(np.array([[low, high]], np.uint64)).tolist() == [m]
            assert keymath.shard_of(m, shards) == place
        batch = keymath.MixedKeys.of(keys.tolist())
        assert batch.mixed == mixed.tolist()
        told = (mixed.tolist()[0], *range(1, len(mixed)))  # what is told is not worked out again
        assert keymath.MixedKeys.of(keys.tolist(), told).mixed == list(told)
        wanted: dict[int, list[int]] = {}
        for at, place in enumerate(places):
            wanted.setdefault(place, []).append(at)
        assert batch.by_shard(shards) == wanted


@pytest.mark.parametrize("mixed", [(), (0, 0), (0, 0, 0)], ids=["none", "too few", "others'"])
def test_mixed_keys_of_others_are_refused(mixed: tuple[int, ...]) -> None:
    pairs = [(1, 2), (3, 4), (5, 6)]
    with pytest.raises(ValueError, match="3 keys"):
        keymath.MixedKeys.of(pairs, mixed)
    assert keymath.MixedKeys.of([], ()) == keymath.MixedKeys([], [])


def test_mixing_leaves_the_keys_alone() -> None:
    keys = as_keys([1, 2, 2**100])
    before = keys.copy()
    keymath.mix(keys)
    assert np.array_equal(keys, before)


KINDS = {
    "small ints": lambda n: list(range(n)),
    "multiples of 2**64": lambda n: [i << 64 for i in range(n)],
    "multiples of 4096": lambda n: [i * 4096 for i in range(n)],
    "strings": lambda n: [f"block-{i}" for i in range(n)],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [3, 16])
def test_keys_spread_over_shards_and_over_the_buckets_of_each(kind: str, shards: int) -> None:
    n, buckets = 32768, 1024
    mixed = keymath.mix(as_keys(KINDS[kind](n)))
    places = keymath.shards_of(mixed, shards)
    counts = np.bincount(places, minlength=shards)
    # Six standard deviations of a fair spread.
    assert np.abs(counts - n / shards).max() < 6 * np.sqrt(n / shards)
    in_first = mixed[places == 0] & np.uint64(buckets - 1)
    per_bucket = np.bincount(in_first.astype(np.int64), minlength=buckets)
    load = counts[0] / buckets
    assert per_bucket.max() < load + 7 * np.sqrt(load) + 2
    assert np.count_nonzero(per_bucket) > 0.9 * buckets * (1 - np.exp(-load))
