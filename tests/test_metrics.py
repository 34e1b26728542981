"""Prometheus metrics: names, values, and that several processes are not counted twice."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from light_mem import InvalidArgumentError, metrics
from light_mem.metrics import FAMILIES
from light_mem.monitor import look
from tests.maintenance_helpers import BLOCKS, Command, make_store
from tests.monitor_helpers import ask, server
from tests.service_child import ROOT, Child
from tests.service_rig import rig

prometheus_client = pytest.importorskip("prometheus_client")

Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]
# Units that a name may end in, before `_total`; prometheus.io/docs/practices/naming.
BASE_UNITS = ("seconds", "bytes")


def parsed(text: str) -> dict[str, Any]:
    """The families of an exposition, as prometheus_client's own parser reads them."""
    from prometheus_client.parser import text_string_to_metric_families

    return {family.name: family for family in text_string_to_metric_families(text)}


def scrape(*stores: Path, ages: bool = True) -> dict[str, Any]:
    return parsed(prometheus_client.generate_latest(metrics.registry(*stores, ages=ages)).decode())


def values(families: dict[str, Any], name: str) -> dict[tuple[str, ...], float]:
    """Samples of a name, by its labels other than the store, in the order of their names."""
    return {
        tuple(v for k, v in sorted(sample.labels.items()) if k != "store"): sample.value
        for family in families.values()
        for sample in family.samples
        if sample.name == name
    }


def only(families: dict[str, Any], name: str) -> float:
    [value] = values(families, name).values()
    return value


# --- names ----------------------------------------------------------------------------------------


def test_names_follow_the_conventions() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    for family in FAMILIES:
        assert re.fullmatch(r"lightmem(_[a-z]+)+", family.name), family
        assert family.name.endswith("_total") == (family.kind == "counter"), family
        assert not re.search(r"_(ms|ns|us|kb|mb|kib|count|sum|bucket)(_|$)", family.name), family
        assert family.text.endswith("."), family
        assert set(family.labels) <= {"store", "service", "mode", "age"}, family
        words = family.name.removesuffix("_total").split("_")
        assert not set(words[:-1]) & set(BASE_UNITS), "a unit stands last"


def test_what_is_exposed_is_what_is_declared(tmp_path: Path) -> None:
    with rig(tmp_path):
        found = scrape(tmp_path / "store")
        for family in FAMILIES:
            name = family.name.removesuffix("_total")
            assert found[name].type == family.kind
            assert found[name].documentation == family.text
            assert found[name].samples, family
            for sample in found[name].samples:
                assert set(sample.labels) - {"le"} == set(family.labels)
        assert set(found) == {f.name.removesuffix("_total") for f in FAMILIES} | {
            "lightmem_exporter_info"
        }


def test_the_document_lists_every_metric() -> None:
    document = (ROOT / "docs" / "operations.md").read_text()
    listed = set(re.findall(r"^\| `(lightmem_\w+)`", document, re.MULTILINE))
    assert listed == {family.name for family in FAMILIES}


# --- values ---------------------------------------------------------------------------------------


def test_the_values_are_those_of_the_service(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        r.write(["a", "b", "c"], [0, 1, 2])
        r.read(["a", "b"], [4, 5])
        r.service.query(["a", "x", "y"])
        r.service.count_dropped(9)
        found = scrape(tmp_path / "store")
        assert only(found, "lightmem_lookups_total") == 3
        assert only(found, "lightmem_hits_total") == 1
        assert only(found, "lightmem_misses_total") == 2
        assert only(found, "lightmem_dropped_blocks_total") == 9
        assert only(found, "lightmem_workers") == only(found, "lightmem_configured_workers") == 1
        assert sorted(values(found, "lightmem_copied_bytes_total").values()) == [8192, 12288]
        by_mode = {labels[0]: n for labels, n in values(found, "lightmem_tasks_total").items()}
        assert by_mode == {"read": 1, "write": 1}
        assert only(found, "lightmem_store_blocks") == 3
        assert only(found, "lightmem_store_inserts_total") == 3
        assert only(found, "lightmem_store_used_bytes") == 3 * 4096
        assert only(found, "lightmem_store_capacity_bytes") == 256 * 4096
        assert sum(values(found, "lightmem_store_age_bytes").values()) == 3 * 4096


def test_latencies_are_real_histograms(tmp_path: Path) -> None:
    with rig(tmp_path) as r:
        r.write(["a"], [0])
        for _ in range(5):
            r.read(["a"], [1])
        found = scrape(tmp_path / "store")
        [server_look] = look(tmp_path / "store").servers
        latency = server_look.numbers.latencies["read"]
        samples = [
            s for s in found["lightmem_task_duration_seconds"].samples if s.labels["mode"] == "read"
        ]
        buckets = [(s.labels["le"], s.value) for s in samples if s.name.endswith("_bucket")]
        bounds = [float(le) for le, _ in buckets]
        assert bounds == sorted(bounds)
        assert bounds[-1] == float("inf")
        counts = [n for _, n in buckets]
        assert counts == sorted(counts)
        by_name = {s.name.rpartition("_")[2]: s.value for s in samples}
        assert counts[-1] == by_name["count"] == latency.number == 5
        assert by_name["sum"] == pytest.approx(latency.total / 1e9)


def test_a_store_without_servers_has_its_own_numbers_only(tmp_path: Path) -> None:
    found = scrape(make_store(tmp_path / "store"))
    assert only(found, "lightmem_store_blocks") == len(BLOCKS)
    assert only(found, "lightmem_services") == 0
    assert values(found, "lightmem_tasks_total") == {}


def test_a_store_that_is_not_there_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = metrics.registry(tmp_path / "nothing", make_store(tmp_path / "store"))
    for _ in range(20):
        found = parsed(prometheus_client.generate_latest(registry).decode())
    by_store = {s.labels["store"]: s.value for s in found["lightmem_store_readable"].samples}
    assert by_store == {str(tmp_path / "nothing"): 0, str(tmp_path / "store"): 1}
    assert len(caplog.messages) == 5  # of 20: once a scrape would fill the log


def test_a_path_that_is_no_utf8_is_a_label_all_the_same(tmp_path: Path, command: Command) -> None:
    directory = Path(os.fsdecode(os.fsencode(tmp_path) + b'/n\xff"\n x'))
    found = scrape(make_store(directory), directory.parent / "n\udcfe")
    shown = str(tmp_path) + '/n\\xff"\n x'
    by_store = {s.labels["store"]: s.value for s in found["lightmem_store_readable"].samples}
    assert by_store == {shown: 1, str(tmp_path / "n\\xfe"): 0}
    assert command("metrics", directory) == 0
    assert found["lightmem_store_blocks"].samples[0].labels == {"store": shown}


# --- several processes ----------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> Iterator[list[Child]]:
    """Two servers of one store that have written 2 and 3 blocks."""
    with server(tmp_path / "store") as one, server(tmp_path / "store") as other:
        for child, hashes in ((one, "ab"), (other, "cde")):
            child.hear()
            assert ask(child, "write", *hashes)
        yield [one, other]


def test_each_service_is_one_series(tmp_path: Path, two: list[Child]) -> None:
    found = scrape(tmp_path / "store")
    written = {
        labels[1].partition("-")[0]: count
        for labels, count in values(found, "lightmem_copied_blocks_total").items()
        if labels[0] == "write"
    }
    assert written == {str(two[0].pid): 2, str(two[1].pid): 3}
    assert only(found, "lightmem_store_inserts_total") == 5
    assert only(found, "lightmem_services") == 2


def test_any_process_answers_with_the_whole(tmp_path: Path, two: list[Child]) -> None:
    whole = metrics.registry(tmp_path / "store", ages=False)
    here = prometheus_client.generate_latest(whole).decode()
    answers = {str(ask(child, "metrics")) for child in two}
    assert answers == {here}
    # So `max by (store, service)` over all targets counts each once; their plain sum would not.
    assert sum(values(parsed(here), "lightmem_copied_blocks_total").values()) == 5


def test_a_service_that_ends_takes_its_series_and_no_counter_falls(
    tmp_path: Path, two: list[Child]
) -> None:
    before = values(scrape(tmp_path / "store"), "lightmem_copied_blocks_total")
    two[0].kill()
    after = values(scrape(tmp_path / "store"), "lightmem_copied_blocks_total")
    assert set(after) < set(before)
    assert all(after[labels] >= before[labels] for labels in after)
    assert only(scrape(tmp_path / "store"), "lightmem_store_inserts_total") == 5


def test_two_services_of_one_process_are_two_series(tmp_path: Path) -> None:
    with rig(tmp_path, run=False), rig(tmp_path, run=False):
        assert len(values(scrape(tmp_path / "store"), "lightmem_lookups_total")) == 2


def test_a_registry_takes_one_collector(tmp_path: Path) -> None:
    registry = prometheus_client.CollectorRegistry()
    registry.register(metrics.Collector(tmp_path / "a", tmp_path / "b"))
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(metrics.Collector(tmp_path / "c"))
    with pytest.raises(InvalidArgumentError):
        metrics.Collector()


# --- light-mem metrics ----------------------------------------------------------------------------


def test_the_command_prints_them(tmp_path: Path, command: Command) -> None:
    assert command("metrics", make_store(tmp_path / "store")) == 0
    assert only(parsed(command.out), "lightmem_store_blocks") == len(BLOCKS)


SERVE = """
import contextlib, io, re, signal, sys
from light_mem import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by jobs in the background
class Told(io.TextIOBase):
    def write(self, text):
        found = re.search("http://\\\\S+", text)
        if found: say(found[0])
        return len(text)
sys.stderr = Told()
say(cli.main(["metrics", sys.argv[1], "--port", "0"]))
"""


def test_the_command_serves_them_until_it_is_interrupted(tmp_path: Path) -> None:
    import signal

    store = make_store(tmp_path / "store")
    with Child(SERVE, store) as child:
        [address] = child.hear()
        with urlopen(address) as answer:
            found = parsed(answer.read().decode())
        assert only(found, "lightmem_store_blocks") == len(BLOCKS)
        with rig(tmp_path / "other", run=False):
            pass  # another store's server: not in these metrics
        with urlopen(address) as answer:
            assert only(parsed(answer.read().decode()), "lightmem_services") == 0
        child.process.send_signal(signal.SIGINT)
        assert child.hear() == [130]
        assert child.end() == 0


def test_a_port_that_is_taken_is_exit_code_2(tmp_path: Path, command: Command) -> None:
    import socket

    store = make_store(tmp_path / "store")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert command("metrics", store, "--port", port) == 2
    assert "light-mem metrics: " in command.err
    assert f"'127.0.0.1:{port}'" in command.err
    assert command("metrics", store, "--address", "127.0.0.1") == 2
    assert "--address needs --port" in command.err


def test_without_prometheus_client_it_says_what_to_install(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert command("metrics", make_store(tmp_path / "store")) == 2
    assert "light-mem[prometheus]" in command.err
