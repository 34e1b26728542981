"""Clients: any process of the server creates, polls, waits and aborts through the same workers."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from light_mem import (
    CacheClient,
    CacheTask,
    ServiceClosedError,
    State,
    TaskTableFullError,
)
from light_mem import session as session_module
from light_mem.engine.table_layout import ABORTED, INITIAL
from tests.conftest import threads, wait_until
from tests.payload import block_bytes_of
from tests.service_child import Child, pack, unpack
from tests.service_rig import WAIT, rig

CLIENT = """
import light_mem
client = unpack(*hear())
def states(task): return [int(s) for s in task.state()]
"""


QUEUES_ONE = """
task = client.create("w", ["a"], [0])
say("made")
hear()
"""


def spawned(pipe: Connection, client: CacheClient, task: CacheTask) -> None:
    """In a process made by multiprocessing: a client and a task that came as arguments."""
    pipe.send((client.page_size(), client.pages_per_block, client.num_pages, task.state()))
    task.wait(WAIT)
    mine = client.create("r", ["a", "no"], [7, 8])
    mine.wait(WAIT)
    pipe.send((task.state(), mine.state(), client.query(["a", "no"]), mine))
    pipe.recv()
    client.close()


def test_a_spawned_process_gets_a_client_and_a_task_as_arguments(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with rig(tmp_path, run=False) as r, ours, theirs:
        r.fill("a", [0])
        task = r.service.create("w", ["a"], [0])
        process = context.Process(target=spawned, args=(theirs, r.service.client(), task))
        process.start()
        assert ours.recv() == (4096, 64, 32, [State.Initial])
        r.blank([7, 8])
        r.service.run()
        task_state, read_state, found, read = ours.recv()
        assert task_state == [State.Finished]
        assert read_state == [State.Finished, State.Aborted]
        assert found == [True, False]
        assert r.holds("a", [7])
        assert r.is_blank([8])
        assert read.ready()
        ours.send("end")
        process.join(WAIT)
        assert process.exitcode == 0
        process.close()


def model(pipe: Connection, kv: torch.Tensor, client: CacheClient) -> None:
    """A process of the server that has its tensor: reads into it, writes from it."""
    kv[1] = 77
    with client:
        client.create("w", ["theirs"], [1]).wait(WAIT)
        assert client.create("r", ["a"], [7]).wait(WAIT)
        pipe.send(kv[7].tolist())
        pipe.recv()


def test_a_process_that_is_sent_the_tensor_has_the_workers_memory(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with rig(tmp_path) as r, ours, theirs:
        r.write(["a"], [0])
        process = context.Process(target=model, args=(theirs, r.kv, r.service.client()))
        process.start()
        read = ours.recv()
        assert bytes(read) == block_bytes_of("a", 1, r.page_bytes).tobytes()
        assert r.holds("a", [7])
        r.blank([8])
        assert r.service.create("r", ["theirs"], [8]).wait(WAIT)
        assert (r.kv[8] == 77).all()
        ours.send("end")
        process.join(WAIT)
        process.close()


def test_a_clients_task_goes_to_the_server_and_to_a_third_process(tmp_path: Path) -> None:
    script = f"""{CLIENT}
task = client.create("w", ["a"], [0])
say(pack(task), states(task))
hear()
say(task.wait(20), states(task))
"""
    third = """
    task = unpack(*hear())
    say(task.ready())
    say(task.wait(20), [int(s) for s in task.state()])
    """
    with rig(tmp_path, run=False) as r, Child(script) as client, Child(third) as other:
        r.fill("a", [0])
        client.say(pack(r.service.client()))
        packed, states = client.hear()
        assert states == [State.Initial]
        other.say(packed)
        assert other.hear() == [False]
        here = unpack(packed)
        assert not here.ready()
        assert r.service.active_create_count("write") == 1  # all processes count
        r.service.run()
        assert here.wait(WAIT)
        assert other.hear() == [True, [State.Finished]]
        client.say("go on")
        assert client.hear() == [True, [State.Finished]]
        assert r.service.query("a") is True


def test_tasks_are_aborted_from_either_side(tmp_path: Path) -> None:
    script = f"""{CLIENT}
servers = unpack(*hear())
client.abort(servers)
mine = client.create("w", ["mine"], [1])
say(states(servers), pack(mine))
hear()
say(states(mine))
"""
    with rig(tmp_path, run=False) as r, Child(script) as client:
        task = r.service.create("w", ["a", "b"], [0, 1])
        client.say(pack(r.service.client()))
        client.say(pack(task))
        states, packed = client.hear()
        assert states == task.state() == [State.Aborted] * 2
        r.service.abort(unpack(packed))
        client.say("go on")
        assert client.hear() == [[State.Aborted]]
        r.service.run()
        r.write(["later"], [2])
        assert r.service.query(["a", "b", "mine"]) == [False] * 3


def test_bad_input_is_refused_where_it_is_given(tmp_path: Path) -> None:
    script = f"""{CLIENT}
for arguments in ('w', ['a'], [32]), ('x', ['a'], [0]), ('r', [1, 2], [1, 1]), ('w', [1.5], [0]):
    try:
        client.create(*arguments)
    except (ValueError, IndexError) as error:
        say(type(error).__name__)
say(client.active_create_count("w"))
"""
    with rig(tmp_path, run=False) as r, Child(script) as client:
        client.say(pack(r.service.client()))
        names = [client.hear()[0] for _ in range(4)]
        assert names == ["PageIndexError", *["InvalidArgumentError"] * 3]
        assert client.hear() == [0]


def test_clients_of_one_process_share_a_lane_and_close_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("light_mem.engine.table_memory.CLIENT_LANES", 1)
    with rig(tmp_path) as r:
        one = r.service.client()
        two, three = one.client(), pickle.loads(pickle.dumps(one))
        r.fill("a", [0])
        with one:
            assert one.create("w", ["a"], [0]).wait(WAIT)
            assert two.query("a") is True
        with pytest.raises(ServiceClosedError):
            one.query("a")
        with pytest.raises(ServiceClosedError):
            one.page_size()
        assert three.create("r", ["a"], [5]).wait(WAIT)
        assert r.holds("a", [5])
        two.close()
        three.close()
        # All of them closed: the lane is free for the next.
        four = r.service.client()
        assert four.query("a") is True
        four.close()


def test_tasks_of_a_client_that_is_closed_or_dropped_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("light_mem.engine.table_memory.CLIENT_LANES", 1)
    with rig(tmp_path, run=False, small_write_bytes=0) as r:
        for key, page in zip("abc", range(3), strict=True):
            r.fill(key, [page])
        of_dropped = r.service.client().create("w", ["a"], [0])
        closed = r.service.client()
        of_closed = closed.create("w", ["b"], [1])
        dropped = closed.create("w", ["c"], [2])
        closed.close()
        other = r.service.client()
        theirs = other.create("w", ["d"], [3])  # the lane is the tasks' as well
        assert of_dropped.state() == of_closed.state() == theirs.state() == [State.Initial]
        copy = pickle.loads(pickle.dumps(dropped))
        other.close()
        del other, theirs, of_dropped, of_closed, dropped  # nobody has any of them
        assert copy.state() == [State.Aborted]
        other = r.service.client()
        kept = other.create("w", ["a", "b"], [0, 1])
        other.close()
        r.service.run()
        assert kept.wait(WAIT)
        assert kept.state() == [State.Finished] * 2
        with r.service.client() as last:  # what is known to be ready keeps no lane
            assert last.create("r", ["a"], [5]).wait(WAIT)
        assert r.holds("a", [5])
        assert kept.state() == [State.Finished] * 2


def until_refused(client: CacheClient) -> type[Exception]:
    """Read with a client until that raises; what it raised."""
    while True:
        try:
            client.create("r", ["a"], [5]).wait(WAIT)
        except Exception as error:
            return type(error)


def test_a_client_that_is_closed_while_others_use_it_says_so(tmp_path: Path) -> None:
    with rig(tmp_path) as r, ThreadPoolExecutor(2) as pool:
        r.write(["a"], [0])
        for _ in range(50):
            client = r.service.client()
            ends = [pool.submit(until_refused, client) for _ in range(2)]
            client.query("a")
            client.close()
            assert [end.result(WAIT) for end in ends] == [ServiceClosedError] * 2


def test_a_lane_is_not_given_away_while_a_dead_workers_block_is_queued_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("light_mem.engine.table_memory.CLIENT_LANES", 1)
    with rig(tmp_path, run=False) as r, Child(CLIENT + QUEUES_ONE) as first:
        first.say(pack(r.service.client()))
        assert first.hear() == ["made"]
        session = r.service._session
        cell = session.table.sizes.cells  # the first of lane 1
        assert session.queue.claim(1) == [cell]
        first.kill()
        real, asked = session_module.time.sleep, []

        def dies(seconds: float) -> None:
            """While the lane is waited for its worker dies."""
            if not asked:
                asked.append(session.queue.recover(1, lambda *_: False, True))
                assert session.table.states[cell] == INITIAL
            real(seconds)

        monkeypatch.setattr(session_module.time, "sleep", dies)
        client = r.service.client()
        assert client.query("a") is False
        assert asked == [1]
        assert session.table.states[cell] == ABORTED
        client.close()


def test_the_lane_of_a_killed_client_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("light_mem.engine.table_memory.CLIENT_LANES", 1)
    script = f"""{CLIENT}
tasks = [client.create("w", [f"{{os.getpid()}} {{n}}"], [n % 32]) for n in range(40)]
say("made")
while True:
    client.create("w", [f"{{os.getpid()}} {{len(tasks)}}"], [0])
"""
    other = f"""{CLIENT}
try:
    client.query("a")
except light_mem.TaskTableFullError as error:
    say(str(error))
hear()
task = client.create("w", ["b"], [1])
say(task.wait(20), states(task))
"""
    with rig(tmp_path, workers=2, slots=128) as r, Child(other) as second:
        for attempt in range(3):
            with Child(script) as first:
                first.say(pack(r.service.client()))
                assert first.hear() == ["made"]
                if attempt == 0:
                    second.say(pack(r.service.client()))
                    assert "all 1 client lanes" in second.hear()[0]
                    with pytest.raises(TaskTableFullError):
                        r.service.client().query("a")
                first.kill()
        second.say("go on")
        assert second.hear() == [True, [State.Finished]]
        wait_until(lambda: r.service.active_create_count("write") == 0)
        r.write(["servers"], [3])
        assert r.service.query(["b", "servers"]) == [True, True]


def test_a_closed_service_is_told_to_its_clients(tmp_path: Path) -> None:
    script = f"""{CLIENT}
task = client.create("w", ["a"], [0])
say("made")
say(task.wait(20), states(task))
def refused(call):
    try:
        call()
    except light_mem.ServiceClosedError:
        return True
say([refused(call) for call in (
    lambda: client.query("a"), lambda: client.create("r", ["a"], [0]),
    lambda: client.match_prefix(["a"]), lambda: client.delete("a"))])
client.close()
say("closed")
"""
    with Child(script) as client:
        with rig(tmp_path, run=False) as r:
            late = pickle.dumps(r.service.client())
            task = pickle.dumps(r.service.create("w", ["x"], [1]))
            client.say(pack(r.service.client()))
            assert client.hear() == ["made"]
        assert client.hear() == [True, [State.Aborted]]
        assert client.hear() == [[True] * 4]
        assert client.hear() == ["closed"]
    with pytest.raises(ServiceClosedError):
        pickle.loads(late).query("a")
    with pytest.raises(ServiceClosedError):
        pickle.loads(task)


SERVER = """
import light_mem
kv = light_mem.allocate_kvcache(8, 1 << 16)
service = light_mem.LocalCacheService(sys.argv[1], 64 << 16, 1, kv, 1)
task = service.create("w", ["a"], [0])
say(pack(service.client()), pack(task))
hear()
"""


def within_two_seconds(ask: Any) -> None:
    """`ask` again and again: it raises ServiceClosedError soon, and does not say no forever."""
    deadline = time.monotonic() + 2
    with pytest.raises(ServiceClosedError, match="gone"):  # noqa: PT012
        while time.monotonic() < deadline:
            ask()


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_server_is_noticed_by_everything_that_polls_or_waits(
    tmp_path: Path, reaped: bool
) -> None:
    with Child(SERVER, tmp_path / "store") as server:
        packed_client, packed_task = server.hear()
        client, task = unpack(packed_client), unpack(packed_task)
        mine = client.create("w", ["b"], [1])
        assert not task.ready()
        assert mine.state() == [State.Initial]
        os.kill(server.pid, signal.SIGKILL)
        if reaped:
            server.process.wait()
        # else: a zombie, as in a container whose init waits for nobody
        for ask in (task.ready, mine.ready, mine.state, mine.data_safe):
            within_two_seconds(ask)
        for wait in (mine.wait, lambda: mine.wait(60), lambda: asyncio.run(_awaited(mine))):
            started = time.monotonic()
            with pytest.raises(ServiceClosedError):
                wait()
            assert time.monotonic() - started < 2
        within_two_seconds(lambda: client.query("a"))
        with pytest.raises(ServiceClosedError):
            client.create("w", ["c"], [2])
        with pytest.raises(ServiceClosedError):
            client.abort(mine)
        assert "gone" in repr(mine)
        client.close()
        with pytest.raises(ServiceClosedError):
            unpack(packed_task).ready()


def test_a_wait_that_has_begun_ends_when_the_server_is_killed(tmp_path: Path) -> None:
    async def both(task: CacheTask, pid: int) -> list[Any]:
        loop = asyncio.get_running_loop()
        waits = [loop.run_in_executor(None, task.wait), _awaited(task), _awaited(task)]
        gathered = asyncio.gather(*waits, return_exceptions=True)
        while not (threads("asyncio") and threads("lightmem-await")):  # of `wait`; of the awaits
            await asyncio.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        return await asyncio.wait_for(gathered, 5)

    with Child(SERVER, tmp_path / "store") as server:
        task = unpack(server.hear()[1])
        results = asyncio.run(both(task, server.pid))
        assert [type(result) for result in results] == [ServiceClosedError] * 3


async def _awaited(task: CacheTask) -> CacheTask:
    return await task
