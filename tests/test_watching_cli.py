"""`light-mem stats` and `light-mem top`: what they print, and that they end."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from light_mem import cli
from light_mem.commands.output import seconds_text, share_text
from light_mem.commands.stats import stats_screen
from light_mem.commands.top import top_screen
from light_mem.monitor import look
from tests.maintenance_helpers import BLOCKS, Command, files, flip, make_store
from tests.monitor_helpers import ask, server
from tests.service_child import ROOT
from tests.service_rig import rig

# A shell that starts its jobs in the background has them ignore interrupts, and hands that on.
MAIN = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from light_mem.cli import main; sys.exit(main(sys.argv[1:]))"
)


def test_stats_of_a_store_without_a_server(tmp_path: Path, command: Command) -> None:
    store = make_store(tmp_path / "store")
    before = files(store)
    assert command("stats", store) == 0
    assert "no server has it open" in command.out
    assert "Blocks by last use" in command.out
    code, report = command.json("stats", store)
    assert code == 0
    assert report["store"]["blocks"] == len(BLOCKS)
    assert report["servers"] == []
    assert report["rates"] is None
    assert files(store) == before


def test_stats_of_a_server(tmp_path: Path, command: Command) -> None:
    with server(tmp_path / "store", workers=2) as child:
        child.hear()
        assert ask(child, "write", *"abc")
        assert ask(child, "query", *"abz")
        assert ask(child, "read", "a")
        assert command("stats", tmp_path / "store", "--interval", "0.01") == 0
        for text in (f"Service in {child.pid}", "66.7%", "2 of 2", "12.0 KiB", "a second"):
            assert text in command.out
        code, report = command.json("stats", tmp_path / "store", "--interval", "0.01")
        assert code == 0
        [shown] = report["servers"]
        assert shown["pid"] == child.pid
        assert shown["counters"] == report["total"]["counters"]
        assert shown["counters"]["bytes_written"] == 3 * 4096
        assert shown["latencies"]["write"]["count"] == 1
        assert shown["latencies"]["write"]["buckets"][-1] == [None, 1]
        assert report["rates"]["seconds"] > 0.01
        assert report["rates"]["servers"]["bytes_read"] == 0.0


def test_watching_goes_on_until_nobody_reads(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    arguments = ["stats", str(store), "--watch", "--interval", "0.01", "--json"]
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as watch:
        assert watch.stdout is not None
        assert watch.stderr is not None
        reports = [json.loads(watch.stdout.readline()) for _ in range(4)]
        watch.stdout.close()
        assert watch.wait(20) == 0
        assert watch.stderr.read() == b""
    assert [report["rates"] is None for report in reports] == [True, False, False, False]
    assert all(report["store"]["ages"] == reports[0]["store"]["ages"] for report in reports)


def test_tables_that_are_watched_through_a_pipe_come_one_after_the_other(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    arguments = ["stats", str(store), "--watch", "--interval", "0.01"]
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as watch:
        assert watch.stdout is not None
        tables = 0
        while tables < 3:
            tables += watch.stdout.readline().startswith("no server has it open")
        watch.stdout.close()
        assert watch.wait(20) == 0


def test_watching_is_ended_by_an_interrupt(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, "stats", str(store), "--watch", "--json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    ) as watch:
        assert watch.stdout is not None
        assert json.loads(watch.stdout.readline())["servers"] == []
        watch.send_signal(signal.SIGINT)
        assert watch.wait(20) == 130


def test_watching_sees_a_server_come_and_go(tmp_path: Path) -> None:
    with rig(tmp_path, run=False):
        pass  # there is a store now
    arguments = ["stats", str(tmp_path / "store"), "--watch", "--interval", "0.01", "--json"]
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments], cwd=ROOT, stdout=subprocess.PIPE
    ) as watch:
        assert watch.stdout is not None

        def until(servers: int) -> None:
            assert watch.stdout is not None
            while len(json.loads(watch.stdout.readline())["servers"]) != servers:
                pass

        until(0)
        with rig(tmp_path, run=False):
            until(1)
        until(0)
        watch.stdout.close()
        assert watch.wait(20) == 0


def test_top_has_a_row_a_service(tmp_path: Path, command: Command) -> None:
    with server(tmp_path / "store") as one, server(tmp_path / "store", workers=2) as two:
        for child in (one, two):
            child.hear()
        assert ask(one, "write", *"abc")
        assert ask(one, "query", "a", "z")
        assert command("top", tmp_path / "store", "--once", "--interval", "0.01") == 0
        rows = {line.split()[0]: line.split() for line in command.out.splitlines() if line.split()}
        assert rows[str(one.pid)][1:4] == ["1/1", "0", "0"]
        assert "50.0%" in rows[str(one.pid)]
        assert rows[str(two.pid)][1] == "2/2"
        assert "3 blocks, 1.2% full, 0 evictions" in command.out
        code, report = command.json("top", tmp_path / "store", "--interval", "0.01")
        assert code == 0
        assert [shown["pid"] for shown in report["servers"]] == sorted([one.pid, two.pid])
        assert report["store"]["ages"] is None


def test_top_without_a_server_and_without_an_index(tmp_path: Path, command: Command) -> None:
    store = make_store(tmp_path / "store")
    assert command("top", store, "--once", "--interval", "0.01") == 0
    assert "no server has it open" in command.out
    (store / "index").unlink()
    assert command("top", store, "--once", "--interval", "0.01") == 0
    assert "cannot be used: it is missing" in command.out
    assert command("stats", store, "--interval", "0.01") == 0
    assert "cannot be used: it is missing" in command.out


def test_servers_of_another_user_are_servers(tmp_path: Path) -> None:
    found = look(make_store(tmp_path / "store"))
    console = Console(file=io.StringIO(), width=120)
    for screen in (top_screen, stats_screen):
        with console.capture() as shown:
            console.print(screen(found._replace(unseen=1), None))
        assert "1 server has it open, of another user or container" in shown.get()
        assert "no server" not in shown.get()


def test_evictions_and_damage_are_shown(tmp_path: Path, command: Command) -> None:
    store = make_store(tmp_path / "store")
    flip(store, BLOCKS[0])
    assert command("verify", store, "--repair") == 1
    _, report = command.json("stats", store)
    assert report["store"]["damaged"] == 1
    with rig(tmp_path / "small", slots=64) as r:
        r.write([str(n) for n in range(32)], range(32))
        r.write([str(n) for n in range(32, 64)], range(32))
        r.write([str(n) for n in range(64, 74)], range(10))
        assert command("top", tmp_path / "small" / "store", "--once",
                       "--interval", "0.01") == 0  # fmt: skip
        assert "10 evictions" in command.out


@pytest.mark.parametrize("name", ["stats", "top", "metrics"])
@pytest.mark.parametrize("what", ["nothing", "a file", "an empty directory"])
def test_what_is_no_store_is_exit_code_2(
    tmp_path: Path, command: Command, name: str, what: str
) -> None:
    target = tmp_path / "target"
    if what == "a file":
        target.write_text("text")
    elif what != "nothing":
        target.mkdir()
    if name == "metrics":
        pytest.importorskip("prometheus_client")
    assert command(name, target) == 2
    assert command.out == ""
    assert f"light-mem {name}: " in command.err


def test_intervals_and_ports_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["stats", "x", "--interval", "0"], "seconds above 0"),
        (["top", "x", "--interval", "nan"], "seconds above 0"),
        (["top", "x", "--interval", "1e9"], "at most 86400"),
        (["metrics", "x", "--port", "70000"], "0 to 65535"),
    ):
        with pytest.raises(SystemExit) as error:
            cli.main(arguments)
        assert error.value.code == 2
        assert said in capsys.readouterr().err


def test_durations_have_fitting_units() -> None:
    texts = [seconds_text(s) for s in (None, 16e-6, 0.0025, 3.14159)]
    assert texts == ["-", "16 us", "2.5 ms", "3.14 s"]
    assert [share_text(s) for s in (None, 0.5)] == ["-", "50.0%"]


def test_they_run_without_torch(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    block = "import sys; sys.modules['torch'] = None; "
    for arguments in (["stats", str(store)], ["doctor", str(store)],
                      ["top", str(store), "--once", "--interval", "0.01"]):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", block + MAIN, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=False,
        )
        assert done.returncode in (0, 1), done.stderr
        assert done.stderr == b""
