"""The token ledger and FLOPs per layer."""

from __future__ import annotations

from typing import Any

import pytest
from toys import toy_graph
from zoo import FAMILIES

import tamis
from tamis.counts import CountRule
from tamis.graph import Layer, Mask, Site, TokenGraph
from tamis.report import LayerRow, Report, flops_text
from tamis.rewrite import Outcome
from tamis.runtime import ledger
from tamis.runtime.inputs import symbols_of


def graph_with(*modules: str) -> TokenGraph:
    """A graph whose layers' attention is in these modules."""
    kinds = {"heads": 1, "kv_heads": 1, "head_dim": 1, "scale": 1.0, "causal": False, "mask": Mask(), "role": "stream"}
    sites = [Site(i, f"sdpa_{i}", "q", "k", "v", module=path, source="", **kinds) for i, path in enumerate(modules)]  # type: ignore[arg-type]
    layers = [Layer(i, i, None, None, f"add_{i}") for i in range(len(modules))]
    return TokenGraph(toy_graph().program, tuple(sites), tuple(layers))


@pytest.mark.parametrize(
    ("modules", "owners"),
    [
        (["blocks.0.attn", "blocks.1.attn"], {0: "blocks.0", 1: "blocks.1"}),
        (
            ["encoder.layer.0.attention.self", "encoder.layer.1.attention.self"],
            {0: "encoder.layer.0", 1: "encoder.layer.1"},
        ),
        (["blocks.0.attn"], {0: "blocks.0"}),
        (["attn"], {}),
        (["", ""], {}),
        ([], {}),
    ],
)
def test_modules_of_layers(modules: list[str], owners: dict[int, str]) -> None:
    assert ledger.layer_modules(graph_with(*modules)) == owners


def test_counts_follow_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "stream_length", lambda graph, call: 100)
    graph = graph_with("blocks.0.attn", "blocks.1.attn", "blocks.2.attn")
    rule = CountRule(1, ((0, 10, 1),))
    outcomes = [
        Outcome("a", 0, "s", True, before="s0", after="u0", rule=rule),
        Outcome("a", 1, "s", False, "no cut"),
        Outcome("b", 2, "s", True, before="u0", after="u1", rule=rule),
        Outcome("c", 2, "s", True, before="u0", after="u2", rule=None),
    ]
    rows = ledger.ledger(graph, outcomes, ((), {}))
    assert [(row.tokens_in, row.tokens_out) for row in rows] == [(100, 90), (90, 90), (90, None)]


def test_a_reduction_of_a_dynamic_length_is_predicted_and_measured() -> None:
    family = FAMILIES["bert"]
    args, kwargs = family.inputs(2, length=20, padding=None)
    fast = tamis.compile(family.model(layers=2), args, kwargs=kwargs, passes="tome:r=4")
    rows = [(row.tokens_in, row.tokens_out, row.measured) for row in fast.report.layers]
    assert rows == [(20, 16, 20), (16, 12, 16)]
    assert fast.report.table()[0] == ("layer", "tokens in", "out", "FLOPs before", "after")
    before, after = ([getattr(row, f"flops_{when}") for row in fast.report.layers] for when in ("before", "after"))
    assert before[0] == before[1]  # equal layers
    assert after[0] < before[0]
    assert after[1] < after[0]
    assert sum(before) <= (fast.report.flops_before or 0)


@pytest.mark.parametrize(("flops", "text"), [(None, "?"), (0, "0"), (1234, "1.23 k"), (9_210_000_000, "9.21 G")])
def test_flops_text(flops: int | None, text: str) -> None:
    assert flops_text(flops) == text


def test_symbols() -> None:
    from toys import toy_call

    graph = toy_graph()
    values: dict[Any, int] = symbols_of(graph.program, toy_call(batch=3, length=7))
    assert sorted(values.values()) == [3, 7]


def test_measured_tokens_are_shown_where_they_differ() -> None:
    rows = (LayerRow(0, "a", 20, 16, 20), LayerRow(1, "b", 16, 12, 15), LayerRow(2, "c", None, None, 11))
    report = Report("toy", ("x",), layers=rows[:1])
    assert report.table() == [("layer", "tokens in", "out", "FLOPs before", "after"), ("0", "20", "16", "?", "?")]
    surprised = report.with_changes(layers=rows)
    assert surprised.table()[0][3] == "measured in"
    assert [row[1:4] for row in surprised.table()[1:]] == [("20", "16", "20"), ("16", "12", "15"), ("?", "?", "11")]
    assert str(surprised).splitlines()[1:3] == [
        "layer  tokens in  out  measured in  FLOPs before  after",
        "    0         20   16           20             ?      ?",
    ]
    assert str(Report("toy", ("x",))) == "toy: x"
