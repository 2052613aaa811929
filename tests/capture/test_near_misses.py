"""Attention that is not raised is explained: the condition it failed, for the one that got furthest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from written_attention import (
    BIAS,
    HEADS,
    attentions,
    captured,
    fold,
    hidden,
    outside,
    unfold,
)
from zoo import FAMILIES, quietly

from tamis.capture import capture
from tamis.capture.canonical import canonicalise
from tamis.capture.export import export_module
from tamis.capture.raise_attention import find_near_misses
from tamis.errors import UnknownAttention

TABLE = torch.full((1, HEADS, 1, 1), 0.5)
MISSED: dict[str, tuple[Callable[..., Any], str]] = {
    "probabilities returned": (
        lambda q, k, v: ((p := (q @ k.mT).softmax(-1)) @ v, p),
        "the probabilities are used elsewhere too (by output)",
    ),
    "scaled after the mask": (
        lambda q, k, v: ((q @ k.mT + BIAS) * 0.5).softmax(-1) @ v,
        "the logits are scaled (at mul) after a mask was applied (at add)",
    ),
    "softmax over queries": (lambda q, k, v: (q @ k.mT).softmax(-2) @ v, "the softmax is over axis -2"),
    "heads outside the batch": (
        lambda q, k, v: (outside(q) @ outside(k).mT).softmax(-1) @ outside(v),
        "its heads are folded into the batch in a way that is not known",
    ),
    "five axes": (
        lambda q, k, v: (q[None] @ k[None].mT).softmax(-1) @ v[None],
        "its logits have 5 axes, not 4 (batch, heads, queries, keys)",
    ),
    "scaled after a folded bias": (
        lambda q, k, v: unfold((torch.baddbmm(BIAS[0, :1], fold(q), fold(k).mT) * 2).softmax(-1) @ fold(v)),
        "the logits are scaled after a bias was added (at baddbmm)",
    ),
    "learned scale": (
        lambda q, k, v: (q @ k.mT * TABLE).softmax(-1) @ v,
        "the logits are scaled by c_lifted_tensor_0 (placeholder), which is not a number (at mul)",
    ),
    "values in front": (
        lambda q, k, v: (v.mT @ (q @ k.mT).softmax(-1).mT).mT,
        "the probabilities are on the right of their product (at matmul_1), not in front of the values",
    ),
    "values mixed by einsum": (
        lambda q, k, v: torch.einsum("bhij,bhjd->bhid", (q @ k.mT).softmax(-1), v),
        "the values are mixed by aten.einsum (at einsum), not by a product",
    ),
    "capped after a mask": (
        lambda q, k, v: torch.tanh((q @ k.mT).masked_fill(hidden(), -1e9)).softmax(-1) @ v,
        "the logits are capped after a mask was applied",
    ),
    "capped twice": (
        lambda q, k, v: torch.tanh(torch.tanh(q @ k.mT)).softmax(-1) @ v,
        "(aten.tanh) stands between the product",
    ),
    "filled with zero": (
        lambda q, k, v: (q @ k.mT).masked_fill(hidden(), 0.0).softmax(-1) @ v,
        "hidden logits are set to 0.0, which does not hide them",
    ),
    "logits in float": (
        lambda q, k, v: (q.double() @ k.double().mT).softmax(-1).float() @ v,
        "queries, keys and values have different types",
    ),
}


@pytest.mark.parametrize("name", MISSED)
def test_near_misses_are_explained(name: str) -> None:
    attend, reason = MISSED[name]
    graph = captured(attend)
    assert attentions(graph) == []
    (miss,) = find_near_misses(graph)
    assert "softmax" in miss.node
    assert reason in miss.reason


def test_a_model_whose_attention_is_not_known_is_told_how_far_it_got() -> None:
    """DeBERTa adds products with position vectors to its logits before the heads get their axis."""
    from transformers import DebertaV2Config, DebertaV2Model

    sizes = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48, "num_hidden_layers": 2}
    positions = {"max_position_embeddings": 32, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    model = quietly(lambda: DebertaV2Model(DebertaV2Config(**sizes, **positions, vocab_size=60))).eval()
    args, kwargs = FAMILIES["bert"].inputs(2)
    with pytest.raises(UnknownAttention) as error:
        capture(model, args, kwargs)
    assert "2 softmax(es) look like attention" in str(error.value)
    assert "modeling_deberta_v2.py" in str(error.value)
    assert "(aten.reshape) stands between the product of queries and keys and the softmax" in str(error.value)


def test_the_reason_that_got_furthest_is_told() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = (q @ k.mT).softmax(-2) @ v
        return torch.tanh(q @ k.mT + first @ first.mT).softmax(-1) @ v + (q @ k.mT).softmax(-2) @ first

    misses = find_near_misses(captured(attend))
    assert len(misses) == 3
    assert max(misses).reason == "the logits are capped after a mask was applied (at add)"


def test_looking_for_near_misses_changes_nothing() -> None:
    graph = captured(MISSED["learned scale"][0])
    before = [n.format_node() for n in graph.nodes]
    find_near_misses(graph)
    assert [n.format_node() for n in graph.nodes] == before


def test_other_softmaxes_are_no_near_misses() -> None:
    graph = canonicalise(export_module(nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1)).eval(), torch.ones(2, 4))).graph
    assert find_near_misses(graph) == []
