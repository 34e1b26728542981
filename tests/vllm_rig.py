"""Lives of an engine on one store, against fakes of vLLM's types."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import vllm_fakes as fakes
from tests.conftest import wait_until
from tests.payload import page_bytes_of

ROWS, ROW_BYTES = 32, 8192
R = fakes.ReqContext("r")


def key(n: int, group: int = 0) -> bytes:
    """A key as vLLM makes it: 32 bytes of hash, 4 of the group."""
    return n.to_bytes(32, "big") + group.to_bytes(4, "big")


def spec_of(extra: dict[str, Any] | None = None, **changes: Any) -> Any:
    return fakes.TieringOffloadingSpec(
        fakes.OffloadingConfig({} if extra is None else extra, **changes)
    )


class Life:
    """One life of an engine: a primary tier and the tier on it."""

    def __init__(self, module: Any, store: Path, spec: Any = None, **options: Any) -> None:
        self.primary = fakes.Primary(ROWS, ROW_BYTES)
        settings = {"weights": "w", "storage_size": 64 * ROW_BYTES, "num_of_shard": 1}
        settings |= {"num_workers": 1, "file": str(store), **options}
        try:
            self.tier = module.LightMemTier(spec or spec_of(), self.primary.view, "lm", **settings)
        except BaseException:
            gc.collect()
            self.primary.close()
            raise

    def wait(self, *numbers: int) -> dict[int, Any]:
        """The results of these jobs, once they are over; each is told once."""
        found: dict[int, Any] = {}

        def poll() -> bool:
            for result in self.tier.get_finished_jobs():
                assert result.job_id not in found
                found[result.job_id] = result
            return set(found) >= set(numbers)

        wait_until(poll, what=f"jobs {numbers}")
        assert set(found) == set(numbers)
        return found

    def store(self, number: int, keys: list[bytes], rows: list[int]) -> Any:
        for k, row in zip(keys, rows, strict=True):
            self.primary.put(row, page_bytes_of(k, 0, ROW_BYTES))
        self.tier.submit_store(fakes.job(number, keys, rows))
        return self.wait(number)[number]

    def load(self, number: int, keys: list[bytes], rows: list[int]) -> Any:
        self.primary.array[rows] = -91
        self.tier.submit_load(fakes.job(number, keys, rows, load=True))
        return self.wait(number)[number]

    def holds(self, k: bytes, row: int) -> bool:
        return bool(np.array_equal(self.primary.bytes(row), page_bytes_of(k, 0, ROW_BYTES)))

    def hits(self, keys: list[bytes], request: fakes.ReqContext = R) -> list[bool]:
        results = [self.tier.lookup(k, request) for k in keys]
        assert set(results) <= {fakes.LookupResult.HIT, fakes.LookupResult.MISS}
        return [result is fakes.LookupResult.HIT for result in results]

    def end(self) -> None:
        self.tier.shutdown()
        self.primary.close()


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with fakes.installed(monkeypatch) as module:
        yield module


@pytest.fixture
def live(module: Any, tmp_path: Path) -> Iterator[Callable[..., Life]]:
    """Makes lives on one store; ends those that the test did not."""
    lives: list[Life] = []

    def make(spec: Any = None, **options: Any) -> Life:
        lives.append(Life(module, tmp_path / "store", spec, **options))
        return lives[-1]

    yield make
    for life in lives:
        if life.primary.array is not None:
            life.end()


KEYS = [key(n) for n in range(8)]
