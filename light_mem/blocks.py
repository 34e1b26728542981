"""Arguments of `create`, checked before anything is queued: block size, hashes, pages; and what is
asked of a service's own."""

from __future__ import annotations

import math
import operator
import os
import reprlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from light_mem.engine.table_layout import MAX_PATH_BYTES, READ, WRITE
from light_mem.errors import InvalidArgumentError, PageIndexError
from light_mem.index.keys import HashValue, is_bool, is_hash

if TYPE_CHECKING:
    import torch

BLOCK_SIZE_VARIABLE = "LIGHTMEM_MAX_BLOCK_SIZE_MB"
DEFAULT_BLOCK_SIZE_MB = 64
MAX_PAGES_PER_BLOCK = 64
SMALL_READ_VARIABLE = "LIGHTMEM_SMALL_READ_BYTES"
SMALL_WRITE_VARIABLE = "LIGHTMEM_SMALL_WRITE_BYTES"
# Takes 0.2 to 0.4 ms, half as long as workers do with all that it takes to queue it, to wake them
# and to be told; to queue it alone takes 0.1 to 0.2.
DEFAULT_SMALL_BYTES = 1 << 20
# Whether pages differ is told by marking them in a row of flags, unless that has more flags a page:
# then by sorting, which takes 36 ns a page of a long task, thirty times as long as a mark.
_FLAGS_A_PAGE = 64
_MODES = {"write": WRITE, "w": WRITE, "read": READ, "r": READ}


def pages_per_block(page_bytes: int) -> int:
    """Pages of a full block: up to 64, as many as LIGHTMEM_MAX_BLOCK_SIZE_MB holds, at least 1.

    Raises InvalidArgumentError for a value that is no whole number of MiB above 0.
    """
    megabytes = _from_environment(BLOCK_SIZE_VARIABLE, DEFAULT_BLOCK_SIZE_MB, 1, "MiB above 0")
    return max(1, min(MAX_PAGES_PER_BLOCK, (megabytes << 20) // page_bytes))


def small_read_bytes(value: int | None) -> int:
    """The bytes up to which `create` makes a read itself; None: what the environment says.

    Raises InvalidArgumentError for what is no whole number of bytes.
    """
    return _small_bytes("small_read_bytes", value, SMALL_READ_VARIABLE)


def small_write_bytes(value: int | None) -> int:
    """`small_read_bytes` for a write."""
    return _small_bytes("small_write_bytes", value, SMALL_WRITE_VARIABLE)


def _small_bytes(name: str, value: int | None, variable: str) -> int:
    if value is not None:
        return whole_number(name, value, 0, 2**63 - 1)
    return _from_environment(variable, DEFAULT_SMALL_BYTES, 0, "bytes")


def _from_environment(variable: str, default: int, least: int, unit: str) -> int:
    text = os.environ.get(variable, "").strip()
    if not text:
        return default
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise InvalidArgumentError(
            f"{variable} is a whole number of {unit}, not {reprlib.repr(text)}",
            variable=variable,
            value=text,
        )
    return number


def whole_number(name: str, value: object, least: int, most: int) -> int:
    """`value` as an int; raises InvalidArgumentError unless it is a whole number of that range."""
    try:
        number = least - 1 if is_bool(value) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = least - 1
    if not least <= number <= most:
        raise InvalidArgumentError(
            f"{name} is a whole number from {least} to {most}, not {reprlib.repr(value)}",
            **{name: value},
        )
    return number


def seconds(name: str, value: object) -> float:
    """`value` as a number of seconds; raises InvalidArgumentError unless it is finite and >= 0."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf:
        return float(value)
    raise InvalidArgumentError(
        f"{name} is a number of seconds, 0 or more, not {reprlib.repr(value)}", **{name: value}
    )


def yes_or_no(name: str, value: object) -> bool:
    """`value` when it is a bool; raises InvalidArgumentError: "no" would count as true."""
    if isinstance(value, bool):
        return value
    raise InvalidArgumentError(
        f"{name} is True or False, not {reprlib.repr(value)}", **{name: value}
    )


def store_path(value: object) -> Path:
    """The absolute path of a store; raises InvalidArgumentError for what is no path, or too long a
    one."""
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value) or "\0" in str(value):
        raise InvalidArgumentError(
            f"file is the path of a directory, not {reprlib.repr(value)}", file=value
        )
    if os.fspath(value).startswith("~"):  # as `open`, nothing here expands it
        raise InvalidArgumentError(
            f"file begins with '~', which stands for nothing here: {reprlib.repr(value)}; expand "
            "it with os.path.expanduser(), or name a directory of that name ./~",
            file=os.fspath(value),
        )
    path = Path(value).absolute()
    size = len(os.fsencode(path))
    if size > MAX_PATH_BYTES:
        raise InvalidArgumentError(
            f"the path of a store has at most {MAX_PATH_BYTES} bytes",
            file=os.fspath(value),
            size=size,
            limit=MAX_PATH_BYTES,
        )
    return path


def parse_mode(mode: str) -> int:
    """READ or WRITE; raises InvalidArgumentError."""
    if not isinstance(mode, str) or mode not in _MODES:
        raise InvalidArgumentError(
            f"mode is one of {', '.join(map(repr, _MODES))}, not {reprlib.repr(mode)}", mode=mode
        )
    return _MODES[mode]


def parse_hashes(hash_values: Sequence[HashValue]) -> list[HashValue]:
    """The hashes as a list; one hash alone is an error, not a sequence of characters."""
    if is_hash(hash_values):
        raise InvalidArgumentError(
            f"hash_values is a sequence of hashes, not one {type(hash_values).__name__}",
            hash_values=hash_values,
        )
    try:
        return list(hash_values)
    except TypeError:
        raise InvalidArgumentError(
            f"hash_values is a sequence of hashes, not {type(hash_values).__name__}",
            hash_values=hash_values,
        ) from None


def array_of(name: str, pages: Any) -> npt.NDArray[Any]:
    """Page indices as an array of any shape and type; raises InvalidArgumentError."""
    try:
        found = np.asarray(pages.detach().cpu().numpy() if hasattr(pages, "detach") else pages)
        if found.dtype.kind in "fO" and isinstance(pages, (list, tuple)):
            # numpy makes floats of its ints of several widths, and objects of what is longer.
            with suppress(TypeError):
                if not any(map(is_bool, pages)):
                    found = np.array([operator.index(page) for page in pages], np.int64)
        return found
    except (ValueError, OverflowError, TypeError) as error:
        raise InvalidArgumentError(
            f"{name} are not page numbers: {error}", reason=str(error), **{name: pages}
        ) from None


def parse_pages(
    page_indices: Sequence[int] | npt.NDArray[Any] | torch.Tensor, num_pages: int, mode: int
) -> npt.NDArray[np.uint32]:
    """Page indices as uint32 [P].

    Raises InvalidArgumentError for what is not a row of whole numbers, or a page that a read
    would fill twice; PageIndexError for a page outside the KV tensor.
    """
    pages = array_of("page_indices", page_indices)
    if pages.size == 0 and pages.ndim == 1:
        return np.empty(0, np.uint32)
    if pages.ndim != 1 or pages.dtype.kind not in "iu":
        is_odd = pages.dtype.kind == "O"  # no array to numpy: a set, a generator, a list with None
        found = reprlib.repr(page_indices) if is_odd else f"{pages.ndim}-dimensional {pages.dtype}"
        raise InvalidArgumentError(
            "page_indices is a one-dimensional list, array or tensor of whole numbers, not "
            f"{found}",
            dtype=str(pages.dtype),
            ndim=pages.ndim,
        )
    low, high = int(pages.min()), int(pages.max())
    if low < 0 or high >= num_pages:
        page = low if low < 0 else high
        raise PageIndexError(
            f"page {page} is outside the KV tensor of {num_pages} pages",
            page=page,
            num_pages=num_pages,
        )
    twice = _page_twice(pages, low, high) if mode == READ else None
    if twice is not None:
        raise InvalidArgumentError(f"page {twice} would be read into twice by one task", page=twice)
    return pages.astype(np.uint32)


def _page_twice(pages: npt.NDArray[Any], low: int, high: int) -> int | None:
    """The lowest page number that is there twice, None: all differ; they lie in `low` to `high`."""
    span = high - low + 1
    if span <= _FLAGS_A_PAGE * pages.size:
        seen = np.zeros(span, np.bool_)
        seen[pages - low] = True
        if np.count_nonzero(seen) == pages.size:
            return None
    ordered = np.sort(pages)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    return int(twice[0]) if twice.size else None


def pages_per_hash(hashes: int, pages: int, per_block: int) -> int:
    """How many pages a hash names: 1 when there are as many hashes as pages, else a run.

    Raises InvalidArgumentError that names both accepted numbers of hashes.
    """
    if hashes == pages:
        return 1
    runs = -(-pages // per_block)
    if hashes == runs:
        return per_block
    raise InvalidArgumentError(
        f"{hashes} hash_values do not fit {pages} page_indices: give {pages} (one a page) or "
        f"{runs} (one a run of {per_block} pages)",
        hashes=hashes,
        pages=pages,
        accepted=(pages, runs),
    )


def parse_lengths(pages: object, hashes: int) -> npt.NDArray[np.int64]:
    """Pages of each block as int64 [hashes]; raises InvalidArgumentError for anything else."""
    found = array_of("pages", pages)
    if found.shape != (hashes,) or (hashes and found.dtype.kind not in "iu"):
        raise InvalidArgumentError(
            f"pages are {hashes} whole numbers, one a hash, not {reprlib.repr(pages)}",
            value=pages,
            hashes=hashes,
        )
    return found.astype(np.int64)


def lengths(hashes: int, pages: int, per_hash: int) -> npt.NDArray[np.int64]:
    """Pages of each block, shape [hashes]; the last one may be shorter."""
    counts = np.full(hashes, per_hash, np.int64)
    if hashes:
        counts[-1] = pages - (hashes - 1) * per_hash
    return counts


def tensor_sizes(kvcache: torch.Tensor) -> tuple[int, int]:
    """(page_bytes, num_pages) of a KV tensor; raises InvalidArgumentError."""
    if not hasattr(kvcache, "shape"):
        raise InvalidArgumentError(
            f"the KV tensor must be a torch.Tensor, not {type(kvcache)}",
            kvcache=reprlib.repr(kvcache),
        )
    shape = tuple(kvcache.shape)
    if len(shape) != 2 or not all(shape):
        raise InvalidArgumentError(
            f"kvcache is a uint8 tensor [num_pages, page_bytes], not one of shape {shape}",
            shape=shape,
        )
    if shape[0] > 2**32 - 1:
        raise InvalidArgumentError(
            f"at most 2**32 - 1 pages, not {shape[0]}", shape=shape, limit=2**32 - 1
        )
    return int(shape[1]), int(shape[0])
