"""Matching straight from the keys: where it fires, where not and why, and that the graph computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rewriting import rewritten
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import FAMILIES

import tamis.kernels  # noqa: F401  (registers the ops)
from tamis.capture.program import copied, rebuild
from tamis.counts import HALF, CountRule, at_most
from tamis.kernels.triton.ahead import Signature
from tamis.kernels.triton.architecture import Architecture
from tamis.lowering.fusion import fuse
from tamis.lowering.gpu import for_gpu
from tamis.lowering.splice import op_of

EVERY_LAYER = {"vit_small": "tome:r=13", "bert": "tome:keep_ratio=0.7", "hf_dinov3": "tome:r=3"}


def fused(program: Any) -> tuple[Any, list[Any]]:
    module = copied(program)
    fired = fuse(module.graph, ("fusion_match",))
    module.recompile()
    return rebuild(program, module), fired


@pytest.mark.parametrize("family", EVERY_LAYER)
def test_every_match_reads_the_keys(family):
    program = rewritten(family, EVERY_LAYER[family], torch.float32).graph.program
    changed, fired = fused(program)
    matches = [node.name for node in program.graph.nodes if (op := op_of(node)) and op.name == "bipartite_match"]
    assert len(matches) >= 2
    assert [(one.node, one.what, one.why) for one in fired] == [
        (name, "mean + bipartite_match", "") for name in matches
    ]
    names = [op.name for node in changed.graph.nodes if (op := op_of(node))]
    assert names.count("match_keys") == len(matches)
    assert "bipartite_match" not in names
    assert not [node for node in changed.graph.nodes if node.target is torch.ops.aten.mean.dim and 1 in node.args[1]]
    args, kwargs = FAMILIES[family].inputs(3, dtype=torch.float32)
    with torch.no_grad():
        expected, got = (pytree.tree_leaves(one.module()(*args, **kwargs)) for one in (program, changed))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("family", EVERY_LAYER)
def test_each_match_is_one_launch_and_layers_share_a_binary(family):
    placed = for_gpu(rewritten(family, EVERY_LAYER[family], torch.float32).graph.program).placed
    architecture = Architecture.named("sm_90")
    signatures = []
    for one in placed:
        if one.op.name == "match_keys":
            (launch,), _ = one.twin.work(architecture, *one.arguments)
            signatures.append(Signature.of(launch, architecture))
    assert len(signatures) >= 2
    # which tokens the first layer of BERT sees is read off a matrix, with strides of its own
    assert all(one == signatures[-1] for one in signatures[family == "bert" :])


class Match(nn.Module):
    """One matching; `how` is what stands before it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, keys: Tensor) -> Any:
        mean, rule = self.mean(keys), CountRule(1, (at_most(3), HALF))
        plan = torch.ops.tamis.bipartite_match(mean, None, 8, 1, rule.flat())
        return (*plan, mean * 2) if self.how == "read twice" else plan

    def mean(self, keys: Tensor) -> Tensor:
        if self.how == "tokens":
            return keys.mean(2, dtype=torch.float32)
        if self.how == "keepdim":
            return keys.mean(1, keepdim=True, dtype=torch.float32)[:, 0]
        if self.how == "one head":
            return keys[:, 0]
        return keys.mean(1) if self.how in ("rounded", "same type") else keys.mean(-3, dtype=torch.float32)


@pytest.mark.parametrize(
    ("how", "dtype", "reason"),
    [
        ("", torch.bfloat16, ""),
        ("same type", torch.float32, ""),
        ("rounded", torch.bfloat16, "mean is in torch.bfloat16, the kernel computes in float32"),
        ("rounded", torch.float64, "mean is in torch.float64, the kernel computes in float32"),
        ("", torch.float64, "a metric in torch.float64"),
        ("read twice", torch.float32, "the mean mean is read by mul too"),
        ("tokens", torch.float32, "mean is no mean over the second of four axes"),
        ("keepdim", torch.float32, "the metric select is no mean"),
        ("one head", torch.float32, "the metric select is no mean"),
    ],
)
def test_what_does_not_fit_is_left_and_said(how, dtype, reason):
    keys = torch.randn(2, 11, 11, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    program = torch.export.export(Match(how), (keys,))
    changed, (one,) = fused(program)
    assert (one.fired, one.why) == (not reason, reason)
    assert all(torch.equal(a, b) for a, b in zip(changed.module()(keys), Match(how)(keys), strict=True))
