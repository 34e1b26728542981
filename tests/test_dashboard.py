"""The Grafana dashboard: importable, and made of metrics and labels that exist."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from light_mem.metrics import FAMILIES
from tests.service_child import ROOT

DASHBOARD = json.loads((ROOT / "docs" / "grafana" / "lightmem.json").read_text())
PANELS = DASHBOARD["panels"]
EXPRESSIONS = [(p["title"], t["expr"]) for p in PANELS for t in p["targets"]]
NAMES = {f.name: f for f in FAMILIES} | {
    f"{f.name}_{part}": f for f in FAMILIES if f.kind == "histogram" for part in ("bucket", "count")
}


def labels_of(name: str) -> set[str]:
    return {*NAMES[name].labels, *(["le"] if name.endswith("_bucket") else [])}


@pytest.mark.parametrize(("panel", "expression"), EXPRESSIONS)
def test_an_expression_uses_what_there_is(panel: str, expression: str) -> None:
    names = re.findall(r"\blightmem_\w+", expression)
    assert names, panel
    assert set(names) <= set(NAMES)
    known = set.intersection(*(labels_of(name) for name in names))
    for name, matchers in re.findall(r"(lightmem_\w+)\{([^}]*)\}", expression):
        assert set(re.findall(r'(\w+)\s*[=!]~?\s*"', matchers)) <= labels_of(name)
        assert 'store=~"$store"' in matchers
    for listed in re.findall(r"\bby\s*\(([^)]*)\)", expression):
        assert {label.strip() for label in listed.split(",")} <= known
    assert expression.count("(") == expression.count(")")


@pytest.mark.parametrize(("panel", "expression"), EXPRESSIONS)
def test_counters_are_shown_as_rates_and_gauges_are_not(panel: str, expression: str) -> None:
    rated = set(re.findall(r"rate\((lightmem_\w+)", expression))
    for name in re.findall(r"\blightmem_\w+", expression):
        assert (name in rated) == (NAMES[name].kind != "gauge"), panel


@pytest.mark.parametrize(("panel", "expression"), EXPRESSIONS)
def test_a_service_is_counted_once_however_many_report_it(panel: str, expression: str) -> None:
    for inner, name in re.findall(r"max by \(([^)]*)\) \((?:rate\()?(lightmem_\w+)", expression):
        assert {label.strip() for label in inner.split(",")} == labels_of(name)
    assert expression.count("max by") == len(re.findall(r"\blightmem_\w+", expression)), panel


def test_every_metric_is_on_it() -> None:
    text = json.dumps(PANELS)
    used = {NAMES[name].name for name in re.findall(r"\blightmem_\w+", text)}
    assert used == {
        f.name
        for f in FAMILIES
        # Of the whole store since it was made, where panels show the services' own; and the rest
        # that is for whoever looks for something in particular.
        if f.name
        not in {
            "lightmem_store_lookups_total",
            "lightmem_store_hits_total",
            "lightmem_store_damaged_blocks_total",
            "lightmem_copied_blocks_total",
            "lightmem_store_pinned_blocks",
            "lightmem_unseen_services",
        }
    }


def test_it_can_be_imported_anywhere() -> None:
    assert DASHBOARD["title"] == "LightMem"
    assert isinstance(DASHBOARD["schemaVersion"], int)
    assert "id" not in DASHBOARD  # of the installation that it came from
    variables = {v["name"]: v for v in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert variables["store"]["datasource"] == source
    [name, label] = re.findall(r"\w+", variables["store"]["definition"])[1:]
    assert label in labels_of(name)
    for panel in PANELS:
        assert panel["datasource"] == source
        assert all(target["datasource"] == source for target in panel["targets"])


def test_panels_have_places_of_their_own() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        at = panel["gridPos"]
        cells = _cells(at)
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        assert [t["refId"] for t in panel["targets"]] == list("ABCDEFG")[: len(panel["targets"])]


def _cells(at: dict[str, Any]) -> set[tuple[int, int]]:
    return {
        (x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    }
