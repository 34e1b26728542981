"""Which weights a model has: a commit of the hub, or a fingerprint of its files.

A fingerprint takes small files whole and of large ones the size and samples all over: most
training changes weights everywhere, and what changes few of them may be missed (a user then names
the weights). Times are not part of it, so a copy of a model is the same model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

from light_mem.errors import InvalidArgumentError

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz", ".ckpt", ".tensors")
_SMALL = (".json", ".py")
# About text and sampling, not about the cache. Processors of images are not among them: a server's
# hash of an image is of what it was given, not of what a processor made of it.
_IGNORED = re.compile(
    r"tokenizer|vocab|merges|special_tokens|added_tokens|generation_config|chat_template|"
    r"trainer_state"
)
_BLOB = re.compile(r"[0-9a-f]{64}")  # the hub's cache names a large file by its SHA-256
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WHOLE = 1 << 20  # bytes; larger files are sampled
_SAMPLES = 256
_SAMPLE = 4096


def identify(
    model: str,
    *,
    given: str | None,
    revision: str | None,
    hub_cache: str | None,
    dummy: bool = False,
) -> dict[str, Any]:
    """What tells these weights from others, as plain data.

    model      the server's name of it: a directory, a file, or a name on the hub
    given      what the user says of the weights; taken as it is
    revision   of the hub; None: "main"
    hub_cache  directory of the hub's cache; None: not to be looked at
    dummy      the weights are made up by the server, and nobody reads files of them

    Raises InvalidArgumentError when nothing tells: two revisions of a model would share blocks.
    """
    if given is not None:
        return {"given": given}
    path = Path(model)
    if path.is_file() or (path.is_dir() and (dummy or _has_weights(path))):
        return {"files": fingerprint(path)}
    if hub_cache is not None:
        commit = _commit(Path(hub_cache) / f"models--{model.replace('/', '--')}", revision)
        if commit is not None:
            return {"commit": commit}
    raise InvalidArgumentError(
        f"nothing here tells which weights {model!r} has: it is no local path with weights, and "
        "its revision is not in the hub's cache. Set \"weights\" in LightMem's options to a text "
        "that is another one for other weights",
        model=model,
    )


def _commit(directory: Path, revision: str | None) -> str | None:
    revision = revision or "main"
    try:
        text = (directory / "refs" / revision).read_text().strip()
    except (OSError, ValueError):
        text = revision
    known = _COMMIT.fullmatch(text) and (directory / "snapshots" / text).is_dir()
    return text if known else None


def fingerprint(path: Path) -> str:
    """64 hex digits for a model's directory, or for one file of weights."""
    digest = blake2b(digest_size=32, person=b"lightmem.weights")
    root = path if path.is_dir() else path.parent
    for file in _files(path):
        digest.update(os.fsencode(file.relative_to(root)) + b"\0%d\0" % file.stat().st_size)
        target = file.resolve()
        if target.parent.name == "blobs" and _BLOB.fullmatch(target.name):
            digest.update(target.name.encode())
            continue
        with target.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size <= _WHOLE:
                digest.update(stream.read())
                continue
            for sample in range(_SAMPLES):
                stream.seek((size - _SAMPLE) * sample // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()


def _has_weights(directory: Path) -> bool:
    """Servers that stream weights from elsewhere have a directory with the configuration alone."""
    return any(file.name.endswith(_WEIGHTS) for file in _files(directory))


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    walked = set()
    for directory, below, names in os.walk(path, followlinks=True):
        real = os.path.realpath(directory)
        if real in walked:  # a link in a circle
            below.clear()
            continue
        walked.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            small = name.endswith(_SMALL) and not _IGNORED.search(name)
            if small or name.endswith(_WEIGHTS):
                file = Path(directory, name)
                if file.is_file():
                    yield file
