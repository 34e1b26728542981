"""Servers in other processes that are watched from this one."""

from __future__ import annotations

from pathlib import Path

from tests.service_child import Child

SERVER = """
import os, light_mem, torch
from tests.payload import page_bytes_of
kv = light_mem.allocate_kvcache(32, 4096)
service = light_mem.LocalCacheService(sys.argv[1], 256 * 4096, 2, kv, int(sys.argv[2]))
service.run()
say(os.getpid(), service.worker_pids)
while True:
    what, *rest = hear()
    if what == "write":
        task = service.create("write", rest, list(range(len(rest))))
        say(task.wait(20))
    elif what == "read":
        task = service.create("read", rest, list(range(len(rest))))
        say(task.wait(20))
    elif what == "query":
        say(service.query(rest))
    elif what == "stats":
        say(service.stats())
    elif what == "client":
        say(pack(service.client()))
    elif what == "metrics":
        from light_mem import metrics
        from prometheus_client import generate_latest
        say(generate_latest(metrics.registry(sys.argv[1], ages=False)).decode())
    elif what == "close":
        service.close()
        say("closed")
        break
"""


def server(store: Path, workers: int = 1, through: tuple[str, ...] = ()) -> Child:
    """A server of this store; it hears what to do: ["write", hash, ...], ["stats"], ..."""
    return Child(SERVER, store, workers, through=through)


def ask(child: Child, *words: str) -> object:
    """Let it do something; returns what it answers."""
    child.say(*words)
    return child.hear()[0]
