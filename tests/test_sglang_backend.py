"""The backend as SGLang sees it: store, restart, look-up, load; against fakes of SGLang's types."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from light_mem import InvalidArgumentError, KVCacheMemoryError, StoreFormatError, maintenance
from light_mem.engine import kvmemory
from tests import sglang_fakes as fakes
from tests.payload import page_bytes_of

PAGES, PAGE = 32, 4  # pages of a pool, indices of a page
UNTOUCHED = 0xA5


def key(n: int) -> str:
    """A key as SGLang makes it."""
    return hashlib.sha256(str(n).encode()).hexdigest()


KEYS = [key(n) for n in range(8)]


def indices_of(pages: Sequence[int], page_size: int = PAGE) -> torch.Tensor:
    """SGLang's host indices of these pages."""
    return torch.cat([torch.arange(n * page_size, (n + 1) * page_size) for n in pages])


class Life:
    """One rank's life: a host pool and the backend on it, made as SGLang's factory does."""

    def __init__(
        self, module: Any, store: Path, pool: Any, side_pools: dict[str, Any], **changes: Any
    ) -> None:
        self.pool = pool
        self.side_pools = side_pools
        options = {
            "backend_name": "light_mem",
            "module_path": fakes.BACKEND,
            "class_name": "LightMemStorage",
            "interface_v1": 1,
            "allocator": "shm",
            "file": str(store),
            "storage_size": 1 << 21,
            "num_of_shard": 1,
            "num_workers": 1,
            "weights": "w",
            **changes.pop("options", {}),
        }
        self.backend: Any = None
        try:
            self.backend = module.LightMemStorage(fakes.config(options, **changes), {})
            self.backend.register_mem_pool_host(pool)
            for name, side_pool in {"kv": pool, **side_pools}.items():
                self.backend.register_mem_host_pool_v2(side_pool, fakes.PoolName(name))
            self.backend.on_host_pools_registered()
        except BaseException:
            self.end()
            raise

    def pieces(self, page: int, pool: Any = None) -> list[np.ndarray[Any, Any]]:
        """The memory of a page, in the order of its bytes."""
        pool = self.pool if pool is None else pool
        addresses, lengths = pool.get_page_buffer_meta(indices_of([page], pool.page_size))
        memories = pool.buffers if pool.kv_buffer is None else [pool.kv_buffer]
        flat = [m.view(-1).view(torch.uint8) for m in memories]
        found = []
        for address, length in zip(addresses, lengths, strict=True):
            home = next(m for m in flat if m.data_ptr() <= address < m.data_ptr() + m.nbytes)
            start = address - home.data_ptr()
            found.append(home[start : start + length].numpy())
        return found

    def fill(self, k: str, page: int, pool: Any = None) -> None:
        pieces = self.pieces(page, pool)
        data = page_bytes_of(k, 0, sum(map(len, pieces)))
        for piece in pieces:
            piece[:], data = data[: len(piece)], data[len(piece) :]

    def blank(self, pages: Sequence[int], pool: Any = None) -> None:
        for page in pages:
            for piece in self.pieces(page, pool):
                piece[:] = UNTOUCHED

    def is_blank(self, page: int) -> bool:
        return all((piece == UNTOUCHED).all() for piece in self.pieces(page))

    def holds(self, k: str, page: int, pool: Any = None) -> bool:
        found = np.concatenate(self.pieces(page, pool))
        return bool(np.array_equal(found, page_bytes_of(k, 0, len(found))))

    def store(self, keys: Sequence[str], pages: Sequence[int]) -> list[bool]:
        for k, page in zip(keys, pages, strict=True):
            self.fill(k, page)
        return self.backend.batch_set_v1(list(keys), indices_of(pages))

    def load(self, keys: Sequence[str], pages: Sequence[int]) -> list[bool]:
        self.blank(pages)
        return self.backend.batch_get_v1(list(keys), indices_of(pages))

    def hits(self, keys: Sequence[str]) -> int:
        return self.backend.batch_exists(list(keys))

    def end(self) -> None:
        if self.backend is not None:
            self.backend.close()
        for pool in [self.pool, *self.side_pools.values()]:
            pool.close()


Live = Callable[..., Life]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with fakes.installed(monkeypatch) as module:
        yield module


@pytest.fixture
def live(module: Any, tmp_path: Path) -> Iterator[Live]:
    """Makes lives on one store; all end."""
    lives: list[Life] = []

    def make(pool: Any = None, side_pools: dict[str, Any] | None = None, **changes: Any) -> Life:
        pool = pool or fakes.MHATokenToKVPoolHost()
        lives.append(Life(module, tmp_path / "store", pool, side_pools or {}, **changes))
        return lives[-1]

    yield make
    for life in lives:
        life.end()


POOLS = {
    f"{kind.__name__}-{layout}": (kind, layout)
    for kind in (fakes.MHATokenToKVPoolHost, fakes.MLATokenToKVPoolHost)
    for layout in ("page_first", "page_first_direct", "layer_first")
}


@pytest.mark.parametrize("name", POOLS)
def test_a_new_server_loads_what_the_last_one_stored(live: Live, name: str) -> None:
    kind, layout = POOLS[name]
    first = live(kind(layout=layout))
    assert first.hits(KEYS) == 0
    assert first.store(KEYS, range(8)) == [True] * 8
    assert first.hits(KEYS) == 8
    first.end()
    second = live(kind(layout=layout))
    assert second.hits([*KEYS, key(9)]) == 8
    pages = [30, 3, 17, 5, 8, 0, 1, 2]
    others = sorted(set(range(PAGES)) - set(pages))
    second.blank(others)
    assert second.load(KEYS, pages) == [True] * 8
    assert all(second.holds(k, page) for k, page in zip(KEYS, pages, strict=True))
    assert all(second.is_blank(page) for page in others)


def test_the_stored_prefix_ends_at_the_first_gap(live: Live) -> None:
    life = live()
    life.store([KEYS[n] for n in (0, 1, 3)], [0, 1, 2])
    assert life.hits(KEYS) == 2
    assert life.hits(KEYS[3:]) == 1
    assert life.hits(KEYS[2:]) == 0
    assert life.hits([]) == 0
    assert life.backend.exists(KEYS[3])
    assert not life.backend.exists(KEYS[2])


def test_what_is_not_stored_is_false_and_leaves_its_page_alone(live: Live) -> None:
    life = live()
    life.store(KEYS[::2], range(4))
    assert life.load(KEYS, range(10, 18)) == [True, False] * 4
    for n, k in enumerate(KEYS):
        assert life.is_blank(10 + n) if n % 2 else life.holds(k, 10 + n)


def test_a_stored_page_is_stored_without_being_read(live: Live) -> None:
    life = live()
    life.store(KEYS, range(8))
    life.blank(range(8))
    assert life.backend.batch_set_v1(KEYS, indices_of(range(8))) == [True] * 8
    assert life.load(KEYS, range(8)) == [True] * 8
    assert all(life.holds(k, n) for n, k in enumerate(KEYS))


def test_a_damaged_page_is_a_miss_and_the_others_are_not(live: Live, tmp_path: Path) -> None:
    life = live()
    life.store(KEYS, range(8))
    wanted = np.concatenate(life.pieces(3)).tobytes()
    life.end()
    (data,) = (p for p in (tmp_path / "store").glob("shard-*") if wanted in p.read_bytes())
    at = data.read_bytes().index(wanted) + len(wanted) // 2
    with data.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    again = live()
    assert again.load(KEYS, range(8)) == [n != 3 for n in range(8)]
    assert again.hits(KEYS) == 3
    assert all(again.holds(k, n) for n, k in enumerate(KEYS) if n != 3)
    again.fill(KEYS[3], 3)
    assert again.backend.batch_set_v1([KEYS[3]], indices_of([3])) == [True]
    assert again.load(KEYS, range(8)) == [True] * 8


def test_the_least_recently_used_pages_make_room(live: Live) -> None:
    life = live(options={"storage_size": 64 * 6144})
    page_bytes = sum(map(len, life.pieces(0)))
    room = 64 * 6144 // page_bytes
    many = [key(n) for n in range(2 * room)]
    for start in range(0, len(many), 16):
        part = many[start : start + 16]
        assert life.store(part, range(len(part))) == [True] * len(part)
    assert life.hits(many[:1]) == 0
    last = many[-16:]
    assert life.hits(last) == 16
    assert life.load(last, range(16)) == [True] * 16
    assert all(life.holds(k, n) for n, k in enumerate(last))


@pytest.mark.parametrize(
    ("mla", "shared"),
    [
        (False, {"dp_rank": 1}),
        (True, {"dp_rank": 1}),
        (True, {"tp_rank": 1, "tp_size": 2}),
        (False, {"enable_storage_metrics": True}),
    ],
)
def test_ranks_with_the_same_bytes_share_them(
    live: Live, mla: bool, shared: dict[str, Any]
) -> None:
    kind = fakes.MLATokenToKVPoolHost if mla else fakes.MHATokenToKVPoolHost
    first = live(kind(), is_mla_model=mla)
    first.store(KEYS, range(8))
    other = live(kind(pages=20), is_mla_model=mla, **shared)
    assert other.hits(KEYS) == 8
    assert other.load(KEYS, range(8)) == [True] * 8
    assert all(other.holds(k, n) for n, k in enumerate(KEYS))


@pytest.mark.parametrize(
    ("mla", "changed"),
    [
        (False, {"tp_rank": 1, "tp_size": 2}),
        (False, {"tp_rank": 0, "tp_size": 2}),
        (False, {"pp_rank": 1, "pp_size": 2}),
        (True, {"pp_rank": 1, "pp_size": 2}),
        (False, {"attn_cp_rank": 1, "attn_cp_size": 2}),
        (True, {"attn_cp_rank": 1, "attn_cp_size": 2}),
        (True, {"dcp_rank": 1, "dcp_size": 2}),
        (False, {"model_name": "another"}),
        (False, {"options": {"weights": "others"}}),
        (False, {"options": {"namespace": "another"}}),
        (False, {"pool": lambda: fakes.MHATokenToKVPoolHost(layout="page_first_direct")}),
        (False, {"pool": lambda: fakes.MHATokenToKVPoolHost(layout="layer_first")}),
        (False, {"pool": lambda: fakes.MHATokenToKVPoolHost(dtype=torch.bfloat16)}),
        (False, {"pool": lambda: fakes.MHATokenToKVPoolHost(heads=4, dim=32)}),
        (False, {"pool": lambda: fakes.MHATokenToKVPoolHost(layers=6, page_size=2, pages=64)}),
    ],
)
def test_what_has_other_bytes_is_another_page(
    live: Live, mla: bool, changed: dict[str, Any]
) -> None:
    kind = fakes.MLATokenToKVPoolHost if mla else fakes.MHATokenToKVPoolHost
    first = live(kind(), is_mla_model=mla)
    first.store(KEYS, range(8))
    pool = changed.get("pool", kind)()
    changed = {name: value for name, value in changed.items() if name != "pool"}
    other = live(pool, is_mla_model=mla, **changed)
    assert other.hits(KEYS) == 0
    if other.pool.page_size == PAGE:
        assert other.load(KEYS, range(8)) == [False] * 8
        assert all(other.is_blank(n) for n in range(8))
    assert first.hits(KEYS) == 8


def test_threads_query_load_and_store_at_the_same_time(live: Live) -> None:
    life = live(options={"num_workers": 2, "num_of_shard": 2, "storage_size": 1 << 22})
    batches = [[key(100 * b + n) for n in range(8)] for b in range(12)]
    stored = [threading.Event() for _ in batches]
    wrong: list[object] = []

    def load() -> None:
        for batch, event in zip(batches, stored, strict=True):
            event.wait(30)
            loaded = life.load(batch, range(8, 16))
            if not all(loaded) or not all(life.holds(k, 8 + n) for n, k in enumerate(batch)):
                wrong.append(batch)

    def query() -> None:
        while not stored[-1].is_set():
            for batch, event in zip(batches, stored, strict=True):
                if event.is_set() and life.hits(batch) != 8:
                    wrong.append(batch)

    threads = [threading.Thread(target=load), threading.Thread(target=query)]
    for thread in threads:
        thread.start()
    for batch, event in zip(batches, stored, strict=True):
        assert life.store(batch, range(8)) == [True] * 8
        event.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong


# --- at the start ---------------------------------------------------------------------------------


def test_a_private_pool_is_refused_with_the_setting_that_helps(live: Live) -> None:
    with pytest.raises(KVCacheMemoryError, match='"allocator": "shm"'):
        live(fakes.MHATokenToKVPoolHost(allocate=fakes.private))


def test_memory_that_nobody_can_map_is_refused_with_that_setting(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvmemory, "open_region", lambda region: None)
    with pytest.raises(KVCacheMemoryError, match='"allocator": "shm"'):
        live()


def test_the_backend_refuses_to_pass_tensors(live: Live) -> None:
    with pytest.raises(InvalidArgumentError, match='"interface_v1": 1'):
        live(options={"interface_v1": 0})


def test_methods_that_pass_tensors_find_and_store_nothing(live: Live) -> None:
    life = live()
    life.store(KEYS, range(8))
    target = torch.zeros(16)
    assert life.backend.get(KEYS[0], target) is None
    assert life.backend.batch_get(KEYS, [target] * 8) == [None] * 8
    assert life.backend.set(key(99), target) is False
    assert life.backend.batch_set([key(99)], [target]) is False
    assert not target.any()
    assert life.hits([key(99)]) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"storage": 1},
        {"storage_size": 0},
        {"storage_size": "1g"},
        {"num_workers": 0},
        {"load_timeout": -1},
        {"store_timeout": "a while"},
        {"weights": ""},
        {"namespace": 3},
        {"file": 7},
        {"verify": "no"},
        {"durability": "never"},
        {"pool_ratio": {"kv": 0.5}},
        {"pool_ratio": {"mamba": 0}},
        {"pool_ratio": {"mamba": 1.0}},  # no such pool here
        {"pool_ratio": 2},
    ],
)
def test_wrong_options_are_refused_at_the_start(live: Live, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError):
        live(options=options)


@pytest.mark.parametrize("name", ["file", "storage_size"])
def test_options_that_must_be_there(module: Any, name: str) -> None:
    options = {"interface_v1": 1, "file": "f", "storage_size": 1 << 20}
    del options[name]
    with pytest.raises(InvalidArgumentError, match=f"missing options \\['{name}'\\]"):
        module.LightMemStorage(fakes.config(options))


def test_sglang_s_own_keys_are_no_options(module: Any) -> None:
    options: dict[str, Any] = {"interface_v1": 1, "file": "f", "storage_size": 1 << 20}
    options |= {"prefetch_threshold": 256, "tp_lcm_size": 8, "prefetch_timeout_base": 1}
    module.LightMemStorage(fakes.config(options)).close()


def test_pages_of_another_size_need_another_store(live: Live) -> None:
    live().end()
    with pytest.raises(StoreFormatError, match=r"\{pp_rank\}"):
        live(fakes.MHATokenToKVPoolHost(layers=2))


def test_ranks_may_be_in_the_path(live: Live, tmp_path: Path) -> None:
    path = {"file": str(tmp_path / "a" / "pp{pp_rank}-tp{tp_rank}-dp{dp_rank}")}
    live(options=path, pp_rank=1, pp_size=2, tp_rank=2, tp_size=4, dp_rank=3)
    assert maintenance.inspect(tmp_path / "a" / "pp1-tp2-dp3").blocks == 0


def test_settings_that_cannot_be_found_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pool = fakes.MHATokenToKVPoolHost()
    with (
        fakes.installed(monkeypatch, fakes.Context()) as module,
        pytest.raises(InvalidArgumentError, match='"weights"'),
    ):
        Life(module, tmp_path / "store", pool, {}, options={"weights": None})
    pool.close()


# --- the rest -------------------------------------------------------------------------------------


def test_numbers_of_indices_and_keys_must_fit(live: Live) -> None:
    life = live()
    assert life.backend.batch_set_v1(KEYS, indices_of(range(7))) == [False] * 8
    assert life.backend.batch_get_v1(KEYS[:2], indices_of([0, 0])) == [False] * 2
    outside = indices_of([PAGES + 8])
    assert life.backend.batch_set_v1(KEYS[:1], outside) == [False]
    assert life.hits(KEYS) == 0
    assert life.backend.batch_get_v1([], indices_of([0])[:0]) == []


def test_clear_takes_everything_out(live: Live) -> None:
    life = live()
    life.store(KEYS, range(8))
    assert life.backend.clear() is True
    assert life.hits(KEYS) == 0
    life.end()
    assert life.backend.clear() is False


def test_a_closed_backend_finds_nothing(live: Live) -> None:
    life = live()
    life.store(KEYS, range(8))
    life.backend.close()
    life.backend.close()
    assert life.hits(KEYS) == 0
    assert life.load(KEYS, range(8)) == [False] * 8
    assert all(life.is_blank(n) for n in range(8))
    assert life.store([key(99)], [0]) == [False]


def test_another_backend_may_take_over_the_same_pool(module: Any, tmp_path: Path) -> None:
    pool = fakes.MHATokenToKVPoolHost()
    first = Life(module, tmp_path / "store", pool, {})
    first.store(KEYS, range(8))
    first.backend.close()
    second = Life(module, tmp_path / "store", pool, {})
    assert second.load(KEYS, range(8, 16)) == [True] * 8
    assert all(second.holds(k, 8 + n) for n, k in enumerate(KEYS))
    second.end()


def test_metrics_tell_each_call_once(live: Live) -> None:
    life = live(enable_storage_metrics=True)
    life.store(KEYS, range(8))
    life.load(KEYS[:3], range(3))
    found = life.backend.get_stats()
    assert (found.backup_pgs, found.prefetch_pgs) == ([8], [3])
    assert len(found.backup_bandwidth) == len(found.prefetch_bandwidth) == 1
    assert min(found.backup_bandwidth + found.prefetch_bandwidth) > 0
    assert life.backend.get_stats().backup_pgs == []
    assert live(options={"namespace": "b"}).backend.get_stats() is None
