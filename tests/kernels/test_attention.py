"""attention and attention_rows against the definition in float64, and what is left of them in a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from onnx_call import run_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import sdpa_flop_count

from tamis.kernels.attention import ATTENTION
from tamis.kernels.attention import reference as attend
from tamis.kernels.attention_lse import reference as log_sum_exp
from tamis.kernels.attention_statistics import reference as rows

SEEN, ADDED = "seen", "added"


def case(heads: int, key_heads: int, queries: int, keys: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(heads * queries)
    shapes = {"q": (2, heads, queries, 8), "k": (2, key_heads, keys, 8), "v": (2, key_heads, keys, 8)}
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    values["bias"] = torch.randint(1, 9, (2, keys), generator=generator).float().log()
    values["bias"][1, 1:] = -torch.inf
    values[SEEN] = torch.rand(2, 1, queries, keys, generator=generator) > 0.4
    values[SEEN][..., 0] = True
    values[ADDED] = torch.randn(heads, queries, keys, generator=generator)
    return values


def definition(c: dict[str, Any], bias: bool, mask: str | None, scale: float, causal: bool, cap: float = 0) -> Any:
    repeats = c["q"].shape[1] // c["k"].shape[1]
    k, v = (c[name].double().repeat_interleave(repeats, 1) for name in "kv")
    logits = c["q"].double() @ k.transpose(2, 3) * scale
    if cap:
        logits = cap * torch.tanh(logits / cap)
    if bias:
        logits = logits + c["bias"].double().reshape(2, 1, 1, -1)
    if mask == ADDED:
        logits = logits + c[ADDED].double()
    if mask == SEEN:
        logits = logits.masked_fill(~c[SEEN], -torch.inf)
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[2:], dtype=torch.bool).triu(1), -torch.inf)
    return logits.softmax(-1) @ v, logits.logsumexp(-1), logits.softmax(-1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, SEEN, ADDED])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(4, 4, 7, 7), (4, 2, 5, 9), (3, 1, 1, 4)])
def test_attention_equals_the_definition(sizes, bias, mask, causal):
    c = case(*sizes)
    key_bias, given = c["bias"] if bias else None, c[mask] if mask else None
    expected_out, expected_lse, _ = definition(c, bias, mask, 0.3, causal)
    out = attend(c["q"], c["k"], c["v"], key_bias, given, 0.3, causal)
    lse = log_sum_exp(c["q"], c["k"], key_bias, given, 0.3, causal)
    torch.testing.assert_close(out.double(), expected_out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-6)
    assert lse.dtype == torch.float32
    capped = attend(c["q"], c["k"], c["v"], key_bias, given, 0.3, causal, 0.7)
    expected_out, _, _ = definition(c, bias, mask, 0.3, causal, cap=0.7)
    torch.testing.assert_close(capped.double(), expected_out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", [None, SEEN, ADDED])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(4, 4, 7, 7), (4, 2, 5, 9), (3, 1, 1, 4)])
def test_rows_equal_the_definition(sizes, bias, mask):
    c = case(*sizes)
    _, _, expected = definition(c, bias, mask, 0.3, False)
    got = rows(c["q"], c["k"], c["bias"] if bias else None, c[mask] if mask else None, 0.3)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-7)
    assert got.shape == (*c["q"].shape[:3], c["k"].shape[2])


def test_log_sizes_stand_for_duplicates():
    """A key of size 3 counts as three equal keys: what proportional attention is for."""
    c = case(2, 2, 4, 4)
    times = torch.tensor([1, 3, 2, 1])
    k, v = (c[name].repeat_interleave(times, 2) for name in "kv")
    dense = attend(c["q"], k, v, None, None, 0.3, False)
    bias = times.float().log().expand(2, 4)
    torch.testing.assert_close(attend(c["q"], c["k"], c["v"], bias, None, 0.3, False), dense, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(attend(c["q"], c["k"], c["v"], None, None, 0.3, False), dense, atol=1e-2)


def traced(bias: bool, mask: str | None, grouped: bool = False) -> Any:
    c = case(4, 2 if grouped else 4, 6, 6)
    inputs = [c["q"], c["k"], c["v"], *([c["bias"]] if bias else []), *([c[mask]] if mask else [])]

    def out_only(q, k, v, *rest):
        given = list(rest)
        key_bias = given.pop(0) if bias else None
        return attend(q, k, v, key_bias, given.pop(0) if mask else None, 0.3, False)

    graph = make_fx(out_only, pre_dispatch=True)(*inputs).graph
    graph.eliminate_dead_code()
    return graph


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_attention_stays_one_whole_node_and_nothing_else_is_left(bias, grouped):
    graph = traced(bias, None, grouped)
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert targets.count("aten.scaled_dot_product_attention.default") == 1
    views = {"aten.to.dtype", "aten.slice.Tensor", "aten.unsqueeze.default"}
    assert set(targets) - views == {"aten.scaled_dot_product_attention.default"}
    assert bias or len(targets) == 1
    numel = [node.meta["val"].numel() for node in graph.nodes if str(node.target) in views]
    assert all(count == 2 * 6 for count in numel)  # never N x N


def test_the_flop_count_is_that_of_torch():
    c = case(4, 4, 7, 7)
    shapes = [c[name].shape for name in "qkv"]
    assert ATTENTION.flops(*shapes, None, None, 0.3, False) == sdpa_flop_count(*shapes) == 2 * 2 * 2 * 4 * 7 * 7 * 8


@pytest.mark.parametrize("cap", [None, 2.0])
def test_a_query_that_sees_no_key_stays_a_number(cap):
    """As NaN it would spoil all queries of the next layer, whose weight of 0 for it changes nothing; in ONNX too."""
    c = case(4, 2, 5, 5)
    seen = c[SEEN].clone()
    seen[0, :, 2] = False
    args = c["q"], c["k"], c["v"], c["bias"], seen, 0.25, False, cap
    reference = attend(*args)
    (from_onnx,) = run_call(ATTENTION.onnx(*args), [reference])
    assert reference.isfinite().all()
    assert from_onnx.isfinite().all()
    others = [row for row in range(5) if row != 2]
    torch.testing.assert_close(from_onnx[0][:, others], reference[0][:, others], rtol=1e-5, atol=1e-6)
