"""Hash values as 128-bit keys, and where a key belongs.

A key is a pair of unsigned 64-bit numbers (low, high). Ints below 2**128 and 32-digit lower-case
hex strings stand for themselves; every other `str` and all `bytes` go through BLAKE2b with 128
bits of output, with another personalisation for each type, so that "a" and b"a" differ.
Upper-case hex is an ordinary string: `"AB…"` and `"ab…"` are two different hashes.
"""

from __future__ import annotations

import operator
import reprlib
import struct
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from light_mem.errors import InvalidArgumentError
from light_mem.index.format import WORD_MASK

HashValue: TypeAlias = "str | bytes | int"
Key = tuple[int, int]  # low, high
KeyArray: TypeAlias = "npt.NDArray[np.uint64]"
U64Array: TypeAlias = "npt.NDArray[np.uint64]"

_PAIR = struct.Struct("<QQ")
KEY_BYTES = _PAIR.size  # of `key_bytes`
# Odd multipliers of the splitmix64 / MurmurHash3 finalisers (public domain): full avalanche, so
# that small ints, which users do pass as hashes, spread over shards and buckets.
_M1 = 0x9E3779B97F4A7C15
_M2 = 0xBF58476D1CE4E5B9
_M3 = 0x94D049BB133111EB


def _digest(value: str | bytes) -> bytes:
    if isinstance(value, str):
        data, person = value.encode("utf-8", "surrogatepass"), b"lightmem.str"
    else:
        data, person = value, b"lightmem.bytes"
    return blake2b(data, digest_size=16, person=person).digest()


def _from_hex(text: str) -> bytes | None:
    """The bytes of lower-case hex digits, None for any other text."""
    try:
        raw = bytes.fromhex(text)
    except ValueError:
        return None
    return raw if raw.hex() == text else None  # `fromhex` takes upper case and white space


def _one(value: object) -> bytes:
    """16 bytes, big-endian, of one hash value."""
    if isinstance(value, str):
        raw = _from_hex(value) if len(value) == 32 else None
        return _digest(value) if raw is None else raw
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _digest(bytes(value))
    if is_bool(value):
        raise InvalidArgumentError(
            f"a hash is a str, bytes or int, not a bool: {value!r}", value=value
        )
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InvalidArgumentError(
            f"a hash is a str, bytes or int, not {type(value).__name__}: {reprlib.repr(value)}",
            value=value,
        ) from None
    if not 0 <= number < 1 << 128:
        raise InvalidArgumentError(
            f"an int hash lies in 0 <= hash < 2**128: {reprlib.repr(number)}", value=number
        )
    return number.to_bytes(16, "big")


def is_bool(value: object) -> bool:
    """Whether `value` is a bool, which is no number: numpy 1 and torch have an index for theirs."""
    if type(value) is int:
        return False
    return isinstance(value, (bool, np.bool_)) or str(getattr(value, "dtype", "")) == "torch.bool"


def is_hash(value: object) -> bool:
    """Whether `value` is one hash rather than a sequence of them."""
    if type(value) is int:  # the check below takes a microsecond
        return True
    return isinstance(value, (str, bytes, bytearray, memoryview, int, np.integer))


def as_keys(hashes: Iterable[HashValue]) -> KeyArray:
    """Keys of many hashes: shape [n, 2], columns (low, high), dtype uint64.

    Raises InvalidArgumentError (a ValueError) for a value that is not a hash. Pure; any thread.
    """
    values: Sequence[HashValue] = hashes if isinstance(hashes, list) else list(hashes)
    if not values:
        return np.empty((0, 2), np.uint64)
    kinds = set(map(type, values))
    raw: bytes | None = None
    if kinds == {str} and list(map(len, values)).count(32) == len(values):  # type: ignore[arg-type]
        raw = _from_hex("".join(values))  # type: ignore[arg-type]
    elif kinds == {int}:
        keys = _of_words(values)  # type: ignore[arg-type]
        if keys is not None:
            return keys
        try:
            raw = b"".join([v.to_bytes(16, "big") for v in values])  # type: ignore[union-attr]
        except OverflowError:
            pass  # the slow path below names the offender
    if raw is None:
        raw = b"".join([_one(v) for v in values])
    big_endian = np.frombuffer(raw, ">u8").reshape(-1, 2)
    return np.ascontiguousarray(big_endian[:, ::-1], dtype=np.uint64)


def _of_words(values: Sequence[int]) -> KeyArray | None:
    """`as_keys` of ints below 2**64, in a third of the time; None: one of them is not."""
    try:
        low = struct.pack(f"={len(values)}Q", *values)
    except struct.error:
        return None
    keys = np.zeros((len(values), 2), np.uint64)
    keys[:, 0] = np.frombuffer(low, np.uint64)
    return keys


class MixedKeys(NamedTuple):
    """Keys of a batch with their `mix`: shard and bucket of each are asked for several times."""

    pairs: list[Key]
    mixed: list[int]

    @classmethod
    def of(cls, keys: Iterable[Key], mixed: Sequence[int] | None = None) -> MixedKeys:
        """From (low, high) pairs; `mixed`: their `mix_one`, where it is known. Raises ValueError
        when its length or its first number does not fit the keys: a block would be stored where
        nobody finds it."""
        pairs = list(keys)
        if mixed is None:
            return cls(pairs, [mix_one(low, high) for low, high in pairs])
        if len(mixed) != len(pairs) or (pairs and mixed[0] != mix_one(*pairs[0])):
            raise ValueError(f"{len(mixed)} mixed keys are not those of {len(pairs)} keys")
        return cls(pairs, list(mixed))

    def by_shard(self, num_shards: int) -> dict[int, list[int]]:
        """The positions of the keys of each shard, in order; see `shard_of`."""
        found: dict[int, list[int]] = {}
        for at, mixed in enumerate(self.mixed):
            found.setdefault(shard_of(mixed, num_shards), []).append(at)
        return found

    def at(self, positions: Sequence[int]) -> MixedKeys:
        """The keys at these positions."""
        return MixedKeys([self.pairs[at] for at in positions], [self.mixed[at] for at in positions])


def as_key(value: HashValue) -> Key:
    """(low, high) of one hash; raises InvalidArgumentError."""
    if type(value) is int and 0 <= value < 1 << 128:
        return value & WORD_MASK, value >> 64
    raw = _one(value)
    return int.from_bytes(raw[8:], "big"), int.from_bytes(raw[:8], "big")


def key_bytes(low: int, high: int) -> bytes:
    """The 16 bytes that open a block's checksum, little-endian."""
    return _PAIR.pack(low, high)


def key_text(low: int, high: int) -> str:
    """32 hex digits, for messages and tools."""
    return f"{high:016x}{low:016x}"


def mix(keys: KeyArray) -> U64Array:
    """A well-mixed 64-bit number a key, shape [n]. `mix_one` gives the same for one key."""
    if len(keys) == 1:  # a tenth of what the numpy calls take
        low, high = keys[0].tolist()
        return np.array([mix_one(low, high)], np.uint64)
    x = keys[:, 0] ^ (keys[:, 1] * np.uint64(_M1))
    x ^= x >> np.uint64(30)
    x *= np.uint64(_M2)
    x ^= x >> np.uint64(27)
    x *= np.uint64(_M3)
    x ^= x >> np.uint64(31)
    return np.asarray(x)


def mix_one(low: int, high: int) -> int:
    """`mix` for one key, in Python ints."""
    x = low ^ (high * _M1 & WORD_MASK)
    x ^= x >> 30
    x = x * _M2 & WORD_MASK
    x ^= x >> 27
    x = x * _M3 & WORD_MASK
    return x ^ x >> 31


# The upper half picks the shard and the lower half the bucket, so that the keys of one shard
# still use all of its buckets.
def shards_of(mixed: U64Array, num_shards: int) -> npt.NDArray[np.int64]:
    """The shard of each mixed key; for good, so `num_shards` never changes in a store."""
    return np.asarray((mixed >> np.uint64(32)) % np.uint64(num_shards), np.int64)


def shard_of(mixed: int, num_shards: int) -> int:
    """`shards_of` for one mixed key."""
    return (mixed >> 32) % num_shards
