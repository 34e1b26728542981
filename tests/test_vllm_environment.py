"""Which environment variables count for a namespace, and that no secret can be read in it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from light_mem.integrations.vllm import environment
from tests import vllm_fakes as fakes

LAYOUT = "VLLM_SSM_CONV_STATE_LAYOUT"


def described(variables: dict[str, str], **factors: Any) -> dict[str, Any]:
    return environment.describe(lambda: {**fakes.compile_factors(), **factors}, variables)


def test_a_layout_that_only_the_environment_tells_counts() -> None:
    assert described({}, **{LAYOUT: "DS"}) != described({}, **{LAYOUT: "SD"}) != described({})
    shuffled = described({}, VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT=True)
    assert shuffled != described({})


def test_without_vllms_factors_what_is_set_counts() -> None:
    assert environment.describe(None, {LAYOUT: "DS"}) != environment.describe(None, {LAYOUT: "SD"})
    assert environment.describe(None, {"PATH": "/bin", "HOME": "/root"}) == {}


def test_a_variable_that_vllm_leaves_out_or_does_not_know_counts() -> None:
    for name in ("VLLM_USE_MODELSCOPE", "VLLM_PLUGIN_OF_SOMEONE_LAYOUT"):
        assert described({name: "1"}) != described({})
        assert described({name: "1"}) != described({name: "2"})


@pytest.mark.parametrize(
    "name",
    [
        "VLLM_PORT",
        "VLLM_HOST_IP",
        "VLLM_CACHE_ROOT",
        "VLLM_LOGGING_LEVEL",
        "VLLM_DIST_IDENT",  # vLLM's worker sets it to the port of this start
        "VLLM_OMP_NUM_THREADS_SET_BY_VLLM",
        "VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME",
        "VLLM_NIXL_SIDE_CHANNEL_PORT",
        "VLLM_SERVICE_HOST",
        "VLLM_SERVICE_PORT_HTTP",
        "VLLM_ROUTER_PORT_8000_TCP",
        "VLLM_ROUTER_PORT_8000_TCP_ADDR",
        "VLLM_ROUTER_PORT_8000_TCP_PROTO",
        "VLLM_API_KEY",
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES",
    ],
)
def test_what_differs_from_start_to_start_does_not_count(name: str) -> None:
    for value in ("one", "another"):
        assert described({name: value}) == described({})
        assert described({}, **{name: value}) == described({})


def test_replicas_of_data_parallelism_have_one_description() -> None:
    second = {"VLLM_DP_RANK": "1", "VLLM_DP_RANK_LOCAL": "1", "VLLM_DP_SIZE": "2"}
    assert described(second, VLLM_DP_RANK=1) == described({})


def test_no_secret_can_be_read_in_it() -> None:
    secret = "hf_abc"
    found = described(
        {"VLLM_API_KEY": secret, "VLLM_PLUGIN_TOKEN": secret, "VLLM_PLUGIN": f"x://{secret}@h"},
        S3_SECRET_ACCESS_KEY=secret,
        VLLM_LATER_TOKEN=secret,
    )
    assert secret not in json.dumps(found)
    assert "VLLM_LATER_TOKEN" in found
    assert found != described({"VLLM_PLUGIN_TOKEN": "other"})


def test_it_is_plain_data() -> None:
    assert described({})["VLLM_DISABLED_KERNELS"] == []
    assert json.dumps(described({"VLLM_X": "1"}))
