"""A server at random work on a shared store: writes, reads, aborts, deletes, looks up.

Every payload follows from its key, so wrong bytes show themselves: then the player says so on its
pipe and ends with status 3.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter, deque
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

import light_mem
from light_mem import LightMemError, State

WRONG = 3  # exit status
BLOCK_PAGES = (1, 2, 7, 64)  # by key
VIEWS = 4  # open at a time
LANES = 6  # tasks in flight, each on pages of its own
LANE_PAGES = 64
_SCRIBBLE = 0xA5


class Plan(NamedTuple):
    """What the players of a run share."""

    store: str
    storage_size: int
    shards: int
    keys: int  # size of the working set
    workers: int
    page_bytes: int = 1536
    writes: float = 0.5  # share of writes
    aborts: float = 0.03
    deletes: float = 0.01
    pins: float = 0.05  # and unpins
    views: float = 0.1
    verify: bool = True


def pages_of(key: int) -> int:
    """Pages of the block of a key."""
    return BLOCK_PAGES[key % len(BLOCK_PAGES)]


def payload(key: int, page_bytes: int) -> npt.NDArray[np.uint8]:
    """The bytes of a key's block, uint8 [pages, page_bytes]; cheap, and no two keys alike."""
    words = pages_of(key) * page_bytes // 8
    step = np.uint64((key * 0x9E3779B97F4A7C15 | 1) & (2**64 - 1))
    mixed = np.arange(1, words + 1, dtype=np.uint64) * step + np.uint64(key)
    mixed ^= mixed >> np.uint64(29)
    return mixed.view(np.uint8).reshape(pages_of(key), page_bytes)


class Lane:
    """A run of pages with at most one task on it."""

    def __init__(self, first: int) -> None:
        self.pages = np.arange(first, first + LANE_PAGES)
        self.task: light_mem.CacheTask | None = None
        self.keys: list[int] = []
        self.reading = False


class Player:
    """Plays until told to stop; `say` writes a line to the nursery."""

    def __init__(self, plan: Plan, seed: int, pipe: int) -> None:
        self._plan = plan
        self._random = random.Random(seed)
        self._pipe = pipe
        self._counts: Counter[str] = Counter()
        self._kv = light_mem.allocate_kvcache(LANES * LANE_PAGES, plan.page_bytes)
        self._bytes = self._kv.numpy()
        self._recent: deque[int] = deque(maxlen=32)  # keys that were stored a moment ago
        self._views: list[tuple[int, light_mem.BlockView]] = []
        self._lanes = [Lane(n * LANE_PAGES) for n in range(LANES)]

    def play(self, seconds: float) -> None:
        """Open the store, work, close it."""
        plan = self._plan
        with light_mem.LocalCacheService(
            plan.store, plan.storage_size, plan.shards, self._kv, plan.workers, verify=plan.verify
        ) as service:
            service.run()
            self._say(workers=service.worker_pids)
            end = time.monotonic() + seconds
            said = 0.0
            while time.monotonic() < end:
                self._turn(service, self._random.choice(self._lanes))
                if time.monotonic() - said > 0.2:
                    said = time.monotonic()
                    self._say(workers=service.worker_pids)
            for lane in self._lanes:
                self._finish(lane)
            while self._views:
                self._end_view()
            self._say(stats=service.stats(), done=True)

    def _say(self, **more: object) -> None:
        line = json.dumps({"pid": os.getpid(), "counts": self._counts, **more}) + "\n"
        os.write(self._pipe, line.encode())

    def _turn(self, service: light_mem.LocalCacheService, lane: Lane) -> None:
        dice = self._random.random
        if lane.task is not None:
            if dice() < self._plan.aborts:
                self._abort(service, lane)
            elif lane.task.ready():
                self._finish(lane)
            else:
                lane.task.wait(0.002)
            return
        if dice() < self._plan.deletes:
            self._counts["deleted"] += service.delete([self._key()])
        self._retain(service)
        keys = self._some_keys()
        if dice() < 0.1:
            self._counts["queried"] += len(service.query(keys))
            self._counts["matched"] += service.match_prefix(keys)
        self._start(service, lane, keys, reading=dice() >= self._plan.writes)

    def _retain(self, service: light_mem.LocalCacheService) -> None:
        """Pin, unpin, view; what is viewed is looked at again while others evict and delete."""
        dice = self._random.random
        likely = self._random.choice(self._recent) if self._recent else self._key()
        try:
            if dice() < self._plan.pins:
                self._counts["pinned"] += service.pin([likely])
            if dice() < self._plan.pins:
                self._counts["unpinned"] += service.unpin([self._key() for _ in range(20)])
            if dice() < self._plan.views:
                view = service.view(likely)
                if view is not None:
                    self._views.append((likely, view))
                    self._counts["views"] += 1
        except light_mem.PinLimitError:
            self._counts["pins refused"] += 1
        except light_mem.LeaseLimitError:
            self._counts["views refused"] += 1
        if self._views:
            self._look(*self._random.choice(self._views))
        if len(self._views) > VIEWS or dice() < self._plan.views / 2:
            self._end_view()

    def _look(self, key: int, view: light_mem.BlockView) -> None:
        self._counts["copies viewed" if view.copied else "looks at views"] += 1
        if not np.array_equal(view.tensor.numpy(), payload(key, self._plan.page_bytes)):
            self._wrong(f"a view of key {key} shows other bytes")

    def _end_view(self) -> None:
        if self._views:
            key, view = self._views.pop(self._random.randrange(len(self._views)))
            self._look(key, view)
            view.close()

    def _key(self) -> int:
        return self._random.randrange(self._plan.keys)

    def _some_keys(self) -> list[int]:
        """Either one block of several pages, or several of one page: what one task can name."""
        key = self._key()
        if pages_of(key) > 1:
            return [key]
        step = len(BLOCK_PAGES)
        count = self._random.choice((1, 4, 16))
        return sorted({(key + step * n) % (self._plan.keys // step * step) for n in range(count)})

    def _start(
        self, service: light_mem.LocalCacheService, lane: Lane, keys: list[int], reading: bool
    ) -> None:
        data = np.concatenate([payload(k, self._plan.page_bytes) for k in keys])
        rows = self._random.sample(lane.pages.tolist(), len(data))
        lane.keys, lane.reading = keys, reading
        if reading:
            self._bytes[rows] = 0
        else:
            self._bytes[rows] = data
        lane.task = service.create("r" if reading else "w", keys, rows)
        self._counts["reads" if reading else "writes"] += len(keys)
        if not reading and self._random.random() < 0.3:
            while not lane.task.data_safe():
                time.sleep(0)
            self._bytes[rows] = _SCRIBBLE  # what data_safe promises

    def _finish(self, lane: Lane) -> None:
        task = lane.task
        if task is None:
            return
        if not task.wait(30):
            self._wrong(f"a task hung: {task!r}")
        for block, key in zip(task.blocks, lane.keys, strict=True):
            if block.state is State.Aborted:
                self._counts["aborted reads" if lane.reading else "aborted writes"] += 1
                continue
            self._recent.append(key)
            if lane.reading:
                self._counts["loaded"] += 1
                if not np.array_equal(
                    self._bytes[list(block.pages)], payload(key, self._plan.page_bytes)
                ):
                    self._wrong(f"wrong bytes of key {key}: {block}")
            else:
                self._counts["stored"] += 1
        lane.task = None

    def _abort(self, service: light_mem.LocalCacheService, lane: Lane) -> None:
        assert lane.task is not None
        service.abort(lane.task)
        if not lane.task.ready():
            self._wrong("a task was not ready after its abort")
        reading = lane.reading
        self._finish(lane)
        self._counts["tasks aborted"] += 1
        if reading:  # nobody touches the pages any more
            self._bytes[lane.pages] = _SCRIBBLE
            time.sleep(0.001)
            if not (self._bytes[lane.pages] == _SCRIBBLE).all():
                self._wrong("pages were touched after abort had returned")

    def _wrong(self, what: str) -> None:
        self._say(wrong=what)
        os._exit(WRONG)


def main(plan: Plan, seed: int, pipe: int, seconds: float) -> None:
    """Play in this (forked) process and end it."""
    try:
        Player(plan, seed, pipe).play(seconds)
    except LightMemError as error:
        line = json.dumps({"pid": os.getpid(), "counts": {}, "error": f"{type(error)}: {error}"})
        os.write(pipe, line.encode() + b"\n")
        os._exit(4)
    except BaseException as error:  # whatever it is, the nursery has to hear of it
        line = json.dumps({"pid": os.getpid(), "counts": {}, "wrong": f"{type(error)}: {error}"})
        os.write(pipe, line.encode() + b"\n")
        os._exit(WRONG)
    os._exit(0)


def check_store(plan: Plan) -> Counter[str]:
    """Open the store afresh, read every key, and look at every byte."""
    counts: Counter[str] = Counter()
    kv = light_mem.allocate_kvcache(64, plan.page_bytes)
    with light_mem.LocalCacheService(plan.store, plan.storage_size, plan.shards, kv, 1) as service:
        service.run()
        stored = service.query(list(range(plan.keys)))
        for key in np.flatnonzero(stored).tolist():
            kv.numpy()[:] = 0  # not torch: its threads would not survive the next fork
            n = pages_of(key)
            task = service.create("r", [key], range(n))
            if not task.wait(30):
                counts["hangs"] += 1
            elif task.state() == [State.Finished]:
                good = np.array_equal(kv.numpy()[:n], payload(key, plan.page_bytes))
                counts["checked" if good else "wrong"] += 1
            else:
                counts["lost while listed"] += 1
        counts["damaged"] += service.stats()["damaged"]
        report = service.check()
        counts["check problems"] += not report.clean
    return counts
