"""DynamicViT: counts and scorers as published, rewritten models equal to forwards written by hand, the same in ONNX."""

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
from untrained import untrained
from zoo import FAMILIES

from tamis.counts import CountRule, exact, keep_at_most
from tamis.lowering.onnx import export_onnx
from tamis.passes import DynamicViT
from tamis.passes.methods.dynamicvit import scores
from tamis.weight_errors import WeightsMismatch

VITS = ("vit_small", "deit_distilled", "dinov2_reg4")


class Scorer(nn.Module):
    """The published scorer by its definition: [B, T, C] of patch tokens -> [B, T, 2] log-probabilities."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.out_conv = nn.Sequential(
            *(nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, width // 4), nn.GELU()),
            *(nn.Linear(width // 4, 2), nn.LogSoftmax(dim=-1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_conv(x)
        half = x.shape[-1] // 2
        whole = x[:, :, half:].mean(1, keepdim=True).expand(-1, x.shape[1], -1)
        return self.out_conv(torch.cat([x[:, :, :half], whole], -1))


def method(width: int = 96, layers: tuple[int, ...] = (1, 2), **amount: Any) -> DynamicViT:
    one = untrained(DynamicViT, width, 12, layers=layers, **amount)
    assert isinstance(one, DynamicViT)
    return one


def scorer(one: DynamicViT, stage: int, width: int = 96) -> Scorer:
    """The scorer of a stage as a module, which has the published names."""
    stem = f"score_predictor.{stage}."
    module = Scorer(width)
    module.load_state_dict({k.removeprefix(stem): v for k, v in one.weights.tensors.items() if k.startswith(stem)})
    return module


@torch.no_grad()
def by_hand(model: Any, one: DynamicViT, prefix: int, images: Tensor) -> Tensor:
    """A timm ViT with the stages before its blocks, in float32."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    patches = x.shape[1] - prefix
    for layer, block in enumerate(model.blocks):
        if layer in one.selected(len(model.blocks)):
            stage = one.selected(len(model.blocks)).index(layer)
            stay = scorer(one, stage)(x[:, prefix:])
            kept = int(exact(0.7) ** (stage + 1) * patches)
            order = (stay[..., 0] - stay[..., 1]).argsort(dim=1, descending=True, stable=True)[:, :kept]
            x = torch.cat([x[:, :prefix], x[:, prefix:].gather(1, order.unsqueeze(-1).expand(-1, -1, 96))], 1)
        x = block(x)
    return model.forward_head(model.norm(x))


def test_counts_of_the_card() -> None:
    one = untrained(DynamicViT, 8, 12)
    assert [one.rule(layer, 12, 1).resolved(197).out(n) - 1 for layer, n in ((3, 197), (6, 138), (9, 97))] == [
        137,
        96,
        67,
    ]
    stage = CountRule(0, (keep_at_most(exact(0.7)),), of_first=exact(0.7) ** 2)
    assert stage.resolved(100).out(70) == 49 != int(100 * 0.7**2)
    stage = CountRule(0, (keep_at_most(exact(0.7)),), of_first=exact(0.7) ** 3)
    assert stage.resolved(1000).out(490) == 343 != int(1000 * 0.7**3)
    assert stage.resolved(None).out(490) == 343
    assert stage.resolved(None).out(489) == 342, "of an unknown number: the fraction of those that come in"
    assert one.selected(12) == [3, 6, 9]
    assert untrained(DynamicViT, 8, 12, keep_ratio=1).rule(3, 12, 1).is_identity


def test_scores_are_those_of_the_published_module() -> None:
    one, x = method(8, (0,)), torch.randn(3, 11, 8, generator=torch.Generator().manual_seed(0))
    published = scorer(one, 0, 8)(x[:, 1:])
    weights = {name.removeprefix("score_predictor.0."): value for name, value in one.weights.tensors.items()}
    patches = torch.arange(11).expand(3, 11) >= 1
    got = scores(x, patches, weights)[:, 1:]
    torch.testing.assert_close(got, published[..., 0] - published[..., 1])
    assert torch.equal(got.argsort(1), published[..., 0].argsort(1))
    longer = torch.cat([x, torch.full((3, 4, 8), 1e3)], 1)
    masked = torch.cat([patches, torch.zeros(3, 4, dtype=torch.bool)], 1)
    torch.testing.assert_close(scores(longer, masked, weights)[:, 1:11], got)


@pytest.mark.parametrize("name", VITS)
def test_a_rewritten_model_equals_the_forward_by_hand(name: str) -> None:
    family, one = FAMILIES[name], method()
    one = one if name != "vit_small" else method(layers=(1,))
    model, result = family.shared(torch.float32), rewritten(name, one, torch.float32)
    for batch in (1, 3):
        images = family.inputs(batch, seed=batch)[0][0]
        expected = by_hand(model, one, family.prefix, images)
        assert_equal_outputs(run(result, ((images,), {})), [expected], 1e-4)


@pytest.mark.parametrize(
    "name",
    ["bert", *(pytest.param(one, marks=pytest.mark.full) for one in ("deit_distilled", "eva02", "bert_no_mask"))],
)
def test_a_rewritten_model_equals_the_oracle(name: str) -> None:
    family = FAMILIES[name]
    width = captured(name).node(captured(name).layers[0].before_attention or "").meta["val"].shape[-1]
    one = method(width, (0, 1))
    for batch in (1, 5):
        inputs = family.inputs(batch, seed=batch, dtype=torch.float64)
        answer = reduced_forward(family, family.shared(torch.float64), inputs, one)
        assert len(answer.stream.counts) == 2
        assert_equal_outputs(run(rewritten(name, one), inputs), answer.outputs, 1e-5)


@pytest.mark.parametrize("name", ["deit_distilled", pytest.param("bert", marks=pytest.mark.full)])
def test_onnx_runtime_keeps_the_same_tokens(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    width = captured(name).node(captured(name).layers[0].before_attention or "").meta["val"].shape[-1]
    result = rewritten(name, method(width, (0, 1)), torch.float32, token_map=True)
    export_onnx(result.graph.program, tmp_path / "model.onnx")
    args, kwargs = family.inputs(5, length=23, padding="right") if family.padded else family.inputs(5)
    feeds = dict(zip(result.graph.program.graph_signature.user_inputs, [*args, *kwargs.values()], strict=True))
    got = run_file(tmp_path / "model.onnx", {key: value.numpy() for key, value in feeds.items()})
    expected = run(result, (args, kwargs))
    np.testing.assert_array_equal(got[-1], expected[-1].numpy())
    assert_equal_outputs([torch.from_numpy(one) for one in got[:-1]], expected[:-1], 1e-4)
    assert (got[-1] == -1).any()


def test_scorers_of_another_depth_are_refused() -> None:
    three = untrained(DynamicViT, 96, 12, layers=(0, 1, 2))
    with pytest.raises(WeightsMismatch, match=r"score_predictor.2.in_conv.0.weight.* and 7 more not asked for"):
        rewritten("vit_mean", DynamicViT(layers=(0, 1), weights=three.weights), torch.float32)
