"""What the parts of `sglang_backend.py` share: ranks with pools, on stores in one directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checks import Checks
from sglang_process import Process, extra_config

TOKENS = 512  # of a device pool; its host pool has twice as many
PAGES = 48
NUMBERS = list(range(PAGES))
ELSEWHERE = [PAGES - 1 - n for n in NUMBERS]


class Ranks:
    """Starts ranks and opens backends in them."""

    def __init__(self, directory: Path, check: Checks) -> None:
        self.directory = directory
        self.check = check

    def arguments(
        self, kind: str, layout: str, store: str, options: dict[str, Any], **config: Any
    ) -> dict[str, Any]:
        return {
            "kind": kind,
            "layout": layout,
            "tokens": TOKENS,
            "extra_config": extra_config(self.directory / store, **options),
            "config": config,
        }

    def rank(self, **environment: str) -> Process:
        return Process("sglang_rank.py", self.directory / "ranks.log", **environment)

    def open(
        self,
        rank: Process,
        name: str,
        kind: str,
        layout: str,
        store: str,
        options: dict[str, Any] | None = None,
        **config: Any,
    ) -> None:
        error = rank.ask("open", name, self.arguments(kind, layout, store, options or {}, **config))
        if error is not None:
            raise SystemExit(f"the backend {name} does not start: {error}")
