"""Attention written out is raised to one node, or the reason is recorded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from written_attention import (
    BIAS,
    HEADS,
    attentions,
    captured,
    example,
    fold,
    hidden,
    repeated,
    unfold,
)
from zoo import FAMILIES, quietly

from tamis.capture import capture
from tamis.capture.canonical import canonicalise
from tamis.capture.export import export_module
from tamis.capture.raise_attention import find_near_misses

RAISED: dict[str, tuple[Callable[..., Tensor], float]] = {
    "plain": (lambda q, k, v: (q @ k.transpose(-2, -1)).softmax(-1) @ v, 1.0),
    "scaled q": (lambda q, k, v: ((q * 0.5) @ k.transpose(-2, -1)).softmax(-1) @ v, 0.5),
    "divided logits": (lambda q, k, v: (q @ k.transpose(2, 3) / 4).softmax(3) @ v, 0.25),
    "scaled twice": (lambda q, k, v: ((q / 2) @ (k * 0.5).mT * 2).softmax(-1) @ v, 0.5),
    "scaled after transposing": (lambda q, k, v: (q @ (k.transpose(-2, -1) * 0.5)).softmax(-1) @ v, 0.5),
    "permuted keys": (lambda q, k, v: (q @ k.permute(0, 1, 3, 2)).softmax(-1) @ v, 1.0),
    "dropout": (lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.1, training=False) @ v, 1.0),
    "bias": (lambda q, k, v: (q @ k.mT * 0.5 + BIAS).softmax(-1) @ v, 0.5),
    "bias first": (lambda q, k, v: (BIAS + q @ k.mT).softmax(-1) @ v, 1.0),
    "filled": (lambda q, k, v: (q @ k.mT).masked_fill(hidden(), float("-inf")).softmax(-1) @ v, 1.0),
    "selected": (lambda q, k, v: torch.where(~hidden(), q @ k.mT, -1e9).softmax(-1) @ v, 1.0),
    "selected, other order": (lambda q, k, v: torch.where(hidden(), -1e9, q @ k.mT).softmax(-1) @ v, 1.0),
    "selected, filled tensor": (
        lambda q, k, v: torch.where(~hidden(), q @ k.mT, torch.full([], -1e9)).softmax(-1) @ v,
        1.0,
    ),
    "bias and mask": (lambda q, k, v: ((q @ k.mT) + BIAS).masked_fill(hidden(), -1e9).softmax(-1) @ v, 1.0),
    "two biases": (lambda q, k, v: ((q @ k.mT) + BIAS + BIAS[:, :1]).softmax(-1) @ v, 1.0),
}


@pytest.mark.parametrize("name", RAISED)
def test_raised(name: str) -> None:
    attend, scale = RAISED[name]
    graph = captured(attend)
    (node,) = attentions(graph)
    assert node.kwargs["scale"] == pytest.approx(scale)
    assert ("attn_mask" in node.kwargs) == any(word in name for word in ("bias", "filled", "selected"))
    assert node.name == "scaled_dot_product_attention"
    assert node.meta["stack_trace"]
    assert tuple(node.meta["val"].shape[1:]) == (HEADS, 5, 4)
    assert not any("softmax" in str(n.target) for n in graph.nodes)
    assert find_near_misses(graph) == []


@pytest.mark.parametrize(
    ("attend", "scale", "softcap"),
    [
        (lambda q, k, v: torch.tanh(q @ k.mT).softmax(-1) @ v, 1.0, 1.0),
        (lambda q, k, v: (torch.tanh(q @ k.mT * 0.5 / 3) * 3 + BIAS).softmax(-1) @ v, 0.5, 3.0),
    ],
)
def test_a_soft_cap_is_raised(attend: Callable[..., Tensor], scale: float, softcap: float) -> None:
    (node,) = (n for n in captured(attend).nodes if n.target is torch.ops.tamis.attention.default)
    assert [node.args[i] for i in (5, 7)] == [pytest.approx(scale), softcap]


def test_a_row_without_any_key_is_finite() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nothing = torch.ones(5, 5, dtype=torch.bool)
        return (q @ k.mT + BIAS).masked_fill(nothing, torch.finfo(torch.float32).min).softmax(-1) @ v

    assert len(attentions(captured(attend))) == 1


def test_casts_around_the_softmax() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.softmax(q @ k.mT * 0.5, dim=-1, dtype=torch.float32).to(v.dtype) @ v

    (node,) = attentions(captured(attend, torch.bfloat16, tolerance=2e-2))
    assert node.meta["val"].dtype == torch.bfloat16


def test_a_mask_in_another_type_is_cast() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT + BIAS).softmax(-1).to(v.dtype) @ v

    (node,) = attentions(captured(attend, torch.bfloat16, tolerance=2e-2))
    mask = node.kwargs["attn_mask"]
    assert isinstance(mask, fx.Node)
    assert mask.meta["val"].dtype == torch.bfloat16


def tokens_first(x: Tensor) -> Tensor:
    """[B, 2, N, D] -> [N, B, 2 * D], heads in the channels, folded from there."""
    whole = x.permute(2, 0, 1, 3).flatten(2)
    return whole.reshape(whole.shape[0], -1, x.shape[3]).transpose(0, 1)


FOLDED: dict[str, tuple[Callable[..., Tensor], float]] = {
    "reshape": (lambda q, k, v: unfold((fold(q) @ fold(k).mT).softmax(-1) @ fold(v)), 1.0),
    "flatten": (lambda q, k, v: (q.flatten(0, 1) @ k.flatten(0, 1).mT).softmax(-1) @ v.flatten(0, 1), 1.0),
    "scaled": (lambda q, k, v: unfold(((fold(q) * 0.5) @ fold(k).mT).softmax(-1) @ fold(v)), 0.5),
    "bmm": (lambda q, k, v: unfold(torch.bmm(torch.bmm(fold(q), fold(k).mT).softmax(-1), fold(v))), 1.0),
    "bias for all": (lambda q, k, v: unfold((fold(q) @ fold(k).mT + BIAS[0, 0]).softmax(-1) @ fold(v)), 1.0),
    "bias of one row": (
        lambda q, k, v: unfold(torch.baddbmm(BIAS[0, :1], fold(q), fold(k).mT, alpha=2.0).softmax(-1) @ fold(v)),
        2.0,
    ),
    "bias per head": (
        lambda q, k, v: unfold((fold(q) @ fold(k).mT + fold(repeated(BIAS, q))).softmax(-1) @ fold(v)),
        1.0,
    ),
    "tokens first": (
        lambda q, k, v: (
            ((tokens_first(q) @ tokens_first(k).mT).softmax(-1) @ tokens_first(v))
            .transpose(0, 1)
            .reshape(q.shape[2], q.shape[0], -1)
        ),
        1.0,
    ),
    "used folded": (lambda q, k, v: ((fold(q) @ fold(k).mT).softmax(-1) @ fold(v)).tanh(), 1.0),
}


@pytest.mark.parametrize("name", FOLDED)
def test_heads_in_the_batch_get_their_axis_back(name: str) -> None:
    attend, scale = FOLDED[name]
    graph = captured(attend)
    (node,) = attentions(graph)
    assert node.kwargs["scale"] == pytest.approx(scale)
    assert [tuple(q.meta["val"].shape[1:]) for q in node.args[:3]] == [(HEADS, 5, 4)] * 3
    assert ("attn_mask" in node.kwargs) == ("bias" in name)
    assert find_near_misses(graph) == []


class ManyAttentions(nn.Module):
    """torch's own attention, which asks for its probabilities or not, as a pre-norm layer."""

    def __init__(self, batch_first: bool, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(24, HEADS, batch_first=batch_first)
        self.norm, self.need_weights = nn.LayerNorm(24), need_weights

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.attention(h, h, h, need_weights=self.need_weights)[0]


@pytest.mark.parametrize("need_weights", [False, True])
def test_torch_attention_has_its_axes_apart(need_weights: bool) -> None:
    model = quietly(lambda: ManyAttentions(batch_first=True, need_weights=need_weights)).eval()
    graph = capture(model, (example(2),))
    (site,) = graph.sites
    assert (site.role, site.heads, site.head_dim) == ("stream", HEADS, 12)
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, Tensor):
            assert not any("*" in str(size) for size in value.shape), f"{node.name} folds axes: {value.shape}"
    with torch.no_grad():
        torch.testing.assert_close(graph.program.module()(example(3)), model(example(3)))


def test_eager_transformers_are_raised() -> None:
    from transformers import BertModel

    family = FAMILIES["bert"]
    model = family.shared()
    eager = quietly(lambda: BertModel._from_config(model.config, attn_implementation="eager")).eval()
    eager.load_state_dict(model.state_dict())
    program = canonicalise(export_module(eager, *family.inputs(2)))
    assert len(attentions(program.graph)) == family.layers
    args, kwargs = family.inputs(3, length=13)
    with torch.no_grad():
        expected = eager(*args, **kwargs)
    torch.testing.assert_close(program.module()(*args, **kwargs), expected, rtol=1e-4, atol=1e-5)


def test_timm_without_fused_attention_is_raised() -> None:
    family = FAMILIES["vit_mean"]
    model = family.model()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    program = canonicalise(export_module(model, *family.inputs(2)))
    assert len(attentions(program.graph)) == family.layers
    args, _ = family.inputs(5)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*args), model(*args), rtol=1e-4, atol=1e-5)
