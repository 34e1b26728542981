"""Sizes as people read them, of commands and of checks of the machine."""

from __future__ import annotations


def bytes_text(count: float) -> str:
    """A size in powers of 1024."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{count:,.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
