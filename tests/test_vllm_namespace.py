"""What a key means: the hash of it, and which weights a model has."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from light_mem import InvalidArgumentError
from light_mem.integrations import weights
from light_mem.integrations.namespace import Namespace

KEY = bytes(range(36))


# --- the hash of a key ----------------------------------------------------------------------------


def test_a_hash_depends_on_every_bit_of_the_key_and_on_the_description() -> None:
    space = Namespace({"a": 1})
    seen = {space.hash(KEY), Namespace({"a": 2}).hash(KEY), Namespace({}).hash(KEY)}
    for bit in range(len(KEY) * 8):
        other = bytearray(KEY)
        other[bit // 8] ^= 1 << bit % 8
        seen.add(space.hash(bytes(other)))
    seen |= {space.hash(KEY[:20]), space.hash(KEY + b"\0")}
    assert len(seen) == 3 + len(KEY) * 8 + 2
    assert all(0 <= value < 1 << 128 for value in seen)


def test_hashes_are_keyed_blake2b_for_good() -> None:
    # A change here makes every store of a user cold: then VERSION is to change too.
    text = b'{"model":"m","namespace_version":1}'
    digest = hashlib.blake2b(text, digest_size=32, person=b"lightmem.vllm").digest()
    keyed = hashlib.blake2b(KEY, digest_size=16, key=digest, person=b"lightmem.vllm")
    space = Namespace({"model": "m"})
    assert space.hashes([KEY]) == [int.from_bytes(keyed.digest(), "big")]
    assert space.name == digest.hex()[:32]


def test_the_order_of_the_description_does_not_matter() -> None:
    assert Namespace({"a": 1, "b": 2}).name == Namespace({"b": 2, "a": 1}).name


# --- weights --------------------------------------------------------------------------------------

LARGE = (1 << 20) + 12345


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"hidden_size": 8}')
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(bytes(LARGE))
    return directory


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: write(m / "config.json", b'{"hidden_size": 9}'),
        lambda m: write(m / "model.safetensors", bytes(LARGE - 1)),
        lambda m: write(m / "model.safetensors", bytes([1]) * LARGE),
        lambda m: write(m / "model.safetensors", bytes(LARGE - 1) + b"1"),
        lambda m: write(m / "model.safetensors", b"1" + bytes(LARGE - 1)),
        lambda m: write(m / "more.safetensors", b""),
        lambda m: write(m / "modeling.py", b"x = 1"),
        lambda m: write(m / "preprocessor_config.json", b'{"image_mean": [0.5]}'),
        lambda m: (m / "model.safetensors").rename(m / "other.safetensors"),
    ],
)
def test_other_files_are_other_weights(model: Path, change: Callable[[Path], object]) -> None:
    before = weights.fingerprint(model)
    change(model)
    assert weights.fingerprint(model) != before


def test_a_copy_and_another_tokenizer_are_the_same_weights(model: Path, tmp_path: Path) -> None:
    before = weights.fingerprint(model)
    (model / "tokenizer.json").write_text("{1}")
    (model / "README.md").write_text("more")
    moved = tmp_path / "moved"
    model.rename(moved)
    assert weights.fingerprint(moved) == before


def test_weights_behind_a_link_and_files_of_any_name_are_part_of_a_fingerprint(
    tmp_path: Path,
) -> None:
    model, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    for directory in (model, elsewhere):
        directory.mkdir()
    (model / "config.json").write_text("{}")
    (model / os.fsdecode(b"caf\xe9.json")).write_text("{}")
    (model / "weights").symlink_to(elsewhere)
    (model / "circle").symlink_to(model)
    (elsewhere / "circle").symlink_to(elsewhere)
    (elsewhere / "a.safetensors").write_bytes(b"one")
    before = weights.fingerprint(model)
    assert weights.identify(str(model), given=None, revision=None, hub_cache=None)
    (elsewhere / "a.safetensors").write_bytes(b"two")
    assert weights.fingerprint(model) != before


def test_a_file_in_the_hubs_cache_is_known_by_its_name(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "x"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    prints = []
    for digit in "ab":
        (blobs / (digit * 64)).write_bytes(bytes(LARGE))
        link = snapshot / "model.safetensors"
        link.unlink(missing_ok=True)
        link.symlink_to(blobs / (digit * 64))
        prints.append(weights.fingerprint(snapshot))
    assert prints[0] != prints[1]


def test_a_name_on_the_hub_stands_for_its_commit(tmp_path: Path) -> None:
    directory = tmp_path / "models--org--name"
    one, two = "1" * 40, "2" * 40
    (directory / "refs").mkdir(parents=True)
    (directory / "refs" / "main").write_text(one)
    for commit in (one, two):
        (directory / "snapshots" / commit).mkdir(parents=True)

    def identify(revision: str | None) -> dict[str, Any]:
        return weights.identify("org/name", given=None, revision=revision, hub_cache=str(tmp_path))

    assert identify(None) == identify("main") == identify(one) == {"commit": one}
    assert identify(two) == {"commit": two}
    with pytest.raises(InvalidArgumentError, match="org/name"):
        identify("v2")


def test_weights_that_nothing_tells_are_an_error_unless_the_user_does() -> None:
    with pytest.raises(InvalidArgumentError, match='"weights"'):
        weights.identify("org/name", given=None, revision=None, hub_cache=None)
    assert weights.identify("org/name", given="v3", revision=None, hub_cache=None) == {
        "given": "v3"
    }


def test_a_directory_without_weights_tells_nothing_of_them_unless_they_are_made_up(
    model: Path,
) -> None:
    """As servers have it that stream weights from an object store."""
    (model / "model.safetensors").unlink()
    with pytest.raises(InvalidArgumentError, match="no local path with weights"):
        weights.identify(str(model), given=None, revision=None, hub_cache=None)
    found = weights.identify(str(model), given=None, revision=None, hub_cache=None, dummy=True)
    assert found == {"files": weights.fingerprint(model)}
