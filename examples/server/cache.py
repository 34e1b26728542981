"""PrefixCache: load a prefix, store a prefix. Everything that touches LightMem is in this file.

One rule runs through it: a request never fails, and never waits long, because of the cache. What
is not stored, was evicted meanwhile, is damaged, or comes too late is a prefix that ends there;
the model computes the rest, as it would have without a cache.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import monotonic, perf_counter
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from light_mem import LightMemError, State

from .pages import Layers, PageLayout, PagePool
from .prefix import page_hashes

log = logging.getLogger("example_server")

# What goes wrong with a cache: its own errors and the operating system's. Not TypeError and the
# like: a mistake in this program should be seen, not served around.
CACHE_ERRORS = (LightMemError, OSError)


class Service(Protocol):
    """The calls of `LocalCacheService` that a server needs."""

    def match_prefix(self, hashes: Sequence[str]) -> int: ...
    def query(self, hashes: Sequence[str]) -> list[bool]: ...
    def create(self, mode: str, hash_values: Sequence[str], page_indices: Sequence[int]) -> Any: ...
    def abort(self, task: Any) -> None: ...
    def active_create_count(self, mode: str) -> int: ...


class Prefix(NamedTuple):
    """What was loaded: `layers` hold K and V of the first `tokens` tokens."""

    tokens: int
    layers: list[tuple[Tensor, Tensor]]
    match_seconds: float  # hashing the prompt and looking it up
    load_seconds: float  # from the store into `layers`


@dataclass
class Counters:
    """Since the process started; in pages, but for the last two."""

    loaded: int = 0
    missed: int = 0  # full pages of prompts that had to be computed
    stored: int = 0  # handed to LightMem
    dropped: int = 0  # not stored: no room in the queue or no free rows in time
    lost: int = 0  # found, then not readable: evicted meanwhile, damaged, too late
    errors: int = 0  # calls that raised


class PrefixCache:
    """Prefixes of prompts in a LightMem store, through the rows of one KV tensor.

    service     the LocalCacheService that was made with `kvcache`
    kvcache     uint8 `[num_pages, layout.page_bytes]`, from `light_mem.allocate_kvcache`
    identity    of the model: see `prefix.identity`
    patience    seconds that a load may take before it is given up and computed instead
    backlog     prompts that may wait to be stored. Each keeps its K and V in memory until then,
                so the queue is short, and what finds it full is not stored

    `load` and `store` may be called from any thread. `close` before the service is closed.
    """

    def __init__(
        self,
        service: Service,
        layout: PageLayout,
        kvcache: Tensor,
        identity: bytes,
        *,
        patience: float = 2.0,
        backlog: int = 4,
    ) -> None:
        self.counters = Counters()
        self._service = service
        self._layout = layout
        self._identity = identity
        self._patience = patience
        self._numbers = layout.view(kvcache)
        # Halves, so that a burst of stores never leaves a load without rows.
        half = kvcache.shape[0] // 2
        self._load_rows = PagePool(range(half))
        self._store_rows = PagePool(range(half, kvcache.shape[0]))
        self._backlog: queue.Queue[tuple[list[int], Layers] | None] = queue.Queue(backlog)
        self._writer = threading.Thread(target=self._run, name="store-prefixes", daemon=True)
        self._writer.start()

    # --- loading ---------------------------------------------------------------------------------

    def load(self, tokens: Sequence[int]) -> Prefix:
        """K and V of the longest stored prefix of `tokens`, without the last token.

        Rows hold K and V, not logits: the last token has to go through the model in any case.
        """
        started = perf_counter()
        size = self._layout.tokens_per_page
        usable = (len(tokens) - 1) // size
        hashes = page_hashes(self._identity, tokens[: usable * size], size)
        found = 0
        try:
            found = self._service.match_prefix(hashes)
        except CACHE_ERRORS as error:
            self._failed("look-up", error)
        matched = perf_counter()
        out = self._layout.empty(found)
        good = self._read(hashes[:found], out) if found else 0
        self.counters.loaded += good
        self.counters.missed += usable - good
        self.counters.lost += found - good
        out = out[:, :, :, : good * size]
        return Prefix(
            tokens=good * size,
            layers=[(layer[0], layer[1]) for layer in out] if good else [],
            match_seconds=matched - started,
            load_seconds=perf_counter() - matched,
        )

    def _read(self, hashes: Sequence[str], out: Tensor) -> int:
        """Bring blocks into `out`; returns how many leading ones are good."""
        deadline = monotonic() + self._patience
        good = 0
        # Usually one round. A prefix with more pages than there are rows takes several.
        while good < len(hashes):
            rows = self._load_rows.take(len(hashes) - good, deadline - monotonic())
            if not rows:
                break
            try:
                task = self._service.create("read", hashes[good : good + len(rows)], rows)
            except CACHE_ERRORS as error:
                self._load_rows.give_back(rows)
                self._failed("load", error)
                break
            try:
                if not task.wait(max(0.0, deadline - monotonic())):
                    log.warning("a load of %d pages took too long: computing instead", len(rows))
                    # What nobody has begun is Aborted at once, what a worker has in its hands as
                    # soon as it lets go; what was read by then is used.
                    self._service.abort(task)
                states = task.state()
            except CACHE_ERRORS as error:
                # A worker may still write to these rows; the task will say when it is through.
                self._load_rows.lend(task, rows)
                self._failed("load", error)
                break
            # Between look-up and copy a block may have been evicted, or found damaged: it is
            # Aborted, and its row holds anything. Only what comes before it is a prefix.
            end = next((i for i, s in enumerate(states) if s != State.Finished), len(rows))
            self._layout.gather(self._numbers, rows[:end], out, good)
            self._load_rows.give_back(rows)
            good += end
            if end < len(rows):
                break
        return good

    # --- storing ---------------------------------------------------------------------------------

    def store(self, tokens: Sequence[int], layers: Layers) -> bool:
        """Store the full pages of `tokens` that are not stored yet, in the background.

        `layers` hold K and V of at least these tokens and must not be changed afterwards. Returns
        False if the queue is full: then the prefix is not stored, and the next request with it
        computes it again. A server that waited here would let its clients pay for a slow disk.
        """
        try:
            self._backlog.put_nowait((list(tokens), layers))
        except queue.Full:
            self.counters.dropped += len(tokens) // self._layout.tokens_per_page
            return False
        return True

    def pending(self) -> int:
        """Prompts that wait to be stored plus tasks that store some: 0 means all can be found.

        Not the rows that are lent: a block is found some time after its bytes have left its row.
        """
        return self._backlog.unfinished_tasks + self._service.active_create_count("write")

    def _run(self) -> None:
        while (item := self._backlog.get()) is not None:
            try:
                self._write(*item)
            except CACHE_ERRORS as error:
                self._failed("store", error)
            del item  # K and V of a whole prompt: not to be kept until the next one comes
            self._backlog.task_done()

    def _write(self, tokens: list[int], layers: Layers) -> None:
        hashes = page_hashes(self._identity, tokens, self._layout.tokens_per_page)
        # Asking first saves the copy into rows; `create` would leave out what is stored as well.
        stored = self._service.query(hashes) if hashes else []
        todo = [page for page, is_stored in enumerate(stored) if not is_stored]
        while todo:
            rows = self._store_rows.take(len(todo), self._patience)
            if not rows:  # the store does not keep up
                self.counters.dropped += len(todo)
                return
            now, todo = todo[: len(rows)], todo[len(rows) :]
            try:
                for row, page in zip(rows, now, strict=True):
                    self._layout.scatter(self._numbers, row, layers, page)
                task = self._service.create("write", [hashes[page] for page in now], rows)
            except BaseException:
                self._store_rows.give_back(rows)
                raise
            self._store_rows.lend(task, rows)
            self.counters.stored += len(now)

    def close(self, timeout: float = 10.0) -> None:
        """Store what waits, up to `timeout` seconds: a restart then finds all of it."""
        deadline = monotonic() + timeout
        try:
            self._backlog.put(None, timeout=timeout)
        except queue.Full:
            return  # the thread is stuck and a daemon: it ends with the process
        self._writer.join(max(0.0, deadline - monotonic()))
        self._store_rows.drain(max(0.0, deadline - monotonic()))

    # --- both ------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int]:
        """The counters, and what is pending."""
        return {**asdict(self.counters), "pending": self.pending()}

    def _failed(self, what: str, error: BaseException) -> None:
        self.counters.errors += 1
        # Its text, not the error: a handler that keeps records would keep K and V by its traceback.
        log.warning("%s failed, going on without: %s: %s", what, type(error).__name__, str(error))
