"""Namespaces of SGLang follow the layout of KV in the device's memory, and the environment that
chooses it."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch

from light_mem.integrations.sglang.device import describe_device, describe_environment
from tests import sglang_fakes as fakes
from tests.sglang_fake_pools import MHATokenToKVPoolHost
from tests.sglang_rig import KEYS, Life, Live, live, module

__all__ = ["live", "module"]  # fixtures

HEADS, DIM, PAGE = 2, 64, 16


# --- the environment ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "SGLANG_USE_HND_KVCACHE",
        "SGL_USE_HND_KVCACHE",
        "SGLANG_AITER_KV_CACHE_LAYOUT",
        "SGLANG_DSV4_KV_LAYOUT",
        "SGLANG_DSA_HIP_DISABLE_PRESHUFFLE",
        "SGLANG_MAMBA_SSM_DTYPE",
        "SGLANG_SOMETHING_NEW",
        "SGLANG_HICACHE_NIXL_KV_LAYOUT",  # of a group that is ignored, and still a layout
        "AITER_FORCE_A8W4",
        "DSV4_SOMETHING_NEW",
        "DSA_SOMETHING_NEW",
        "ASCEND_USE_FIA",
    ],
)
def test_a_variable_that_could_change_bytes_counts_and_so_does_its_value(name: str) -> None:
    found = [describe_environment({**given, "HOME": "/"}) for given in ({name: "0"}, {name: "1"})]
    assert found[0] != found[1]
    assert {} not in found


@pytest.mark.parametrize(
    "name",
    [
        "SGLANG_RUN_ID",
        "SGLANG_DP_RANK",
        "SGLANG_PORT",
        "SGLANG_HOST_IP",
        "SGLANG_LOG_MS",
        "SGLANG_JIT_LOG_LEVEL",
        "SGLANG_WARMUP_TIMEOUT",
        "SGLANG_CACHE_DIR",
        "SGLANG_TORCH_PROFILER_DIR",
        "SGLANG_FLASHINFER_WORKSPACE_SIZE",
        "SGLANG_TEST_RETRACT",
        "SGLANG_S3_SECRET_ACCESS_KEY",
        "SGL_FORCE_SHUTDOWN",
        "AITER_LOG_LEVEL",
        "CUDA_VISIBLE_DEVICES",
        "PATH",
    ],
)
def test_a_variable_that_leaves_bytes_alone_does_not(name: str) -> None:
    assert describe_environment({name: "1"}) == {}


def test_no_value_of_the_environment_can_be_read_in_it() -> None:
    found = describe_environment({"SGLANG_A": "s3cret", "SGLANG_B": "s3cret", "SGLANG_C": "\udcff"})
    assert "s3cret" not in repr(found)
    assert len(set(found.values())) == 3


def test_the_order_of_the_variables_does_not_matter() -> None:
    one = {"SGLANG_A": "1", "SGLANG_B": "2"}
    assert list(describe_environment(one)) == list(
        describe_environment(dict(reversed(one.items())))
    )


def test_pages_of_another_layout_are_not_found(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_USE_HND_KVCACHE", raising=False)
    first = live()
    first.store(KEYS, range(8))
    first.end()
    monkeypatch.setenv("SGLANG_USE_HND_KVCACHE", "1")
    other = live()
    assert other.hits(KEYS) == 0
    other.end()
    monkeypatch.delenv("SGLANG_USE_HND_KVCACHE")
    assert live().hits(KEYS) == 8


def test_the_environment_counts_also_where_no_settings_are_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = set()
    for value in ("0", "1"):
        monkeypatch.setenv("SGLANG_USE_HND_KVCACHE", value)
        with fakes.installed(monkeypatch, fakes.Context()) as module:
            life = Life(module, tmp_path / "store", MHATokenToKVPoolHost(), {})
            names.add(life.backend._stores["kv"].namespace.name)
            life.end()
    assert len(names) == 2


# --- the device's memory --------------------------------------------------------------------------


class Order(Enum):
    NHD = "nhd"
    HND = "hnd"


class Record:
    """As SGLang's records of a device pool's buffers (msgspec.Struct)."""

    __struct_fields__ = ("buffers", "layout", "num_pages")

    def __init__(self, buffers: Any, layout: Order, num_pages: int) -> None:
        self.buffers, self.layout, self.num_pages = buffers, layout, num_pages


class DevicePool:
    """As a device pool that a host pool keeps."""

    def __init__(self, layout: str, pages: int) -> None:
        self.kv_cache_layout = layout
        self.use_hnd = layout == "hnd"
        self.size = pages * PAGE
        self.mem_usage = pages / 7
        self.device = "cuda:3"
        self.k_buffer = [torch.empty(pages * PAGE, HEADS, DIM)]


class Foreign(DevicePool):
    pass


@pytest.fixture
def host_pool() -> Iterator[Any]:
    pool: Any = MHATokenToKVPoolHost()
    yield pool
    pool.close()


def nhd(pages: int) -> torch.Tensor:
    return torch.empty(pages * PAGE, HEADS, DIM, device="meta")


def hnd(pages: int) -> torch.Tensor:
    return torch.empty(pages, HEADS, PAGE, DIM, device="meta")


def described(host_pool: Any, **known: Any) -> str:
    for name, value in known.items():
        setattr(host_pool, name, value)
    found = repr(describe_device(host_pool))
    for name in known:
        delattr(host_pool, name)
    return found


def test_the_form_of_the_device_s_memory_counts_and_not_how_much_there_is(host_pool: Any) -> None:
    seen = []
    for pages in (7, 4096):
        stacked = torch.empty(4, pages, HEADS, DIM, DIM, device="meta")  # layers first
        seen += [
            described(host_pool, device_k_buffers=(nhd(pages),) * 4),
            described(host_pool, device_k_buffers=(hnd(pages),) * 4),
            described(host_pool, device_k_buffers=(stacked,)),
            described(host_pool, device_k_buffers=(nhd(pages).half(),) * 4),
            described(host_pool, device_k_buffers=(nhd(pages).transpose(1, 2),) * 4),
        ]
    assert len(set(seen)) == 5
    assert seen[:5] == seen[5:]


def test_what_records_and_pools_say_of_their_layout_counts(host_pool: Any) -> None:
    seen = []
    for pages in (7, 4096):
        records = [(Record((nhd(pages),), order, pages),) for order in Order]
        seen += [described(host_pool, _buffer_infos=record) for record in records]
        pools = [
            DevicePool("nhd", pages),
            DevicePool("vectorized_5d", pages),
            Foreign("nhd", pages),
        ]
        seen += [described(host_pool, device_pool=pool) for pool in pools]
    assert len(set(seen)) == 5
    assert seen[:5] == seen[5:]


def test_a_pool_that_hands_out_another_s_slots_is_seen_through(host_pool: Any) -> None:
    class Facade:
        def __init__(self) -> None:
            self.host_pool = host_pool

    host_pool.device_k_buffers = (nhd(7),)
    seen = repr(describe_device(Facade()))
    host_pool.device_k_buffers = (hnd(7),)
    assert repr(describe_device(Facade())) != seen


def test_places_and_functions_are_no_form(host_pool: Any) -> None:
    before = described(host_pool)
    place = {"device": "cuda:1", "gpu_device": torch.device("cpu"), "device_module": torch}
    assert described(host_pool, **place, device_call=lambda: None, device_sizes=[1, 2]) == before
