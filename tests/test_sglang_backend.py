"""The backend as SGLang sees it: store, restart, look-up, load; against fakes of SGLang's types."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.sglang_fake_pools import MHATokenToKVPoolHost, MLATokenToKVPoolHost
from tests.sglang_rig import KEYS, PAGE, PAGES, Live, indices_of, key, live, module

__all__ = ["live", "module"]  # fixtures

POOLS = {
    f"{kind.__name__}-{layout}": (kind, layout)
    for kind in (MHATokenToKVPoolHost, MLATokenToKVPoolHost)
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
    kind = MLATokenToKVPoolHost if mla else MHATokenToKVPoolHost
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
        (False, {"pool": lambda: MHATokenToKVPoolHost(layout="page_first_direct")}),
        (False, {"pool": lambda: MHATokenToKVPoolHost(layout="layer_first")}),
        (False, {"pool": lambda: MHATokenToKVPoolHost(dtype=torch.bfloat16)}),
        (False, {"pool": lambda: MHATokenToKVPoolHost(heads=4, dim=32)}),
        (False, {"pool": lambda: MHATokenToKVPoolHost(layers=6, page_size=2, pages=64)}),
    ],
)
def test_what_has_other_bytes_is_another_page(
    live: Live, mla: bool, changed: dict[str, Any]
) -> None:
    kind = MLATokenToKVPoolHost if mla else MHATokenToKVPoolHost
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
