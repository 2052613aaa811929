"""Attention written out is raised to one node, or the reason is recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from zoo import FAMILIES, quietly

from tamis.capture import capture
from tamis.capture.canonical import canonicalise
from tamis.capture.export import export_module
from tamis.capture.raise_attention import find_near_misses
from tamis.errors import UnknownAttention

SDPA = torch.ops.aten.scaled_dot_product_attention.default
HEADS = 2


class Attention(nn.Module):
    """Queries, keys and values [B, 2, N, 4] of x [B, N, 24], and a written-out attention on them."""

    def __init__(self, attend: Callable[..., Any]) -> None:
        super().__init__()
        self.attend = attend
        self.eval()

    def forward(self, x: Tensor) -> Any:
        batch, tokens, _ = x.shape
        q, k, v = x.reshape(batch, tokens, 3, HEADS, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return self.attend(q, k, v)


def example(batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 5, 24, generator=torch.Generator().manual_seed(batch)).to(dtype)


def captured(attend: Callable[..., Any], dtype: torch.dtype = torch.float32, tolerance: float = 1e-6) -> fx.Graph:
    """The canonical graph, checked at batches 1 and 3 against the function."""
    model = Attention(attend)
    program = canonicalise(export_module(model, example(2, dtype)))
    for batch in (1, 3):
        x = example(batch, dtype)
        torch.testing.assert_close(program.module()(x), model(x), rtol=tolerance, atol=tolerance)
    return program.graph


def attentions(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target is SDPA]


def hidden(n: int = 5) -> Tensor:
    """A causal mask, true where keys are hidden."""
    return torch.ones(n, n).triu(1).bool()


BIAS = torch.randn(1, HEADS, 5, 5, generator=torch.Generator().manual_seed(9))
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


def fold(x: Tensor) -> Tensor:
    """[B, 2, N, D] -> [B * 2, N, D]."""
    return x.reshape(-1, *x.shape[2:])


def repeated(bias: Tensor, like: Tensor) -> Tensor:
    return bias.expand(like.shape[0], -1, -1, -1)


def unfold(x: Tensor) -> Tensor:
    return x.reshape(-1, HEADS, *x.shape[1:])


def outside(x: Tensor) -> Tensor:
    """[B, 2, N, D] -> [2 * B, N, D]."""
    return x.transpose(0, 1).reshape(-1, *x.shape[2:])


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
    "learned scale": (lambda q, k, v: (q @ k.mT * TABLE).softmax(-1) @ v, "stands between the product"),
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
