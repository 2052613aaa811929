"""DTEM: ToMe by a learned metric of the normed hidden state; models equal to forwards by hand, the same in ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import reduced_forward
from rewriting import assert_equal_outputs, captured, rewritten, run
from test_onnx_zoo import run_file
from torch import Tensor, nn
from torch.nn import functional
from untrained import untrained
from zoo import FAMILIES

from tamis.capture import capture
from tamis.capture.projections import projected
from tamis.graph import shape_text
from tamis.lowering.onnx import export_onnx
from tamis.passes import DTEM, ToMe
from tamis.weights import Weights


def method(layers: Any = None, width: int = 96, depth: int = 3, **amount: Any) -> DTEM:
    one = untrained(DTEM, width, depth, layers=layers, **(amount or {"r": 5}))
    assert isinstance(one, DTEM)
    return one


def merged(x: Tensor, sizes: Tensor, metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    """ToMe's step (card 1.2) for one row: x [N, C], sizes [N], metric [N, M]; r tokens fewer."""
    unit = functional.normalize(metric, dim=-1)
    alike = (unit @ unit.T).tolist()
    a, b = ([i for i in range(prefix, len(x)) if i % 2 == parity] for parity in (0, 1))
    best = {i: max((alike[i][j], -j) for j in b) for i in a}
    leaving = sorted(a, key=lambda i: (-best[i][0], i))[:r]
    x, sizes = x * sizes[:, None], sizes.clone()
    for i in leaving:
        x[-best[i][1]] += x[i]
        sizes[-best[i][1]] += sizes[i]
    order = [*range(prefix), *(i for i in a if i not in leaving), *b]
    return x[order] / sizes[order, None], sizes[order]


@torch.no_grad()
def by_hand(model: Any, one: DTEM, prefix: int, image: Tensor) -> Tensor:
    """A timm ViT on one image with merging after each attention, in float64."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
    sizes = torch.ones(len(x), dtype=x.dtype)
    for layer, block in enumerate(model.blocks):
        normed, attn = block.norm1(x), block.attn
        q, k, v = attn.qkv(normed).reshape(len(x), 3, attn.num_heads, -1).permute(1, 2, 0, 3)
        q, k = attn.q_norm(q), attn.k_norm(k)
        weights = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).exp() * sizes
        mixed = (weights / weights.sum(-1, keepdim=True)) @ v
        x = x + block.ls1(attn.proj(mixed.transpose(0, 1).flatten(1)))
        if layer in one.selected(len(model.blocks)):
            weight, bias = (one.weights.tensors[f"blocks.{layer}.metric.{name}"] for name in ("weight", "bias"))
            x, sizes = merged(x, sizes, normed.float() @ weight.T + bias, 5, prefix)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.forward_head(model.norm(x)[None])


@pytest.mark.parametrize("name", ["vit_small", "deit_distilled", "dinov2_reg4"])
def test_a_rewritten_model_equals_the_forward_by_hand(name: str) -> None:
    family = FAMILIES[name]
    one = method(depth=family.layers)
    images = family.inputs(2, dtype=torch.float64)[0][0]
    expected = torch.cat([by_hand(family.shared(torch.float64), one, family.prefix, image) for image in images])
    assert_equal_outputs(run(rewritten(name, one), ((images,), {})), [expected], 1e-5)


@pytest.mark.full
def test_padding_under_post_norm() -> None:
    """BERT's projections read the stream itself."""
    family = FAMILIES["bert"]
    width = int(captured("bert").node(captured("bert").layers[0].before_attention or "").meta["val"].shape[-1])
    one = method((0, 1), width, keep_ratio=0.8)
    inputs = family.inputs(5, seed=5, dtype=torch.float64)
    answer = reduced_forward(family, family.shared(torch.float64), inputs, one)
    assert len(answer.stream.counts) == 2
    assert_equal_outputs(run(rewritten("bert", one), inputs), answer.outputs, 1e-5)


def test_keys_as_the_metric_make_it_tome() -> None:
    """A metric with the weights that make the keys' mean over heads chooses as ToMe does."""
    family = FAMILIES["vit_mean"]
    model: Any = family.shared(torch.float32)
    tensors = {}
    for layer, block in enumerate(model.blocks):
        for name in ("weight", "bias"):
            key = getattr(block.attn.qkv, name).detach().chunk(3)[1]
            tensors[f"blocks.{layer}.metric.{name}"] = key.reshape(block.attn.num_heads, -1, *key.shape[1:]).mean(0)
    inputs = family.inputs(3)
    same = run(rewritten("vit_mean", DTEM(r=4, weights=Weights.of(tensors, "dtem")), torch.float32), inputs)
    assert_equal_outputs(same, run(rewritten("vit_mean", ToMe(r=4), torch.float32), inputs), 1e-5)


def test_onnx_runtime_merges_the_same_tokens(tmp_path: Path) -> None:
    family, result = FAMILIES["deit_distilled"], rewritten("deit_distilled", method(), torch.float32, token_map=True)
    export_onnx(result.graph.program, tmp_path / "model.onnx")
    images = family.inputs(5)[0][0]
    got = run_file(tmp_path / "model.onnx", {result.graph.program.graph_signature.user_inputs[0]: images.numpy()})
    expected = run(result, ((images,), {}))
    np.testing.assert_array_equal(got[-1], expected[-1].numpy())
    assert_equal_outputs([torch.from_numpy(got[0])], expected[:1], 1e-4)


@pytest.mark.parametrize("name", ["vit_mean", "eva02", "hf_dinov3", "beit", "bert", "siglip"])
def test_what_projections_read_is_found(name: str) -> None:
    graph = captured(name)
    sources = [projected(graph.node(graph.sites[layer.site].k)) for layer in graph.layers]
    shapes = {shape_text(one.meta["val"]) for one in sources if one is not None}
    assert shapes == {shape_text(graph.node(graph.layers[0].before_attention or "").meta["val"])}
    assert len({one.name for one in sources if one is not None}) == len(graph.layers)


class Convolved(nn.Module):
    """One layer whose keys come from a convolution over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q, self.v = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.k, self.out = nn.Conv1d(8, 8, 1), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(2):
            k = self.k(x.transpose(1, 2)).transpose(1, 2)
            q, k, v = (one.unsqueeze(1) for one in (self.q(x), k, self.v(x)))
            x = x + self.out(functional.scaled_dot_product_attention(q, k, v).squeeze(1))
            x = x + self.out(functional.gelu(self.q(x)))
        return x.mean(1)


def test_a_model_without_such_a_projection_is_refused() -> None:
    graph = capture(Convolved().eval(), (torch.randn(2, 9, 6),))
    assert "keys of layer 0 are not made by one linear layer" in method((0,), 8, 2).why_not(graph)
