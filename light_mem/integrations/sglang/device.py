"""How KV lies in the memory of the device, as plain data for a namespace.

HiCache copies raw rows: a page has its bytes in the order that the device pool has them in. SGLang
chooses that order by environment variables too (heads before tokens, packed vectors, formats of a
row), of which no setting and no attribute of most host pools says anything: under another one the
same number of bytes is other K and V.

So what the host pool knows of the device's memory counts, and of the environment every variable
that is not known to leave the bytes alone: one that a later SGLang adds makes a cache cold, and
never wrong.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from enum import Enum
from hashlib import blake2b
from types import ModuleType
from typing import Any

import torch

from light_mem.integrations.plain_data import plain

# Variables that SGLang and its kernels read...
_READ = re.compile(
    r"(SGLANG|SGL|AITER|DSV4|DSA)_.*"
    r"|ASCEND_USE_.*|USE_(ROCM|TRITON)_.*|FLASHINFER_NVFP4_.*|.*_DISABLE_FP4_QUANT_FAST_MATH"
    r"|ROCM_QUICK_REDUCE_.*|CK_MOE|IS_H200"
)
# ... all of them but these, by what follows SGLANG_ or SGL_: logs, ports, timeouts, caches of
# compiled kernels, tests, other ranks' and this start's identity, servers, transports of other
# backends, image generation. What SGLang sets anew at each start or rank is among them, and so are
# secrets, which change and decide nothing. A name that speaks of a form counts all the same.
_IGNORED = re.compile(
    r"""
    (?!.*(LAYOUT|DTYPE|FORMAT|QUANT|FP4|FP8|HND|NHD))(
    LOG_.*|.*_LOG_(LEVEL|INPUT|METRICS)|.*_DEBUG_LOG|LOGGING_CONFIG_PATH|JIT_(LOG|BENCHMARK)_.*
    |(ENABLE_)?TRACE_.*|PROFILE_.*|NSYS_PROFILING|TORCH_PROFILER_DIR|MEM_PROFILE_.*|OTLP_.*
    |ENABLE_(NVTX|METRICS)_.*|RECORD_STEP_TIME|DETECT_SLOW_RANK|GIT_COMMIT
    |(PYSPY_DUMP|CUDA_COREDUMP).*|FORCE_SHUTDOWN|KILLPG_ON_SCHEDULER_EXCEPTION
    |PORT|.*_PORT|BACKUP_PORT_BASE|HOST_IP|LOCAL_IP_NIC|ZMQ_.*|GRPC_.*|OLLAMA_.*|HTTP_.*
    |.*_TIMEOUT(_SECS?|_MS|_S)?|TIMEOUT_KEEP_ALIVE|.*HEALTH_?CHECK.*|.*HEALTH_(ENDPOINT_)?GENERAT.*
    |ENABLE_REQUEST_.*|EXPOSE_OWN_ENV_VARS|MAX_BATCH_REQS_PER_HTTP_REQ|USE_PICKLE_IPC
    |USE_CUDA_IPC_TRANSPORT|USE_IPC_POOL_HANDLE_CACHE|USE_MESSAGE_QUEUE_BROADCASTER
    |RUN_ID|DP_RANK|IS_FIRST_RANK_ON_NODE|BLOCK_NONZERO_RANK_CHILDREN|RAY_BUNDLE_INDICES
    |DISTRIBUTED_INIT_METHOD_OVERRIDE|ONE_VISIBLE_DEVICE_PER_PROCESS|ZBAL_BOOTSTRAP_URL
    |NCCL_SO_PATH|.*_?NUMA_BIND.*|SET_CPU_AFFINITY|CPU_OMP_THREADS_BIND
    |CACHE_DIR|(DG|JIT|CUTE_AOT)_CACHE_.*|WEIGHT_CACHE_.*_TEMPLATE|DISABLE_OUTLINES_DISK_CACHE
    |ROLE_NAMESPACES(_OUT)?|EXPERT_DISTRIBUTION_RECORDER_DIR|.*WORKSPACE_SIZE
    |IS_IN_CI(_AMD)?|TEST_(STUCK|CRASH|REQUEST|DISAGG|RETRACT|SKIP|METRICS|PD|MAX|SCRIPTED|LOG)_?.*
    |GRAMMAR_.*|.*CUDA_GRAPH.*|(ENABLE_)?TORCH_COMPILE(_MODE)?|JIT_DEEPGEMM_(PRECOMPILE|FAST_WARMUP)
    |(INIT|MIN)_NEW_TOKEN_RATIO(_FACTOR)?|NEW_TOKEN_RATIO_DECAY_STEPS|RETRACT_DECODE_STEPS
    |CLIP_MAX_NEW_TOKENS_ESTIMATION|EMPTY_CACHE_INTERVAL|SCHEDULER_.*|PREFILL_DELAYER_.*
    |ENABLE_STRICT_MEM_CHECK_.*|SYMM_MEM_PREALLOC_GB_SIZE|(VLM_CACHE|MM_BUFFER)_SIZE_MB
    |MM_FEATURE_CACHE_MB|HICACHE_(FILE_BACKEND|NIXL|MOONCAKE|HF3FS|MEMCACHE)_.*
    |DISAGGREGATION_(BOOTSTRAP|HEARTBEAT|QUEUE|THREAD|ZMQ)_.*|AITER_(LOG_.*|JIT_DIR|REBUILD)
    |TOOL_STRICT_LEVEL|FORWARD_UNKNOWN_TOOLS|EXA_.*|S3_.*|DIFFUSION_.*|CACHE_DIT_.*
    |.*(API|ACCESS|SECRET)_KEY(_ID)?|.*(HF|AUTH|SLACK)_TOKEN|.*PASSWORD
    )
    """,
    re.VERBOSE,
)
# Attributes of a host pool in which it knows the device's memory...
_DEVICE = re.compile(r".*(device|buffer_info|state_pool).*")
# ... and what there says where the pool runs, and not what lies in it.
_PLACE = re.compile(r".*device|.*label|can_use_.*|pin_memory|debug_.*|.*custom_mem_pool")
_MAX_DEPTH = 5


def describe_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that may decide the bytes of a page, by name: digests of their values, which
    may be anything and end up in logs."""
    return {
        name: blake2b(os.fsencode(f"{name}={value}"), digest_size=8).hexdigest()
        for name, value in sorted(environ.items())
        if _READ.fullmatch(name) and not _IGNORED.fullmatch(re.sub("^SGL(ANG)?_", "", name))
    }


def describe_device(host_pool: Any) -> dict[str, Any]:
    """What a host pool of SGLang knows of the device's memory, but for how much there is of it:
    that follows from what is free there, and is another at every start."""
    found = {
        name: _describe(value, 0)
        for name, value in sorted(vars(host_pool).items())
        if _DEVICE.fullmatch(name)
    }
    native = vars(host_pool).get("host_pool")  # of one that only gives out another's slots
    if native is not None:
        found["host_pool"] = {"class": plain(type(native)), **describe_device(native)}
    return {name: described for name, described in found.items() if described}


def _describe(value: Any, depth: int) -> Any:
    """Plain data without sizes; None for what says nothing of a form."""
    if isinstance(value, torch.Tensor):
        # Pages or slots are the first axis, or the second after the layers: neither these lengths
        # nor the first stride, which may span them, are the same in a pool of another size.
        form = [value.dim(), list(value.shape[2:]), list(value.stride()[1:])]
        return [plain(value.dtype), *form]
    if isinstance(value, (list, tuple)):
        described = [_describe(item, depth + 1) for item in value]
        return [item for n, item in enumerate(described) if item and item not in described[:n]]
    fields = getattr(type(value), "__struct_fields__", None)  # SGLang's records: msgspec.Struct
    if isinstance(value, (Enum, type, ModuleType)) or callable(value) or depth > _MAX_DEPTH:
        return None
    if fields:
        return _describe_object(value, fields, depth)
    # A pool, which has also what it works with: only what it says of itself.
    names = [name for name in getattr(value, "__dict__", ()) if not name.startswith("_")]
    return _describe_object(value, names, None) if names else None


def _describe_object(value: Any, names: Iterable[str], depth: int | None) -> dict[str, Any]:
    """Its class and texts, switches and types; with a depth also the parts that it consists of."""
    form: dict[str, Any] = {"class": plain(type(value))}
    for name in sorted(names):
        part = getattr(value, name, None)
        if _PLACE.fullmatch(name):
            continue
        if isinstance(part, (bool, str, Enum, torch.dtype)):
            form[name] = plain(part)
        elif depth is not None and (described := _describe(part, depth + 1)):
            form[name] = described
    return form
