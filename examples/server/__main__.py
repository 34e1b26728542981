"""The command: binds the port, starts the server processes, replaces those that die.

The listening socket is made here and inherited, rather than bound by each process with
SO_REUSEPORT. With that the kernel deals connections out by a hash of the address: a busy process
gets its share while others are idle, and what waits in the queue of a process that is killed is
lost. One queue that all accept from has neither fault, and the port stays open while a process is
being replaced.
"""

from __future__ import annotations

import argparse
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from .process import Options

_STOP_SECONDS = 30.0


class Child:
    """A server process and the socket that says when it is ready, and when it or we are gone."""

    def __init__(self, options: Options, listening: socket.socket) -> None:
        self.ready = False
        self.line, theirs = socket.socketpair()
        with theirs:
            descriptors = [listening.fileno(), theirs.fileno()]
            command = [sys.executable, "-m", f"{__package__}.process", options.to_json()]
            self.process = subprocess.Popen(
                [*command, *map(str, descriptors)], pass_fds=descriptors
            )

    def stop(self) -> None:
        """Let it end its request and store what waits; kill it if that takes too long."""
        self.line.close()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def running(options: Options, listening: socket.socket, count: int) -> Iterator[list[Child]]:
    children: list[Child] = []
    try:
        for _ in range(count):
            children.append(Child(options, listening))
        yield children
    finally:
        for child in children:
            child.line.close()  # all of them at once, then wait for each
        for child in children:
            child.stop()


def supervise(options: Options, listening: socket.socket, count: int) -> int:
    """Keep `count` processes running; returns a status when one does not come up."""
    with running(options, listening, count) as children, selectors.DefaultSelector() as selector:
        for child in children:
            selector.register(child.line, selectors.EVENT_READ, child)
        while True:
            for key, _ in selector.select():
                child = key.data
                if child.line.recv(1):
                    child.ready = True
                    print(f"process {child.process.pid} is ready", flush=True)
                    continue
                selector.unregister(child.line)
                children.remove(child)
                child.stop()
                print(f"process {child.process.pid} ended: {child.process.returncode}", flush=True)
                if not child.ready:  # it would do so again: a wrong option, a full disk
                    return 1
                children.append(Child(options, listening))
                selector.register(children[-1].line, selectors.EVENT_READ, children[-1])


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}")
    add = parser.add_argument
    add("--model", default="small", help="tiny, small, or the directory of a checkpoint")
    add("--dtype", choices=["float32", "bfloat16", "float16"])
    add("--store", default="./kv-store", help="directory of the LightMem store")
    add("--no-cache", action="store_true", help="compute every prompt: for comparison")
    add("--storage-gb", type=float, default=4.0, help="size of the store, allocated at once")
    add("--shards", type=int, default=4)
    add("--rows", type=int, default=512, help="pages of each process's KV tensor")
    add("--tokens-per-page", type=int, default=32)
    add("--processes", type=int, default=2, help="server processes behind the port")
    add("--copy-workers", type=int, default=2, help="LightMem workers of each process")
    add("--threads", type=int, help="of torch, in each process; default: the cores, shared out")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000, help="0: any free one, which is printed")
    add("--verbose", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    options = Options(
        model=args.model,
        dtype=args.dtype,
        store=None if args.no_cache else args.store,
        storage_size=int(args.storage_gb * 1e9),
        shards=args.shards,
        rows=args.rows,
        tokens_per_page=args.tokens_per_page,
        copy_workers=args.copy_workers,
        threads=args.threads or max(1, (os.cpu_count() or 1) // args.processes),
        verbose=args.verbose,
    )

    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with socket.create_server((args.host, args.port), backlog=128) as listening:
        host, port = listening.getsockname()[:2]
        # Clients may connect from now on: they wait in the queue until a process is ready.
        print(f"listening on http://{host}:{port}", flush=True)
        return supervise(options, listening, args.processes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
