"""Configurations of servers as plain data, for a namespace.

Values whose text would name an address are represented by their type, so that a description is the
same after a restart.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Set
from enum import Enum
from typing import Any, TypeAlias

Ignored: TypeAlias = "Mapping[str, frozenset[str]]"
_NOTHING: Ignored = {}
_MAX_DEPTH = 24  # deeper is a cycle


def plain(value: Any, ignored: Ignored = _NOTHING, depth: int = 0) -> Any:
    """`value` as JSON data that is the same in every process that has an equal one.

    ignored   fields of dataclasses that are left out, by the name of the class
    """
    if value is None or (isinstance(value, (bool, int, str)) and not isinstance(value, Enum)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if depth > _MAX_DEPTH:
        return "..."
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, (bytes, bytearray)):
        return bytes(value).hex()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {
            str(plain(k, ignored, depth + 1)): plain(v, ignored, depth + 1)
            for k, v in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [plain(item, ignored, depth + 1) for item in value]
    if isinstance(value, Set):
        return sorted((plain(item, ignored, depth + 1) for item in value), key=repr)
    return _plain_object(value, ignored, depth)


def _plain_object(value: Any, ignored: Ignored, depth: int) -> Any:
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    kind = type(value)
    if dataclasses.is_dataclass(value):
        left_out = ignored.get(kind.__name__, frozenset())
        return {
            field.name: plain(getattr(value, field.name), ignored, depth + 1)
            for field in dataclasses.fields(value)
            if field.name not in left_out and hasattr(value, field.name)
        }
    if callable(getattr(value, "to_dict", None)):  # a configuration of transformers
        return plain(value.to_dict(), ignored, depth + 1)
    if kind.__module__ == "torch":  # torch.dtype, torch.device
        return str(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return f"{kind.__module__}.{kind.__qualname__}"
