"""HTTP on the standard library: JSON in, a stream of server-sent events out.

    POST /generate  {"prompt": "text" or "tokens": [1, 2], "max_tokens": 16, "stream": true}
    GET  /stats     what this process's cache and LightMem have counted
    GET  /health    the process that answered

A process takes one connection at a time, and the next one only when it is through: one request
already uses all its cores. So requests wait in the kernel's queue of the shared socket, and
whichever process is free takes the next; nothing else balances the load.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Generator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from light_mem import LocalCacheService

from .cache import PrefixCache
from .generate import Generation
from .model import Model, Tokenizer

log = logging.getLogger("example_server")

_MAX_BODY = 16 << 20
_CLIENT_SECONDS = 10  # for one read or write: a client that stalls must not hold the process


class BadRequest(Exception):
    """What the client is told, with status 400."""


class WebServer(HTTPServer):
    """Serves `model` on a listening socket that other processes accept from as well."""

    def __init__(
        self,
        listening: socket.socket,
        model: Model,
        prefixes: PrefixCache | None,
        service: LocalCacheService | None,
    ) -> None:
        super().__init__(listening.getsockname()[:2], Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        # Every idle process wakes up for a connection and one gets it: the others must not block
        # in accept, where they would not hear that they are to stop.
        listening.setblocking(False)
        self.model = model
        self.prefixes = prefixes
        self.service = service

    def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = {"pid": os.getpid()}
        if self.prefixes is not None and self.service is not None:
            found["prefixes"] = self.prefixes.stats()
            found["light_mem"] = self.service.stats()
        return found


class Handler(BaseHTTPRequestHandler):
    server: WebServer
    timeout = _CLIENT_SECONDS

    # The default, HTTP/1.0: an answer ends with its connection. A client that keeps a connection
    # open would keep the process; and an event stream needs no length, its last event says "done".

    def do_GET(self) -> None:
        if self.path == "/health":
            self._json(200, {"pid": os.getpid()})
        elif self.path == "/stats":
            self._json(200, self.server.stats())
        else:
            self._json(404, {"error": "GET /health, GET /stats or POST /generate"})

    def do_POST(self) -> None:
        if self.path != "/generate":
            self._json(404, {"error": "POST /generate"})
            return
        try:
            wanted = self._body()
            stream = wanted.get("stream", True)
            generation = self._generation(wanted)
        except BadRequest as error:
            self._json(400, {"error": str(error)})
            return
        try:
            if stream:
                self._events(generation)
            else:
                for _ in generation:
                    pass
                self._json(200, self._result(generation))
        except OSError as error:  # a stalled client too: TimeoutError
            log.info("the client has gone: %s", error)

    def _generation(self, wanted: dict[str, Any]) -> Generation:
        model = self.server.model
        if "tokens" in wanted:
            tokens = wanted["tokens"]
        elif not isinstance(wanted.get("prompt"), str):
            raise BadRequest('give "prompt", a text, or "tokens", a list of numbers')
        elif model.tokenizer is None:
            raise BadRequest('this model has no tokenizer: give "tokens"')
        else:
            tokens = model.tokenizer.encode(wanted["prompt"])
        if not isinstance(tokens, list) or not all(
            type(token) is int and 0 <= token < model.vocabulary for token in tokens
        ):
            raise BadRequest(f"tokens are whole numbers below {model.vocabulary}")
        count = wanted.get("max_tokens", 16)
        if type(count) is not int or count < 1:
            raise BadRequest("max_tokens is a whole number from 1")
        if not tokens or len(tokens) + count > model.max_tokens:
            raise BadRequest(f"prompt and answer have 1 to {model.max_tokens} tokens together")
        return Generation(model, self.server.prefixes, tokens, count)

    def _body(self) -> dict[str, Any]:
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            raise BadRequest("Content-Length is missing") from None
        if not 0 <= length <= _MAX_BODY:
            raise BadRequest(f"the body is larger than {_MAX_BODY} bytes")
        try:
            body = json.loads(self.rfile.read(length))
        except (ValueError, OSError):
            raise BadRequest("the body is no JSON") from None
        if not isinstance(body, dict):
            raise BadRequest("the body is no JSON object")
        return body

    def _events(self, generation: Generation) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        # closing(): when the client goes, the generation ends here and not at some collection.
        with closing(with_text(generation, self.server.model.tokenizer)) as pieces:
            for token, text in pieces:
                self._event({"token": token, "text": text})
        self._event({"done": True, **self._result(generation)})

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())  # unbuffered: it is sent now

    def _result(self, generation: Generation) -> dict[str, Any]:
        tokenizer = self.server.model.tokenizer
        return {
            "tokens": generation.tokens,
            "text": tokenizer.decode(generation.tokens) if tokenizer else None,
            "prompt_tokens": len(generation.prompt),
            "cached_tokens": generation.cached_tokens,
            "match_ms": round(generation.match_seconds * 1000, 2),
            "load_ms": round(generation.load_seconds * 1000, 2),
            "first_token_ms": round(generation.first_token_seconds * 1000, 2),
            "pid": os.getpid(),
        }

    def _json(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode() + b"\n"
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError as error:
            log.info("the client has gone: %s", error)

    def log_message(self, format: str, *args: Any) -> None:
        log.info("%s %s", self.address_string(), format % args)


def with_text(
    generation: Generation, tokenizer: Tokenizer | None
) -> Generator[tuple[int, str | None], None, None]:
    """Each token with the text that it completes; a character may take several tokens."""
    said = 0
    with closing(generation.__iter__()) as tokens:
        for token in tokens:
            if tokenizer is None:
                yield token, None
                continue
            text = tokenizer.decode(generation.tokens)
            # A replacement character at the end may be the first half of a real one.
            last = len(generation.tokens) == generation.max_tokens
            whole = len(text if last else text.rstrip("\ufffd"))
            yield token, text[said:whole]
            said = max(said, whole)
