"""A safetensors file a block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmark.rivals.base import NotInstalledError, Pages, Rival, gather, page_aligned


class Safetensors(Rival):
    """`save_file` of one gathered tensor, `load_file` (mapped) and a scatter."""

    name = "safetensors"
    package = "safetensors"
    how = "a process a worker; a new file a block"
    lacks = "no checksum, no eviction; a file under its final name may be half written"

    def open(self) -> None:
        try:
            from safetensors.torch import load_file, save_file
        except ImportError as err:
            raise NotInstalledError(str(err)) from err
        import torch

        shape = self.setup.plan.shape
        self._load, self._save = load_file, save_file
        self._buffer = page_aligned(shape.block_bytes).reshape(shape.pages, shape.page_bytes)
        self._tensor = torch.from_numpy(self._buffer)

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"

    def write(self, hashes: list[Any], pages: Pages) -> None:
        for name, rows in zip(hashes, pages, strict=True):
            gather(self.memory, rows, self._buffer)
            self._save({"kv": self._tensor}, self._path(name))

    def read(self, hashes: list[Any], pages: Pages) -> None:
        for name, rows in zip(hashes, pages, strict=True):
            self.memory[rows] = self._load(self._path(name))["kv"].numpy()

    def delete(self, hashes: list[Any]) -> None:
        for name in hashes:
            self._path(name).unlink()

    def close(self) -> None:
        pass
