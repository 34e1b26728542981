"""What the integrations do alike: read their options, and start their service."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from light_mem.errors import InvalidArgumentError
from light_mem.local_service import LocalCacheService

Options = TypeVar("Options")


def read_options(
    kind: type[Options], given: Mapping[str, Any], *, who: str, texts: Sequence[str]
) -> Options:
    """The options as `kind`, a dataclass; `file` and `storage_size` must be among them.

    who     names the integration in messages
    texts   options that are texts; `weights` may also be None, but not empty

    Raises InvalidArgumentError for one that is missing, unknown or no text.
    """
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    unknown = sorted(set(given) - set(names))
    missing = sorted({"file", "storage_size"} - set(given))
    if unknown or missing:
        raise InvalidArgumentError(
            f"{who}: unknown options {unknown}, missing options {missing}; it has "
            f"{', '.join(names)}",
            unknown=unknown,
            missing=missing,
        )
    found = kind(**given)
    for name in texts:
        value = getattr(found, name)
        if not isinstance(value, str) and not (name == "weights" and value is None):
            raise InvalidArgumentError(f"{name} is a text, not {value!r}", **{name: value})
    if getattr(found, "weights", None) == "":
        raise InvalidArgumentError("weights is a text that tells something, or left out")
    return found


def started(service: LocalCacheService) -> LocalCacheService:
    """The service with its workers running; closed when they do not start."""
    try:
        service.run()
    except BaseException:
        service.close()
        raise
    return service
