"""Logits as raw bytes with a digest, and the comparison bit for bit.

Raw little files instead of pickles: what comes from another process is read as numbers of a known
shape, checked against its digest, and never evaluated.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from light_mem.demo.model import VOCABULARY


def write_logits(path: Path, logits: Tensor) -> str:
    """Write `[steps, 256]` float32 and return the SHA-256 of the bytes."""
    data = logits.contiguous().numpy().tobytes()
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def read_logits(path: Path, sha256: str, steps: int) -> Tensor:
    data = bytearray(path.read_bytes())  # a bytearray: torch warns about memory it cannot write
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{path} is not the file that the first process wrote")
    return torch.frombuffer(data, dtype=torch.float32).view(steps, VOCABULARY)


def difference(left: Tensor, right: Tensor) -> str | None:
    """None if the logits agree in every bit, otherwise where they first do not.

    The bits are compared as integers: as numbers 0.0 equals -0.0 and NaN differs from itself.
    """
    if left.shape != right.shape:
        return f"shapes {tuple(left.shape)} and {tuple(right.shape)}"
    if torch.equal(left.view(torch.int32), right.view(torch.int32)):
        return None
    wrong = left.view(torch.int32) != right.view(torch.int32)
    row = int(wrong.any(dim=1).nonzero()[0])
    place = "after the prompt" if row == 0 else f"{row} tokens after the prompt"
    gap = float((left[row] - right[row]).abs().max())
    return f"{int(wrong[row].sum())} of {VOCABULARY} logits {place}, by up to {gap:.3g}"
