"""One server process: model, KV tensor, LocalCacheService, web server.

Each process is a server of its own: its own weights, KV tensor and LightMem workers. What they
share is the listening socket and the store. The other way would be one LocalCacheService whose
`client()` goes to the other processes: that suits a server whose processes share one KV tensor.
Here a process can be killed and another goes on, without a hand-over: the store is all they have
in common, and it stands the death of anyone who uses it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import torch

from light_mem import LocalCacheService, allocate_kvcache

from .cache import PrefixCache
from .model import load_model
from .web import WebServer

log = logging.getLogger("example_server")


@dataclass(frozen=True)
class Options:
    """What the command was given; goes to the processes as JSON, on their command line."""

    model: str
    dtype: str | None
    store: str | None  # None: no cache
    storage_size: int
    shards: int
    rows: int  # of the KV tensor, that is pages
    tokens_per_page: int
    copy_workers: int
    threads: int
    verbose: bool

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def serve(options: Options, listening: socket.socket, parent: socket.socket) -> None:
    """Serve until `parent` is closed at its other end, by the command or by its death."""
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    model = load_model(options.model, options.tokens_per_page, dtype)
    with ExitStack() as stack:
        prefixes = service = None
        if options.store is not None:
            kvcache = allocate_kvcache(options.rows, model.layout.page_bytes)
            service = stack.enter_context(
                LocalCacheService(
                    file=options.store,
                    storage_size=options.storage_size,
                    num_of_shard=options.shards,
                    kvcache=kvcache,
                    num_workers=options.copy_workers,
                )
            )
            service.run()
            prefixes = PrefixCache(service, model.layout, kvcache, model.identity)
            stack.callback(prefixes.close)  # before the service: what waits is stored first
        server = stack.enter_context(WebServer(listening, model, prefixes, service))

        def stop_with_parent() -> None:
            parent.recv(1)  # nothing is ever sent: it returns when the other end is closed
            server.shutdown()

        threading.Thread(target=stop_with_parent, name="parent", daemon=True).start()
        log.info(
            "ready: %s, identity %s, pages of %d tokens and %d bytes",
            options.model,
            model.identity.hex(),
            options.tokens_per_page,
            model.layout.page_bytes,
        )
        parent.sendall(b"r")
        server.serve_forever()


def main(arguments: list[str]) -> int:
    text, listening, parent = arguments
    options = Options(**json.loads(text))
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING,
        format=f"%(asctime)s {os.getpid()} %(levelname)s %(message)s",
    )
    # Ctrl-C in a terminal goes to all processes of the group; the command tells when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(options, socket.socket(fileno=int(listening)), socket.socket(fileno=int(parent)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
