"""One life of LMCache's storage manager for `lmcache_restart.py`: commands in, answers out.

    python lmcache_manager.py FD ARGUMENTS...

The arguments are those of LMCache's server for its storage. A command is a line of stdin, its
answer a line of the descriptor FD, both JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lmcache.v1.distributed.api import (
    GroupedObjectKeys,
    MemoryLayoutDesc,
    ObjectKey,
    PrefetchTaskSpec,
)
from lmcache.v1.distributed.config import add_storage_manager_args, parse_args_to_config
from lmcache.v1.distributed.storage_manager import StorageManager

from tests.payload import page_bytes_of

WAIT = 60.0


def key_of(n: int, fields: dict[str, Any]) -> ObjectKey:
    rank = ObjectKey.ComputeKVRank(1, 0, 1, 0)
    content = hashlib.sha256(str(n).encode()).digest()
    return ObjectKey(
        **{"model_name": "org/model", "kv_rank": rank, **fields, "chunk_hash": content}
    )


def payload_of(key: ObjectKey, nbytes: int) -> Any:
    return page_bytes_of((key.chunk_hash, key.model_name, key.cache_salt), 0, nbytes)


def view_of(obj: Any) -> Any:
    memory = (ctypes.c_uint8 * obj.get_size()).from_address(obj.data_ptr)
    return np.frombuffer(memory, np.uint8)


def layout_of(nbytes: int, dtype: str) -> MemoryLayoutDesc:
    kind = getattr(torch, dtype)
    return MemoryLayoutDesc([torch.Size([1, nbytes // kind.itemsize])], [kind])


class Manager:
    """Commands on one storage manager. Objects of one size are one call, as LMCache's are."""

    def __init__(self, arguments: list[str]) -> None:
        parser = argparse.ArgumentParser()
        add_storage_manager_args(parser)
        self.manager = StorageManager(parse_args_to_config(parser.parse_args(arguments)))

    def start(self) -> dict[str, Any]:
        (pair,) = self.manager.l2_adapters()
        return {"adapter": type(pair[1]).__name__, "pid": os.getpid()}

    def status(self) -> dict[str, Any]:
        (_, adapter) = self.manager.l2_adapters()[0]
        usage = adapter.get_usage()
        return {
            **adapter.report_status(),
            "used": usage.total_bytes_used,
            "by_salt": dict(usage.bytes_by_cache_salt),
        }

    def store(
        self,
        numbers: Sequence[int],
        nbytes: int,
        dtype: str = "uint8",
        wait: bool = True,
        **fields: Any,
    ) -> dict[str, Any]:
        """Put objects into L1, from where LMCache stores them; `wait`: until it has."""
        ended = self._ended()
        keys = [key_of(n, fields) for n in numbers]
        reserved = self.manager.reserve_write(keys, layout_of(nbytes, dtype))
        for key, obj in reserved.items():
            view_of(obj)[:] = payload_of(key, nbytes)
        self.manager.finish_write(list(reserved))
        if wait:
            self._settle(ended + len(reserved))
        return {"written": len(reserved)}

    def _ended(self) -> int:
        """Objects whose store is over, whatever became of it."""
        (_, adapter) = self.manager.l2_adapters()[0]
        told = adapter.report_status()
        names = ("stored_blocks", "failed_store_blocks", "dropped_blocks")
        return sum(told.get(name, 0) for name in names)

    def _settle(self, ended: int) -> None:
        deadline = time.monotonic() + WAIT
        while time.monotonic() < deadline:
            (store,) = self.manager.report_status()["store_controllers"].values()
            if self._ended() >= ended and not store["in_flight_task_count"]:
                return
            time.sleep(0.01)
        raise SystemExit("stores do not end")

    def load(
        self,
        numbers: Sequence[int],
        nbytes: int,
        dtype: str = "uint8",
        policy: str = "prefix",
        **fields: Any,
    ) -> dict[str, Any]:
        """Prefetch objects; which of them are hits, and whether a hit has other bytes."""
        keys = [key_of(n, fields) for n in numbers]
        group = GroupedObjectKeys(keys, fields.get("object_group_id", 0), layout_of(nbytes, dtype))
        handle = self.manager.submit_prefetch_task(PrefetchTaskSpec([group], 1, policy))
        assert self.manager.wait_prefetch_status(handle, WAIT)
        result = self.manager.query_prefetch_status(handle)
        hits = result.hit_cells[0].get_indices_list()
        wrong = 0
        if hits:
            found = [keys[at] for at in hits]
            with self.manager.read_prefetched_results(found) as objects:
                for key, obj in zip(found, objects, strict=True):
                    wrong += not np.array_equal(view_of(obj), payload_of(key, nbytes))
            self.manager.finish_read_prefetched(found)
        return {"hits": hits, "from_l2": result.l2_hit_count, "wrong": wrong}

    def forget(self) -> dict[str, Any]:
        """Empty L1, by force: also of what is being stored."""
        self.manager.clear(force=True)
        return {"l1": self.manager.get_l1_usage()[0]}

    def leave(self) -> dict[str, Any]:
        """Close in order."""
        self.manager.close()
        return {}


def main() -> None:
    answers = os.fdopen(int(sys.argv[1]), "w")
    manager = Manager(sys.argv[2:])
    for line in sys.stdin:
        command, options = json.loads(line)
        answers.write(json.dumps(getattr(manager, command)(**options)) + "\n")
        answers.flush()
        if command == "leave":
            return


if __name__ == "__main__":
    main()
